"The command `hedgehog`."
from .options import app, main
from . import linearize, commands, experiments  # each registers its commands with `app`

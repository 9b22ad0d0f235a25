"The command `hedgehog`."
from .options import app, main
from . import linearize, commands  # each registers its commands with `app`

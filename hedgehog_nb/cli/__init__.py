"The command `hedgehog`."
from .commands import app, main

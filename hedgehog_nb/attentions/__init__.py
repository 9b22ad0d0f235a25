"Every attention as a module of PyTorch, found by name. Importing the package registers them."
from . import baselines, hedgehog, window

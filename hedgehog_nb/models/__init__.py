"Models of transformers, converted. Importing the package makes `AutoModelForCausalLM.from_pretrained` and its like load converted folders."
from . import loading

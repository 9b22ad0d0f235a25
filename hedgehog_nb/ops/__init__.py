"Functions on tensors, in PyTorch alone: the references, and the fast forms."

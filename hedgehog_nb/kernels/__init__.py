"Kernels in Triton and in C. They take tensors, and import nothing that is not needed: Triton only where it is there."

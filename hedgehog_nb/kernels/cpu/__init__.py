"Kernels in C, compiled for the processor that is there."

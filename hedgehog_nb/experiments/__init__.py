"The experiments of the paper, and benchmarks."

"""Integer GEMM and convolution for NVIDIA GPUs, on CUTLASS."""

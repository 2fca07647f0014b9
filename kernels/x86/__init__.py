"""Kernels for x86-64 CPUs: oneDNN's integer GEMM and convolution, and our own producers."""

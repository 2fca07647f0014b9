"""Kernels for NVIDIA GPUs: what all of them need, and the producers."""

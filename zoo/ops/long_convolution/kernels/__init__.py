"""Triton kernels of the long convolution."""

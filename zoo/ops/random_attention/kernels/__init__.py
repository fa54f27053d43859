"""Triton kernels of random attention."""

"""Triton kernels of the diagonal scan."""

"""Triton kernels of the semiseparable scan."""

"""Triton kernels of the selective scan."""

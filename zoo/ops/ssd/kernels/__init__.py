"""Triton kernels of SSD."""

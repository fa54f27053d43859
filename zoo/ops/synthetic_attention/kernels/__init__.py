"""Triton kernels of synthetic attention."""

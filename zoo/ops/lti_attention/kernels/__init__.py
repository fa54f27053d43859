"""Triton kernels of LTI attention."""

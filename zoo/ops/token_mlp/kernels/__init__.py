"""Triton kernels of the token MLP."""

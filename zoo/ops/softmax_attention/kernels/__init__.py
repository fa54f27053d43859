"""Triton kernels of softmax attention."""

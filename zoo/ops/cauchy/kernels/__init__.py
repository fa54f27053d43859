"""Triton kernels of the Cauchy sums."""

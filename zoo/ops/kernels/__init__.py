"""Pieces that Triton kernels of several operators share. Importing this package imports Triton."""

"""Triton kernels of Linformer attention."""

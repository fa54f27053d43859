"""Data for training and quality comparisons."""

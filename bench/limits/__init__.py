"""Ceilings of a GPU, measured by a small CUDA program that is compiled on request."""

"""Kernels that fail it, one for each reason."""

"""Kernels that pass the gate."""

"""Kernels for the test of the ahead-of-time gate: `good` has to pass it, `bad` to fail in every way that it knows."""

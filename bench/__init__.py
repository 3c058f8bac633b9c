"""The microbenchmarks: one case an op, shape and direction, with its bytes, operations and rivals; whole models too.

Installs as `fastconv.bench`; `fastconv bench` is its command line, and `bench/gpu.py` its script for a machine with a
GPU and no installation.
"""

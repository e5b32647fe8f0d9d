"""Kernels for JAX, and what the compilers of absent chips say about them.

`pallas_kernels.targets` compiles any JAX function for a GPU or TPU that this machine does not have
and reports the memory that the compiled program needs and moves.
"""

"""Kernels in numpy and BLAS that take the place of mlx's slow CPU backend."""

"""The extension module: C kernels (rows.h) and their Cython driver (kernels.pyx)."""

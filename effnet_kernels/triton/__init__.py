"""Triton kernels and their launchers, one file an op. Importing a module compiles nothing."""

"""Refinement by gradients: the ternary model learns from the full-precision one."""

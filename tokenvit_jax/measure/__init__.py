"""Measures the cost of models and operators: multiply-adds, and time and memory on this machine.

This needs only JAX, Flax and NumPy; a comparison with timm's models needs PyTorch and timm.
"""

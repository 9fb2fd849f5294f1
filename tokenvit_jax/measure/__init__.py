"""Cost of models and operators: multiply-adds, and time and memory on this machine.

Needs JAX, Flax and NumPy only; PyTorch and timm to compare with timm's models.
"""

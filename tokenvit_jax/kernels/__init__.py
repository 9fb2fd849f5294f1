"""Implementations of operators for one kind of machine.

The files of :mod:`tokenvit_jax.ops` hold the mathematics, the checks and the choice between forms;
only they import these modules. A kernel imports jax, numpy, other kernels and the helpers of `ops`
that depend on nothing else (`dtypes`, `gather`).
"""

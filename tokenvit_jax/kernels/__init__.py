"""Implementations of operators for one kind of machine.

The files of :mod:`tokenvit_jax.ops` hold the mathematics, the checks and the choice between forms;
only they import these modules. A kernel imports jax, numpy, other kernels and the helpers of `ops`
that depend on nothing else (`dtypes`, `gather`).

Kernels for NVIDIA GPUs are written for Pallas' Triton backend: it compiles for every GPU from
compute capability 8.0 on, also ahead of time on a machine without one. Its kernels run in the
tests, in Pallas' interpret mode and as the compiler of the GPU gets them. Its successor, Mosaic
GPU, is for Hopper and newer only. Kernels for TPUs are written for Mosaic.

Instructions bound most kernels for GPUs, not bytes (`compile` says which). So they use
:mod:`tokenvit_jax.kernels.arithmetic`, and sums over tokens reduce the first axis of a matrix:
threads hold columns, so that few numbers go from thread to thread.
"""

"""Memory of the TPU that a program is traced for, which decides what its kernels can hold."""

from jax.experimental.pallas import tpu as plt

# What a kernel may use of a core's memory (VMEM) [bytes], if the core has so much: from version 5
# on. Versions 2 to 4 have 16 MiB.
LARGE_VMEM = 64 * 2**20


def has_large_vmem() -> bool:
    """Says whether this is traced for TPUs with much VMEM: of the mesh, or else of this machine."""
    return plt.is_tpu_device() and plt.get_tpu_info().vmem_capacity_bytes >= LARGE_VMEM


def vmem_limit() -> int | None:
    """Returns `vmem_limit_bytes` of a kernel; None: the compiler's own limit."""
    return LARGE_VMEM if has_large_vmem() else None

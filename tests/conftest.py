"""Settings of the test processes."""

import os

# Eight virtual devices, so that code for several devices is tested on any machine; and quick
# compilation, which is most of the time that small tests take. Before jax is imported: it reads
# this once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

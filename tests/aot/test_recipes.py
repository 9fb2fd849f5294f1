"""Training steps of every family compile for a GPU and a TPU, within the bounds of their recipes.

They need the extras aot-gpu and aot-tpu (`make test-aot`), no device, and an hour on two cores.
"""

import jax
import pytest

from tokenvit_jax import cli
from tokenvit_jax.ahead import costs, targets
from tokenvit_jax.ahead.compiling import compile_step
from tokenvit_jax.errors import UserError
from tokenvit_jax.recipes.compiled import BOUNDS

pytestmark = pytest.mark.aot
CASES = [(recipe, target) for recipe, bounds in BOUNDS.items() for target in bounds]


def needs(target):
    """Skips a test if there is no compiler for the target."""
    targets.prepare_jax()
    try:
        targets.devices_of(targets.parse_target(target))
    except UserError as error:
        pytest.skip(str(error))


def load(recipe):
    flag_values = cli.config_flags()
    flag_values(["compile", f"--config={recipe}"])
    return cli.read_config(flag_values)


def is_own(kernel):
    """Whether XLA or this package wrote a kernel, and no library."""
    return kernel.opcode == "fusion" or "pallas_call" in kernel.name


@pytest.mark.parametrize(("recipe", "target"), CASES)
def test_training_step(recipe, target):
    needs(target)
    bound, found = BOUNDS[recipe][target], targets.parse_target(target)
    compiled = compile_step(load(recipe), found, "train", bound.images)
    assert compiled.fits
    if found.device.platform == "cuda":  # the compiler still writes what kernels execute
        known = [bool(kernel.launches) for kernel in compiled.program.kernels if is_own(kernel)]
        assert sum(known) > 0.9 * len(known)
    launches = costs.total(costs.by_part(compiled)).launches
    print(recipe, target, f"{compiled.memory.total / 2**30:.2f} GiB", launches)
    if bound.memory_gib is not None:
        assert compiled.memory.total / 2**30 <= bound.memory_gib
    if bound.launches is not None:
        assert launches <= bound.launches


@pytest.mark.parametrize("name", targets.list_devices())
def test_every_device_compiles(name):
    needs(name)
    target = targets.parse_target(name)
    (device,) = targets.devices_of(target)
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=place)
    lowered = jax.jit(lambda x: (x @ x).sum()).lower(x)
    done = lowered.compile(compiler_options=targets.compiler_options(target.device))
    assert "ENTRY" in done.as_text()


@pytest.mark.parametrize(
    "name", ["h100x8", "h200x16", "v5e:2x1", "v5e:16x16", "v4:4x4x8", "v6e:4x4"]
)
def test_devices_of_a_target(name):
    needs(name)
    target = targets.parse_target(name)
    assert len(targets.devices_of(target)) == target.num_devices

"""A small network of every family gives the same on the accelerator as on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import compile_all, lower
from shipped_configs import load_config
from tolerances import TOLERANCES, distance

from tokenvit_jax.measure.models import loss_of
from tokenvit_jax.models import create_model

SIZE, BATCH, CLASSES = 64, 8, 10
PYRAMID = {"depths": (1, 1, 1, 1)}
# Name -> configuration, its argument, and overrides of its network.
NETWORKS = {
    "dgt": ("dgt_t", "digits", PYRAMID),
    "clustr": ("clustr_t", "digits", PYRAMID),
    "pale": ("pale_t", "digits", PYRAMID),
    "swin": ("swin_t", "digits", PYRAMID | {"depths": (2, 1, 1, 1)}),
    "swinv2": ("swinv2_t", "digits", PYRAMID | {"depths": (2, 1, 1, 1)}),
    "deit": ("deit_s", "digits", {"depth": 2}),
    "pooled": (
        "deit_s", "digits",
        {"depth": 2, "token_reducer": {"keep": (48, 24), "method": "weighted_kmedoids"}},
    ),
}  # fmt: skip


def network(name, dtype):
    config, argument, overrides = NETWORKS[name]
    config = load_config(config, argument)
    settings = {**config.model_overrides.to_dict(), **overrides}
    return create_model(config.model, num_classes=CLASSES, dtype=jnp.dtype(dtype), **settings)


def run_of(model):
    """Returns a function of variables, images and labels: the gradient and the logits."""

    def run(variables, images, labels):
        state = {key: value for key, value in variables.items() if key != "params"}
        gradient = jax.grad(loss_of(model), has_aux=True)
        gradient, (logits, _) = gradient(variables["params"], state, images, labels)
        return gradient, logits

    return run


@pytest.mark.accelerator
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, accelerator, cpu):
    draw = np.random.default_rng(0)
    images = draw.standard_normal((BATCH, SIZE, SIZE, 3), np.float32)
    labels = draw.integers(CLASSES, size=BATCH, dtype=np.int32)
    model = network(name, "float32")
    with jax.default_device(cpu):
        first = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))
        variables = jax.device_get(first(images[:1]))
    inputs = (variables, images, labels)
    lowered = {"expected": lower(run_of(model), inputs, cpu, "float32")}
    for dtype in TOLERANCES:
        lowered[dtype] = lower(run_of(network(name, dtype)), inputs, accelerator, dtype)
    compiled = compile_all(lowered)
    gradient, logits = compiled.pop("expected")(*jax.device_put(inputs, cpu))
    for dtype, program in compiled.items():
        found = program(*jax.device_put(inputs, accelerator))
        errors = distance(found[1], logits), distance(found[0], gradient)
        print(f"{name}, {dtype}: logits {errors[0]:.2g}, gradient {errors[1]:.2g}")
        assert errors[0] <= TOLERANCES[dtype].network, dtype
        assert errors[1] <= TOLERANCES[dtype].gradient, dtype

"""Every operator gives the same on the accelerator as on the CPU, with kernels and without."""

import jax
import jax.numpy as jnp
import pytest
from operator_cases import CASES, cast
from programs import compile_all, lower
from tolerances import problems

from tokenvit_jax import ops
from tokenvit_jax.kernels import cudnn

NAMES = [(name, call) for name, calls in CASES.items() for call in calls]


def test_every_operator_has_a_case():
    public = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert CASES.keys() == public


def run_of(case):
    """Returns a function of the inputs that returns the results and the gradients."""

    def run(*inputs):
        def loss(*differentiated):
            results = case.function(*differentiated, *inputs[case.num_differentiated :])
            floats = [x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum(weighted(x) for x in floats), results

        if not case.num_differentiated:
            return {"result": loss()[1]}
        numbers = tuple(range(case.num_differentiated))
        grads, results = jax.grad(loss, numbers, has_aux=True)(*inputs[: len(numbers)])
        return {"result": results, "gradient": grads}

    return run


def weighted(x):
    """Returns a sum in which every number has its own weight.

    All are positive: the gradient of a bias, their sum, would else be rounding noise in bfloat16.
    """
    weights = 1 + jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) / 2
    return jnp.sum(x.astype(jnp.float32) * weights)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), NAMES, ids=lambda part: part.replace(" ", "_"))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_forms_are_traced_while_jax_has_64_bits(name, call, dtype):
    """Where a type is left to jax, numbers in kernels would then not fit together."""
    case = CASES[name][call]
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cast(case, dtype)]
    with jax.enable_x64(True), cudnn.assumed():
        jax.jit(run_of(case)).trace(*inputs)


# Cases of one image, and those that hold arrays of four images, which are no arguments.
WITHOUT_BATCH = {"valid_anchors", "sample_objects"}
WITHOUT_BATCH |= {"stochastic depth", "clustered_attention", "query_prototypes"}
# Arguments without an axis of images, although they are as long as one.
SHARED = {"few tokens": 3, "many tokens": 3, "update_centroids": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), NAMES, ids=lambda part: part.replace(" ", "_"))
def test_no_images_are_no_error(name, call):
    case = CASES[name][call]
    images = case.inputs[0].shape[0] if case.inputs else 0
    if images not in (2, 4) or {name, call} & WITHOUT_BATCH:
        pytest.skip("the images of the case are not its arguments' leading axis")
    shared = SHARED.get(call or name)
    inputs = [
        x[:0] if len(x) == images and i != shared else x
        for i, x in enumerate(cast(case, "bfloat16"))
    ]
    with cudnn.assumed():
        jax.jit(run_of(case)).trace(*inputs)


@pytest.mark.accelerator
@pytest.mark.parametrize(("name", "call"), NAMES, ids=lambda part: part.replace(" ", "_"))
def test_operator(name, call, accelerator, cpu, monkeypatch):
    case = CASES[name][call]
    lowered = {"expected": lower(run_of(case), cast(case, "float32"), cpu, "float32")}
    for kernels in ("on", "off"):
        monkeypatch.setenv("TOKENVIT_JAX_KERNELS", kernels)
        jax.clear_caches()  # operators are traced once, with the kernels of that time
        for dtype in ("float32", "bfloat16"):
            lowered[kernels, dtype] = lower(run_of(case), cast(case, dtype), accelerator, dtype)
    compiled = compile_all(lowered)
    expected = compiled.pop("expected")
    found = []
    for (kernels, dtype), program in compiled.items():
        inputs = cast(case, dtype)
        rounded = tuple(x.astype("float32") if x.dtype == dtype else x for x in inputs)
        right = jax.device_get(expected(*jax.device_put(rounded, cpu)))
        left = jax.device_get(program(*jax.device_put(inputs, accelerator)))
        lines = problems(left, right, dtype, case.chooses)
        found += [f"kernels {kernels}, {dtype}: {line}" for line in lines]
    assert not found, "\n".join(found)

"""Attention by cuDNN: what is done around the library gives the same attention, on a CPU too."""

import functools
import itertools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from sampled import sampled

from tokenvit_jax import ops
from tokenvit_jax.kernels import cudnn, gpus
from tokenvit_jax.kernels.group_attention_dense import attend_dense, attend_dense_by_cudnn

KERNELS = [
    export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{suffix}")
    for suffix in ("", "Backward")
]


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def naive(q, k, v, scale, key_bias=None):
    key_bias = 0 if key_bias is None else key_bias[:, None, None]
    q, k, v, key_bias = (np.asarray(x, np.float64) for x in (q, k, v, key_bias))
    logits = scale * np.einsum("bqnd,bknd->bnqk", q, k) + key_bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), v)


def plain(q, k, v, *, scale, key_bias=None):
    """Attention and its gradient by XLA's own operations."""
    bias = None if key_bias is None else key_bias[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, bias, scale=scale)


def differentiated(fn, *args):
    loss = jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (0, 1, 2))
    if args[0].dtype == jnp.float16:  # jit has no such products on a CPU
        return loss(*args)
    return jax.jit(loss)(*args)


@pytest.fixture
def by_xla(monkeypatch):
    """Lets XLA do what cuDNN does on a GPU."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")


@pytest.mark.parametrize("lengths", [(5, 7), (4, 7), (6, 6)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_attention_and_gradients(by_xla, lengths, biased):
    dim = 8 if lengths == (6, 6) else 7  # zeros are appended up to 8
    q, k, v = (normal(i, 2, lengths[i > 0], 3, dim) for i in range(3))
    key_bias = None
    if biased:
        key_bias = np.log(1 + 9 * np.random.default_rng(3).random(k.shape[:2], np.float32))
        key_bias[:, 2] = cudnn.NEVER
    fn = functools.partial(cudnn.attend, scale=0.3, key_bias=key_bias)
    expected = naive(q, k, v, 0.3, key_bias)
    np.testing.assert_allclose(jax.jit(fn)(q, k, v), expected, rtol=1e-5, atol=1e-5)
    value, grads = differentiated(fn, q, k, v)
    plain_value, plain_grads = differentiated(
        functools.partial(plain, scale=0.3, key_bias=key_bias), q, k, v
    )
    np.testing.assert_allclose(value, plain_value, rtol=1e-4)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(grad, plain_grad, atol=1e-5)
    if biased:  # an excluded key has no gradient at all
        assert not np.any(grads[1][:, 2]) and not np.any(grads[2][:, 2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_a_bias_is_not_rounded_to_the_short_type(dtype):
    """In bfloat16 alone, the weight of a key that stands for 100 others would be 1 % wrong."""
    x = jnp.log(jnp.linspace(1, 300, 64))
    parts = jax.jit(functools.partial(cudnn.split_in_three, dtype=dtype))(x)
    assert parts.dtype == dtype
    np.testing.assert_allclose(parts.astype(jnp.float32).sum(-1), x, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype", sampled([jnp.float32, jnp.float16]), ids=lambda dtype: dtype.__name__
)
def test_group_attention_is_plain_attention(by_xla, dtype):
    q, k, v = (normal(i, 2, 3, 7, 8, dtype=dtype) for i in range(3))
    draw = np.random.default_rng(3)
    groups = draw.integers(0, 5, (2, 3, 7), np.int32)
    selected = draw.random((2, 3, 7, 5)) < 0.4
    selected[:, :, 0] = True
    found, expected = (
        differentiated(lambda *qkv, form=form: form(*qkv, groups, selected), q, k, v)
        for form in (attend_dense_by_cudnn, attend_dense)
    )
    eps = float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(found, expected, rtol=10 * eps, atol=20 * eps)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


def test_misfits():
    q = jnp.zeros((2, 196, 3, 32), jnp.bfloat16)
    assert cudnn.misfit(q, q, q) == "no NVIDIA GPU of compute capability 8.0 with cuDNN 9"
    with cudnn.assumed():
        assert cudnn.misfit(q, q, q) is None
        assert cudnn.misfit(q, q, q, extra=48) is None
        assert "float32" in cudnn.misfit(q.astype(jnp.float32), q, q)
        assert "above 256" in cudnn.misfit(q, q, q, extra=225)
        assert "fewer than 64" in cudnn.misfit(q[:, :49], q, q)
        assert cudnn.misfit(q[:, :49], q, q, min_queries=16) is None
        assert cudnn.misfit(q, q[:, :49], q[:, :49]) is None
        short = q[..., :20]  # zeros are appended
        assert cudnn.misfit(short, short, short) is None
    assert not cudnn.available()


@pytest.mark.parametrize(
    ("platform", "capability", "version", "expected"),
    [
        ("cuda 13000", "8.0", 91200, "head dim 200 is above 128"),
        ("cuda 13000", "9.0", 90000, None),
        ("cuda 13000", "7.5", 91200, "no NVIDIA GPU"),
        ("cuda 13000", "9.0", 89700, "no NVIDIA GPU"),
        ("rocm 60000", "gfx90a", 91200, "no NVIDIA GPU"),
    ],
)
def test_the_gpu_that_is_there(monkeypatch, platform, capability, version, expected):
    client = types.SimpleNamespace(platform_version=platform)
    device = types.SimpleNamespace(client=client, device_kind="", compute_capability=capability)
    library = types.SimpleNamespace(check_cudnn_version=lambda: version)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    monkeypatch.setattr(gpus.importlib, "import_module", lambda name: library)
    gpus._own_gpu.cache_clear()
    q = jax.ShapeDtypeStruct((2, 196, 3, 200), jnp.bfloat16)
    reason = cudnn.misfit(q, q, q)
    gpus._own_gpu.cache_clear()
    assert reason is None if expected is None else reason.startswith(expected)


@pytest.mark.parametrize(
    ("capability", "version", "expected"),
    [
        ((8, 0), 91200, "head dim 200 is above 128"),
        ((9, 0), 91200, None),
        ((7, 0), 91200, "no NVIDIA GPU"),
        ((9, 0), None, "no NVIDIA GPU"),
    ],
)
def test_the_gpu_that_is_assumed(capability, version, expected):
    q = jax.ShapeDtypeStruct((2, 196, 3, 200), jnp.bfloat16)
    with cudnn.assumed(gpus.Gpu("NVIDIA A100", capability, version)):
        reason = cudnn.misfit(q, q, q)
    assert reason is None if expected is None else reason.startswith(expected)


def test_lowers_for_a_gpu_that_is_not_there():
    """What was traced without cuDNN before is traced again."""
    q = jax.ShapeDtypeStruct((2, 65, 3, 32), jnp.bfloat16)

    @jax.jit
    def form():
        return cudnn.available()

    assert not form()
    with cudnn.assumed():
        assert form()
        fn = functools.partial(differentiated, ops.dot_product_attention)
        exported = export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=KERNELS)(q, q, q)
    text = exported.mlir_module()
    assert "__cudnn$fmhaSoftmaxBackward" in text and "66x3x32" in text


AXES = [axes for axes in itertools.product((0, None), repeat=3) if axes != (None, None, None)]


@pytest.mark.parametrize("length", [64, 65])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_gradients_under_vmap(length, axes):
    """jax's own rule takes neither arguments nor gradients of the output that are not mapped."""
    inputs = [
        jax.ShapeDtypeStruct((2, length, 3, 32), jnp.bfloat16)
        if axis is None
        else jax.ShapeDtypeStruct((3, 2, length, 3, 32), jnp.bfloat16)
        for axis in axes
    ]

    def loss(*args):
        return jnp.sum(cudnn.attend(*args, scale=0.3))

    mapped = jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), in_axes=axes)
    with cudnn.assumed():
        lowered = jax.jit(mapped).trace(*inputs).lower(lowering_platforms=("cuda",))
    assert "__cudnn$fmhaSoftmaxBackward" in lowered.as_text()


def test_values_under_vmap(by_xla):
    q, k, v = (normal(seed, 2, 9, 3, 8) for seed in range(3))
    queries = jnp.stack([q, q + 1])
    fn = functools.partial(differentiated, functools.partial(cudnn.attend, scale=0.3))
    mapped = jax.vmap(fn, in_axes=(0, None, None))(queries, k, v)
    single = [fn(one, k, v) for one in queries]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *single)
    chex.assert_trees_all_close(mapped, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_jax_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(cudnn, "LIBRARY", "jax._src.cudnn.renamed")
    with pytest.raises(RuntimeError, match="asks for cuDNN in an unknown way"), cudnn.assumed():
        pass

"""LayerNorm, GroupNorm and BatchNorm against float64 formulas, kernels, and flax's modules."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.kernels import layer_norm as kernels
from tokenvit_jax.layers import BatchNorm, LayerNorm

RNG = np.random.default_rng(0)
EPSILON = 0.01


def normal(*shape):
    return RNG.normal(size=shape)


def normalized(x, scale, bias, axes):
    """The definition, in the type of x."""
    x = x - x.mean(axes, keepdims=True)
    return x / jnp.sqrt((x * x).mean(axes, keepdims=True) + EPSILON) * scale + bias


def near(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.astype(float), b, rtol=tolerance, atol=tolerance)


def residual(x, branch, factors, scale, bias):
    """LayerNorm of a sum, by definition: the sum, and its LayerNorm."""
    if branch is not None:
        x = x + (branch if factors is None else factors[:, None, None] * branch)
    return x, normalized(x, scale, bias, -1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("form", ["alone", "sum", "factors"])
def test_layer_norm_and_its_kernel(form, dtype, monkeypatch):
    """3 x 13 tokens of 12 channels: neither fills a block of 4 tokens and 16 channels."""
    monkeypatch.setattr(kernels, "_VALUES", 64)
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)  # of 10 blocks
    branch = None if form == "alone" else normal(3, 13, 12)
    factors = np.array([2.0, 0.0, 1.5]) if form == "factors" else None
    args = (2 + normal(3, 13, 12), branch, factors, normal(12), normal(12))
    cotangents = normal(3, 13, 12), normal(3, 13, 12)
    x, _, factors, scale, _ = args = jax.tree.map(lambda a: jnp.asarray(a, dtype), args)
    cotangents = jax.tree.map(lambda a: jnp.asarray(a, dtype), cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), (args, cotangents))
        expected, pull = jax.vjp(jax.jit(residual), *wide[0])
        gradients = jax.tree.map(np.asarray, pull(wide[1]))
    expected = jax.tree.map(np.asarray, expected)
    tolerance = 2e-5 if dtype == jnp.float32 else 0.1

    if form == "factors":  # they have no gradient
        gradients = (*gradients[:2], np.zeros(3), *gradients[3:])

    def add(x, branch, factors, *args):
        return ops.add_layer_norm(x, branch, *args, epsilon=EPSILON, factors=factors)

    results, pull = jax.vjp(jax.jit(add), *args)
    near(results, expected, tolerance)
    near(pull(cotangents), gradients, tolerance)

    total, y, mean, inverse = kernels.forward_pass(
        *args, epsilon=EPSILON, dtype=dtype, interpret=True
    )
    near(results, (x if total is None else total, y), 1e-6 if dtype == jnp.float32 else 0.02)
    near((total, y), expected[1] if form == "alone" else expected, tolerance)
    dx, dbranch, sums = kernels.backward_pass(
        results[0], cotangents[1], cotangents[0], factors, scale, mean, inverse, interpret=True
    )
    near((dx, *sums[0]), (gradients[0], *gradients[-2:]), tolerance)
    assert (dbranch is None) == (factors is None)
    near(dbranch, gradients[1] if form == "factors" else None, tolerance)


def grouped(x, scale, bias):
    """GroupNorm of four groups, by definition."""
    groups = x.reshape(*x.shape[:-1], 4, -1)
    y = normalized(groups, 1.0, 0.0, (1, 2, 4))
    return y.reshape(x.shape) * scale + bias


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_group_norm(dtype):
    """The map is not square, and the images have different means."""
    x = normal(2, 5, 3, 12) + 2 * np.arange(2)[:, None, None, None]
    args = tuple(jnp.asarray(a, dtype) for a in (x, normal(12), normal(12)))
    cotangent = jnp.asarray(normal(*x.shape), dtype)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), (args, cotangent))
        expected, pull = jax.vjp(jax.jit(grouped), *wide[0])
        gradients = jax.tree.map(np.asarray, pull(wide[1]))
    norm = functools.partial(ops.group_norm, num_groups=4, epsilon=EPSILON)
    y, pull = jax.vjp(jax.jit(norm), *args)
    tolerance = 2e-5 if dtype == jnp.float32 else 0.1
    assert y.dtype == dtype
    near((y, *pull(cotangent)), (np.asarray(expected), *gradients), tolerance)
    with pytest.raises(UserError, match="num_groups=5 does not divide 12 channels; valid: div"):
        ops.group_norm(*args, num_groups=5, epsilon=EPSILON)


@pytest.mark.parametrize(
    "norm",
    [
        functools.partial(ops.layer_norm, epsilon=EPSILON),
        functools.partial(ops.group_norm, num_groups=2, epsilon=EPSILON),
        lambda *args: ops.batch_norm(*args, epsilon=EPSILON)[0],
    ],
    ids=["layer", "group", "batch"],
)
def test_gradients_have_the_types_of_the_parameters(norm):
    """Otherwise a parameter in bfloat16 could not be used twice, nor in a scan."""
    x = jnp.asarray(normal(2, 3, 4), jnp.bfloat16)
    parameters = jnp.ones(4, jnp.bfloat16), jnp.zeros(4, jnp.bfloat16)

    def loss(scale, bias):
        y, _ = jax.lax.scan(lambda x, _: (norm(x, scale, bias), None), x, length=2)
        return jnp.sum(y * scale)

    gradients = jax.grad(loss, (0, 1))(*parameters)
    assert {g.dtype for g in gradients} == {x.dtype}


def test_layer_norm_alone():
    """The module equals flax's bit for bit; without a sum nothing is added to the gradient."""
    x = jnp.asarray(2 + normal(2, 5, 12), jnp.float32)
    scale, bias = jnp.asarray(normal(12), jnp.float32), jnp.asarray(normal(12), jnp.float32)
    variables = {"params": {"scale": scale, "bias": bias}}
    for dtype in (jnp.float32, jnp.bfloat16):
        ours = jax.jit(LayerNorm(EPSILON, dtype).apply)(variables, x)
        theirs = jax.jit(nn.LayerNorm(EPSILON, dtype).apply)(variables, x)
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, theirs)

    def alone(x):
        return ops.layer_norm(x, scale, bias, epsilon=EPSILON)

    def beside(x):
        return ops.add_layer_norm(x, None, scale, bias, epsilon=EPSILON)[1]

    (dx,), (expected,) = (jax.vjp(jax.jit(fn), x)[1](x * x) for fn in (alone, beside))
    np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize("with_gelu", [False, True], ids=["plain", "gelu"])
def test_batch_norm(with_gelu):
    args = 2 + normal(8, 3, 5), normal(5), normal(5)
    dy = normal(8, 3, 5)

    def naive(x, scale, bias):
        x = jax.nn.gelu(x, approximate=False) if with_gelu else x
        return normalized(x, scale, bias, (0, 1))

    def ours(x, scale, bias, axis_name=None):
        options = {"epsilon": EPSILON, "axis_name": axis_name, "with_gelu": with_gelu}
        return ops.batch_norm(x, scale, bias, **options)

    def both(fn, *args):
        y, pull, *stats = jax.vjp(fn, *args, has_aux=fn is not naive)
        return (y, *stats), pull

    with jax.enable_x64(True):
        y, pull = jax.vjp(jax.jit(naive), *args)
        expected = jax.tree.map(np.asarray, (y, pull(jnp.asarray(dy))))
    args = [jnp.asarray(a, jnp.float32) for a in args]
    dy = jnp.asarray(dy, jnp.float32)

    def step(x, scale, bias, dy, axis_name=None):
        def fn(*args):
            y, *stats = ours(*args, axis_name)
            return y, stats

        y, pull, stats = jax.vjp(fn, x, scale, bias, has_aux=True)
        dx, *parameters = pull(dy)
        return y, dx, parameters, stats

    y, dx, parameters, (mean, var) = jax.jit(step)(*args, dy)
    near((y, (dx, *parameters)), expected, 2e-5)
    values = jax.nn.gelu(args[0], approximate=False) if with_gelu else args[0]
    near((mean, var), (values.mean((0, 1)), values.var((0, 1))), 2e-6)

    # The batch divided over a mapped axis: gradients of parameters are sums of the parts.
    parts = [a.reshape(4, 2, *a.shape[1:]) for a in (args[0], dy)]
    mapped = jax.vmap(lambda x, dy: step(x, *args[1:], dy, "devices"), axis_name="devices")
    y, dx, parameters, stats = mapped(*parts)
    near((y.reshape(8, 3, 5), dx.reshape(8, 3, 5)), (expected[0], expected[1][0]), 2e-5)
    near([a.sum(0) for a in parameters], expected[1][1:], 2e-5)
    near([a[0] for a in stats], (mean, var), 1e-5)


def test_batch_norm_equals_flax():
    x = jnp.asarray(2 + normal(4, 3, 5), jnp.float32)
    theirs = nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=jnp.bfloat16)
    ours = BatchNorm(dtype=jnp.bfloat16)
    variables = theirs.init(jax.random.key(0), x, use_running_average=False)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((a == b).all()),
            variables,
            ours.init(jax.random.key(1), x, use_running_average=False),
        )
    )
    for running in (False, True):
        results = [
            m.apply(variables, x, use_running_average=running, mutable=["batch_stats"])
            for m in (ours, theirs)
        ]
        jax.tree.map(np.testing.assert_array_equal, *results)


def test_one_all_reduce_each_way():
    """Under jit over a mesh, the statistics travel in one message in each direction."""
    mesh = jax.make_mesh((8,), ("data",))
    place = functools.partial(jax.sharding.NamedSharding, mesh)

    def step(x, scale, bias, dy):
        y, pull = jax.vjp(
            jax.jit(lambda *a: ops.batch_norm(*a, epsilon=EPSILON)[0]), x, scale, bias
        )
        return y, pull(y * dy)

    shapes = [((16, 5), P("data")), ((5,), P()), ((5,), P()), ((16, 5), P("data"))]
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=place(p)) for s, p in shapes]
    text = jax.jit(step).lower(*args).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 2


def test_layer_norm_over_a_mesh():
    """Each form returns one sum per device; tracing compares their shapes."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, dy = (jnp.asarray(normal(16, 3, 12), jnp.float32) for _ in range(2))
    scale = jnp.asarray(normal(12), jnp.float32)

    def gradients(x, scale, dy):
        layer = functools.partial(ops.layer_norm, epsilon=EPSILON)
        return jax.vjp(layer, x, scale, scale)[1](dy)

    def on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(*args)

    placed = [jax.device_put(a, jax.sharding.NamedSharding(mesh, P("data"))) for a in (x, dy)]
    results = jax.jit(on_mesh)(placed[0], scale, placed[1])
    near(results, jax.jit(gradients)(x, scale, dy), 1e-5)

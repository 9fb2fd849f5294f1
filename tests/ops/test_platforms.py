"""The choice between the forms of an operator, under jit over a mesh, pmap, vmap and shard_map."""

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tokenvit_jax.kernels import cudnn, forms, gpus, platforms


@pytest.fixture
def operator(monkeypatch):
    """An operator that has a kernel; its name."""
    monkeypatch.setitem(forms.FORMS, "double", {"default": "adds", "cuda": "a kernel"})
    return "double"


def test_form_without_a_description(operator):
    with pytest.raises(KeyError, match="double"):
        platforms.by_platform(operator, jnp.ones(2), default=lambda x: x)


def test_forms_have_an_order(monkeypatch):
    """A program that differed from process to process would miss the compilation cache."""
    names = ["cpu", "cuda", "tpu"]
    monkeypatch.setitem(forms.FORMS, "double", dict.fromkeys(["default", *names], ""))
    order = lambda *_, default, **given: list(given)  # noqa: E731
    monkeypatch.setattr(platforms.lax, "platform_dependent", order)
    run = dict.fromkeys(["default", *names], jnp.negative)
    assert platforms.by_platform("double", jnp.ones(2), **run) == names


def misfits_of(operator, *args, **options):
    double = lambda x, *_: x + x  # noqa: E731
    with platforms.noted_misfits() as misfits:
        result = platforms.by_platform(operator, *args, default=double, cuda=double, **options)
    np.testing.assert_array_equal(result, 2 * args[0])
    return [(misfit.platform, misfit.reason, misfit.shapes) for misfit in misfits]


def test_misfits(operator):
    x = jnp.ones((2, 3))
    assert misfits_of(operator, x) == []
    assert misfits_of(operator, x, misfits={"cuda": "3 is odd"}) == [
        ("cuda", "3 is odd", ((2, 3),))
    ]
    with jax.enable_x64(True):
        assert misfits_of(operator, jnp.ones(2, jnp.float64)) == [("cuda", "float64", ((2,),))]


def test_default_forms_only(operator):
    """A function under jit is traced anew in the context, and again without kernels only there."""
    kernel = lambda x: 3 * x  # noqa: E731
    run = jax.jit(
        lambda x: platforms.by_platform(operator, x, default=lambda x: x + x, cuda=kernel)
    )

    def branches():
        return "platform_index" in str(run.trace(jnp.ones(2)).jaxpr)

    assert branches()
    with platforms.default_forms():
        assert not branches()
    assert branches()


class Device(NamedTuple):
    platform: str
    version: str = ""

    @property
    def client(self):
        return types.SimpleNamespace(platform_version=self.version)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (jax.devices("cpu")[0], ["default"]),
        (Device("gpu", "PJRT C API\nNVIDIA H100 80GB HBM3"), ["cuda"]),
        (Device("gpu", "PJRT C API\nrocm 60202"), ["default"]),
        (Device("tpu"), ["default"]),
    ],
)
def test_only_the_forms_of_a_device(operator, device, expected):
    """What was traced for any device is not taken for one, nor the other way round."""
    traced = []

    def form(name):
        return lambda x: traced.append(name) or 2 * x

    forms = {"default": form("default"), "cuda": form("cuda")}
    run = jax.jit(lambda x: platforms.by_platform(operator, x, **forms))
    run.trace(jnp.ones(2))
    with platforms.traced_for(device):
        run.trace(jnp.ones(2))
    run.trace(jnp.ones(2))
    assert traced == ["cuda", "default", *expected]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), ["compute capability 7.5 is below 8.0"]), ((8, 0), []), ((12, 0), [])],
)
def test_old_gpu(operator, capability, expected):
    with cudnn.assumed(gpus.Gpu("NVIDIA", capability, 91200)):
        found = misfits_of(operator, np.ones((2, 3), np.float32))
    assert [reason for _, reason, _ in found] == expected


def mesh_of(devices):
    return jax.make_mesh((devices // 2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def in_mesh(mesh, fn):
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return jax.jit(traced)


def test_kernels_see_the_part_of_a_device():
    """Under jit over a mesh, with arguments that all images share and in a vmap."""
    mesh = mesh_of(8)
    seen = []

    def kernel(x, weight):
        seen.append(x.shape)
        return x * weight, x.sum(0, keepdims=True)

    x = jnp.arange(48.0).reshape(16, 3)
    x = jax.device_put(x, jax.NamedSharding(mesh, P(("data", "fsdp"))))
    weight = jnp.arange(3.0)

    def run(x, weight):
        y, sums = platforms.on_each_device(kernel, shared=(1,))(x, weight)
        return y, sums.sum(0), sums.shape

    run_in_mesh = in_mesh(mesh, lambda x, weight: run(x, weight)[:2])
    y, sums = run_in_mesh(x, weight)
    assert seen == [(2, 3)]
    np.testing.assert_array_equal(y, np.arange(48.0).reshape(16, 3) * np.arange(3.0))
    np.testing.assert_array_equal(sums, np.arange(48.0).reshape(16, 3).sum(0))
    assert y.sharding.is_equivalent_to(x.sharding, 2)
    text = run_in_mesh.lower(x, weight).compile().as_text()
    assert "all-gather" not in text and text.count("all-reduce(") == 1

    stacked = in_mesh(mesh, jax.vmap(lambda x: run(x, weight)[0], 1, 1))
    np.testing.assert_array_equal(stacked(jnp.stack([x, x], 1))[:, 1], y)


def test_no_argument_has_a_batch():
    """Such a function may return what has no batch axis either."""
    run = platforms.on_each_device(lambda x, y: x.sum() + y.sum(), shared=(0, 1))
    assert in_mesh(mesh_of(8), run)(jnp.ones(3), jnp.ones(5)) == 8


def test_device_batch():
    assert platforms.device_batch(16) == 16
    found = []

    def note(x):
        found.append((platforms.num_devices(), platforms.device_batch(16)))
        found.append((platforms.num_devices(), platforms.device_batch(9)))
        return x

    in_mesh(mesh_of(8), note)(jnp.ones(8))
    assert found == [(8, 2), (8, 9)]
    found.clear()
    jax.pmap(note)(jnp.ones((8, 1)))
    assert set(found) == {(1, 16), (1, 9)}
    found.clear()
    mapped = functools.partial(jax.shard_map, in_specs=P("data"), out_specs=P("data"))
    in_mesh(mesh_of(8), mapped(note, mesh=mesh_of(8), check_vma=False))(jnp.ones(8))
    assert set(found) == {(1, 16), (1, 9)}


def test_kernels_off(operator, monkeypatch):
    kernel, plain = (lambda x: x + 1), (lambda x: x)
    run = functools.partial(platforms.by_platform, operator, default=plain, cuda=kernel)
    assert "platform_index" in str(jax.make_jaxpr(run)(1.0 * jnp.ones(2)))
    monkeypatch.setenv("TOKENVIT_JAX_KERNELS", "off")
    assert "platform_index" not in str(jax.make_jaxpr(lambda x: run(x))(jnp.ones(2)))


class Traces(list):
    """A list that a kernel may hold: it has a hash."""

    __hash__ = object.__hash__


def test_equal_kernels_are_traced_once(operator):
    traces = Traces()

    def kernel(x, *, factor, held=None):
        traces.append(factor)
        return x * factor if held is None else x * factor + held

    def closure(factor, held):
        return lambda x: kernel(x, factor=factor, held=held)

    def step(x):
        for factor in (2, 2, 3):
            for form in (functools.partial(kernel, factor=factor), closure(factor, None)):
                x = platforms.by_platform(operator, x, default=lambda x: x, cuda=form)
        for form in (closure(2, jnp.zeros(2)), closure(2, jnp.zeros(2))):  # arrays are not compared
            x = platforms.by_platform(operator, x, default=lambda x: x, cuda=form)
        return x

    jax.make_jaxpr(step)(jnp.ones(2))
    assert traces == [2, 2, 2, 2, 3, 3, 2, 2]
    for times in (1, 2):  # nothing is kept after the context
        traces.clear()
        with platforms.kernels_traced_once():
            jax.make_jaxpr(lambda x, times=times: step(x))(jnp.ones(2))
        assert traces == [2, 2, 3, 3, 2, 2]

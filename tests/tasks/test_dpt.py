"""DPT against the published code: every part, gradients, clusters; and its own parts.

The arrays of `golden/dpt_hybrid.npz` are of isl-org/DPT with timm 0.4.12, and with clusters of
Expedit-DPT, for a small hybrid with random weights. Its soft reconstruction is not in that code,
which only copies the nearest centre.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from sampled import sampled

from experiments.depth.counts import REPORTED, ROWS, count, count_parameters, dpt_hybrid
from experiments.expedite.published import dpt_saving
from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import DptHead
from tokenvit_jax.models import create_model
from tokenvit_jax.models.backbone import Tap
from tokenvit_jax.tasks.depth.model import Dpt, check_host, default_blocks, make_dpt
from tokenvit_jax.weights import LAYOUTS, export_variables, import_variables

LAYOUT = LAYOUTS["dpt"]["vit"]
GOLDEN = {
    name: x.astype(np.float32)
    for name, x in np.load(Path(__file__).parent / "golden" / "dpt_hybrid.npz").items()
}
STEM = {"first": 8, "widths": (16, 32, 64), "depths": (1, 1, 2), "num_groups": 4}
# The arrays of depth have 1000 times the inverse depth of the network.
SCALE, SHIFT = 6.016e-05 * 1000, 0.00579
# Settings of the arrays with clusters.
CASES = [
    {"alpha": 1, "beta": 3, "clusters": (2, 3), "window": 3, "iterations": 2, "temperature": 1.0},
    {"alpha": 2, "beta": 2, "clusters": (3, 3), "temperature": 50.0},
    {"alpha": 1, "beta": 3, "clusters": (5, 2), "window": 3, "iterations": 3, "temperature": 4.0},
]


def hybrid(expedite=None):
    """Returns the network of the arrays; it reads blocks 1 and 3 of four."""
    backbone = create_model(
        "vit_b_r50", dim=32, depth=4, num_heads=4, stem=STEM, position_size=(64, 64),
        expedite=expedite,
    )  # fmt: skip
    return Dpt(backbone, DptHead(12, (16, 32, 24, 20)), (1, 3), SCALE, SHIFT, invert=True)


@functools.cache
def variables():
    arrays = {name.removeprefix("w/"): x for name, x in GOLDEN.items() if name.startswith("w/")}
    return import_variables(arrays, hybrid(), LAYOUT)


def channels_last(x):
    return x.transpose(0, 2, 3, 1)


def near(found, expected, tolerance=2e-5):
    """Compares relative to the largest value."""
    found = np.asarray(found).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def decoded(model, variables, images):
    """Returns the taps, and the output of the decoder."""

    def run(model, images):
        taps = model.backbone.taps(images, False, model.blocks, (0, 1))
        return taps, model.head(taps, images.shape[1:3], train=False)

    return model.apply(variables, images, method=run)


def tokens(tap):
    """Returns a tap as the published code has it: the class token, then the patches."""
    return jnp.concatenate([tap.front, tap.map.reshape(1, -1, tap.map.shape[-1])], 1)


def test_the_network_and_its_gradients():
    model, images = hybrid(), channels_last(GOLDEN["0/image"])

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(variables):
        taps, y = decoded(model, variables, images)
        return jnp.log1p(y).mean(), (taps, y, model.to_depth(y))

    gradients, (taps, y, depth) = run(variables())
    assert all(tap.front is None for tap in taps[:2])
    for tap, name in zip(taps[:2], ("stage1", "stage2"), strict=True):
        near(tap.map, channels_last(GOLDEN[f"0/{name}"]))
    for tap, name in zip(taps[2:], ("block1", "block3"), strict=True):
        near(tokens(tap), GOLDEN[f"0/{name}"])
    near(y, GOLDEN["0/inverse_depth"])
    assert depth.dtype == jnp.float32
    near(depth[:, ::4, ::4], GOLDEN["0/depth"], 1e-4)
    names = [name for name in GOLDEN if name.startswith("grad/")]
    arrays = export_variables(gradients, model, LAYOUT)
    assert len(names) == 13
    for name in names:
        near(arrays[name.removeprefix("grad/")], GOLDEN[name], 1e-4)


@pytest.mark.parametrize(("number", "mode"), sampled([(0, "hard"), (1, "hard"), (2, "soft")]))
def test_clusters(number, mode):
    """Each tap behind the clustering is reconstructed; in case 1, the first tap lies before it."""
    neighbors = {"neighbors": 4} if mode == "soft" else {}
    model = hybrid(CASES[number] | {"mode": mode} | neighbors)
    images = channels_last(GOLDEN["expedite/image"])
    taps, y = jax.jit(functools.partial(decoded, model))(variables(), images)
    kind = {"hard": "released", "soft": "soft"}[mode]
    for tap, name in zip(taps[2:], ("tap3", "tap4"), strict=True):
        near(tokens(tap), GOLDEN[f"expedite/{number}/{name}_{kind}"], 1e-4)
    near(y[:, ::4, ::4], GOLDEN[f"expedite/{number}/inverse_depth_{kind}"], 1e-4)


def test_a_smaller_image_gives_maps_of_the_full_size():
    model = hybrid({"alpha": 0, "beta": 4, "clusters": (2, 4), "mode": "bilinear"})
    images = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    taps, y = jax.eval_shape(functools.partial(decoded, model), variables(), images)
    assert [tap.map.shape[1:3] for tap in taps] == [(16, 24), (8, 12), (4, 6), (4, 6)]
    assert y.shape == (1, 64, 96)


# ------------------------------------------------------------------------------------------------
# Size and cost
# ------------------------------------------------------------------------------------------------


def test_parameters():
    """With the arrays on which no depth depends, there are 123,146,985."""
    assert sum(count_parameters(dpt_hybrid()).values()) == 121_196_289


@pytest.mark.parametrize(
    ("size", "products"),
    sampled([((480, 640), 279.573), ((352, 1216), 404.051)]),
    ids=["nyu", "kitti"],
)
def test_costs_as_reported(size, products):
    """The network without clusters, and the released settings."""
    plain = count(size)
    assert plain.published_macs / 1e9 == pytest.approx(products, abs=6e-4)
    assert plain.counted == pytest.approx(REPORTED[size], abs=0.1)
    rows = [row for row in ROWS if row.image_size == size]
    assert len(rows) == 3
    for row in rows:
        reported = REPORTED[size] - row.reported
        assert plain.counted - dpt_saving(row) == pytest.approx(reported, abs=0.1)


@pytest.mark.slow
def test_products_with_clusters():
    (row,) = (row for row in ROWS if row.alpha == 3)
    assert count(row.image_size, row).macs / 1e9 == pytest.approx(190.331, abs=6e-4)


# ------------------------------------------------------------------------------------------------
# Plain hosts, settings, and bad input
# ------------------------------------------------------------------------------------------------


def config(**entries):
    settings = {"dim": 16, "depth": 4, "num_heads": 2, "patch_size": 4, "position_size": (32, 32)}
    return ConfigDict(
        {
            "model": "deit_ti",
            "model_overrides": settings,
            "head_overrides": {"channels": 4, "last_channels": 3},
            "dtype": "float32",
            "depth": {"scale": 2.0, "shift": 0.5, "invert": False},
        }
        | entries
    )


@pytest.mark.slow
def test_plain_hosts_and_depth_that_is_not_inverted():
    model = make_dpt(config(), None)
    assert model.blocks == (0, 1, 2, 3) and model.multiple == 8
    images = jax.random.normal(jax.random.key(1), (2, 32, 40, 3))

    @jax.jit
    def run(key):
        variables = model.init(key, images)
        return variables, model.apply(variables, images)

    variables, depth = run(jax.random.key(0))
    assert depth.shape == (2, 32, 40)
    # The first weights of the last layer let the gradient through.
    assert (depth > 0.5).all()
    np.testing.assert_allclose(model.to_depth(jnp.arange(3)), [0.5, 2.5, 4.5], rtol=1e-6)
    kernel = variables["params"]["head"]["fusion_1_skip"]["conv1"]["kernel"]
    bound = 1 / math.sqrt(9 * 4)
    assert 0.9 * bound < np.abs(kernel).max() <= bound  # PyTorch's default


def test_the_readout_joins_the_class_token():
    """Readout, 1 x 1 convolution and level in float64, for the only level without resizing."""
    rng = np.random.default_rng(0)
    x, front = rng.normal(size=(1, 2, 4, 6)), rng.normal(size=(1, 2, 6))
    head, taps = DptHead(4, (4, 4, 5, 4)), [Tap(x, front)] * 4

    @jax.jit
    def run(key):
        variables = head.init(key, taps, (8, 16), train=False)
        is_level = lambda module, _: module.name == "level_3"  # noqa: E731
        _, state = head.apply(variables, taps, (8, 16), train=False, capture_intermediates=is_level)
        return variables, state["intermediates"]["level_3"]["__call__"][0]

    variables, found = run(jax.random.key(0))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    joined = np.concatenate([x, np.broadcast_to(front[:, None, :1], x.shape)], -1)
    z = joined @ p["readout_3"]["kernel"] + p["readout_3"]["bias"]
    z = 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    z = z @ p["project_3"]["kernel"][0, 0] + p["project_3"]["bias"]
    z = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = p["level_3"]["kernel"]
    expected = sum(z[:, i : i + 2, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_metric_depth_has_a_largest_value():
    model = hybrid()
    np.testing.assert_allclose(model.to_depth(jnp.zeros(1)), 1 / SHIFT, rtol=1e-6)
    np.testing.assert_allclose(model.clone(shift=0.0).to_depth(jnp.zeros(1)), 1e8, rtol=1e-6)


def test_default_blocks_are_the_published_ones():
    assert default_blocks(12) == (2, 5, 8, 11) and default_blocks(24) == (5, 11, 17, 23)
    assert default_blocks(12, 2) == (8, 11) and default_blocks(2) == (0, 0, 0, 1)
    assert make_dpt(config(model="vit_b_r50", model_overrides={}), None).blocks == (8, 11)


def test_bad_input():
    with pytest.raises(UserError, match=r"images are 64 x 80; valid: height and width in mul.* 32"):
        hybrid().init(jax.random.key(0), jnp.zeros((1, 64, 80, 3)))
    with pytest.raises(UserError, match=r"config.model='swin_t' is not valid: .*; valid: deit_b, "):
        check_host(config(model="swin_t"))
    with pytest.raises(
        UserError, match=r"DptHead has no setting 'chanels' .did you mean 'channels'"
    ):
        make_dpt(config(head_overrides={"chanels": 3}), None)
    backbone = hybrid().backbone
    for blocks, stages, message in (
        ((4,), (), "block=4 has no tap; valid: 0 to 3"),
        ((3,), (3,), "stage=3 has no tap; valid: 0 to 2"),
    ):
        with pytest.raises(UserError, match=message):
            backbone.taps(jnp.zeros((1, 64, 64, 3)), False, blocks, stages)
    with pytest.raises(UserError, match="stage=0 has no tap; valid: none, without a stem"):
        create_model("vit_ti").taps(jnp.zeros((1, 64, 64, 3)), stages=(0,))
    with pytest.raises(UserError, match=r"stem\.depths=\(1,\) is not valid .*; valid: 3 numbers"):
        create_model("vit_b_r50", stem={"depths": (1,)})
    with pytest.raises(UserError, match=r"stem\.num_groups=48 does not divide 64 .*; valid: div"):
        create_model("vit_b_r50", stem={"num_groups": 48})
    with pytest.raises(UserError, match=r"patch_size=8 is not valid with a stem .*; valid: mul"):
        create_model("vit_b_r50", patch_size=8)

"""Parameters of the published Mask2Formers, and costs by the rules of the released code."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from sampled import sampled

from experiments.masks.published import (
    ADE20K_SEMANTIC,
    BACKBONE_SIZE,
    CENTERS,
    EXPEDITE,
    NETWORKS,
    PLAIN_GMACS,
    PRODUCTS,
    RELEASED,
    WINDOW,
    backbone_macs,
    decoder_macs,
    expedite_of,
    model_of,
    network_gmacs,
    pixel_decoder_macs,
    semantic_gmacs,
)
from tokenvit_jax.heads.masked_decoder import SEEN
from tokenvit_jax.layers import AddLayerNorm, LayerNorm
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.ops.counted import MAC_FORMULAS, PREFIX

BY_NAME = {network.name: network for network in NETWORKS}
# Parameters of the backbone with four norms, of the pixel decoder, and of the decoder of queries.
BACKBONE, PIXEL_DECODER = 195_201_204, 5_790_144
DECODERS = {
    "COCO panoptic": 14_544_262,
    "COCO instance": 14_530_641,
    "ADE20K semantic": 14_497_431,
    "ADE20K panoptic": 14_548_631,
    "ADE20K instance": 14_535_781,
}
SIZE, DIMS = (96, 160), (192, 384, 768, 1536)


def images(size):
    return jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@functools.cache
def shapes(name):
    model = model_of(BY_NAME[name])
    return model, variable_shapes(model, images((32, 32)))["params"]


def head_macs(name, method, *inputs, train=False, **options):
    model, params = shapes(name)
    apply = functools.partial(
        model.head.apply,
        method=lambda head, *x: getattr(head, method)(*x, *((train,) * (method == "decoder"))),
    )
    return count_macs(apply, {"params": params["head"]}, *inputs, **options)


@pytest.mark.parametrize("name", sampled(DECODERS))
def test_parameters(name):
    _, params = shapes(name)
    head = params["head"]
    assert count(head["pixel_decoder"]) == PIXEL_DECODER
    assert count(head["decoder"]) == DECODERS[name]
    total = count(params)
    assert total == BACKBONE + PIXEL_DECODER + DECODERS[name]
    published = BY_NAME[name].params_m
    if published is not None:
        assert total / 1e6 == pytest.approx(published, abs=0.5)


def test_totals():
    totals = {name: BACKBONE + PIXEL_DECODER + size for name, size in DECODERS.items()}
    assert list(totals.values()) == [
        215_535_610, 215_521_989, 215_488_779, 215_539_979, 215_527_129,
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Costs by the rules of the released code
# ------------------------------------------------------------------------------------------------

# Location of the clustering -> 10^9 multiply-adds of the backbone at 1152 x 1152, to two digits.
COUNTED = {
    "COCO panoptic": {9: 662.68, 10: 684.00},
    "COCO instance": {11: 705.33, 12: 726.66},
    "ADE20K panoptic": {14: 768.80},
    "ADE20K semantic": {7: 620.02},
}


def test_backbone():
    gmacs = backbone_macs(BACKBONE_SIZE) / 1e9
    assert gmacs == pytest.approx(936.86, abs=0.005)
    assert round(gmacs) == PLAIN_GMACS


@pytest.mark.parametrize("row", EXPEDITE, ids=lambda row: row.name)
def test_expedited_backbone(row):
    found = {
        location: backbone_macs(BACKBONE_SIZE, location=location, iterations=row.iterations) / 1e9
        for location in (row.counted_location, row.location)
    }
    assert found == pytest.approx(COUNTED[row.name], abs=0.005)
    assert found[row.counted_location] == pytest.approx(row.gmacs, abs=0.34)


def test_a_block_on_centres_saves_as_much_everywhere():
    costs = [backbone_macs(BACKBONE_SIZE, location=i, iterations=5) / 1e9 for i in range(5, 22)]
    for fewer, more in zip(costs[1:], costs[:-1], strict=True):
        assert fewer - more == pytest.approx(21.33, abs=0.005)


def test_networks():
    """The published digits; the counts to three digits leave a residual below 0.005."""
    size, published = ADE20K_SEMANTIC
    semantic, panoptic = BY_NAME["ADE20K semantic"], BY_NAME["COCO panoptic"]
    assert backbone_macs(size) / 1e9 == pytest.approx(327.315, abs=0.001)
    assert pixel_decoder_macs(size, DIMS) / 1e9 == pytest.approx(56.707, abs=0.001)
    assert decoder_macs(size, semantic) / 1e9 == pytest.approx(12.097, abs=0.002)
    assert network_gmacs(size, semantic) == pytest.approx(396.145, abs=0.005)
    assert semantic_gmacs(size, semantic) == pytest.approx(403.1, abs=0.05)
    assert round(semantic_gmacs(size, semantic)) == published
    assert network_gmacs((800, 1088), panoptic) == pytest.approx(830.97, abs=0.005)
    assert network_gmacs((800, 1216), panoptic) == pytest.approx(943.25, abs=0.005)


# ------------------------------------------------------------------------------------------------
# The products of the model that runs
# ------------------------------------------------------------------------------------------------


def features(size=SIZE):
    cells = [(side[0], side[1]) for side in ((size[0] // s, size[1] // s) for s in (4, 8, 16, 32))]
    maps = [
        jax.ShapeDtypeStruct((1, *cell, dim), jnp.float32)
        for cell, dim in zip(cells, DIMS, strict=True)
    ]
    model, params = shapes("ADE20K semantic")
    apply = functools.partial(model.head.apply, method=lambda head, x: head.pixel_decoder(x))
    return maps, jax.eval_shape(apply, {"params": params["head"]}, maps)


@pytest.mark.slow
def test_products_of_the_backbone():
    """Without padding, which the released code also passes through the last layer of attention."""
    size = (384, 384)
    model, params = shapes("ADE20K semantic")
    apply = functools.partial(model.backbone.apply, train=False, method="features")
    macs = count_macs(apply, {"params": params["backbone"]}, images(size))
    assert macs == backbone_macs(size, PRODUCTS)


def norm_elements(backbone, variables, size):
    """Returns the number of elements that the LayerNorms of a backbone and its maps normalise."""
    run = functools.partial(
        backbone.apply, train=False, method="features", capture_intermediates=is_norm, mutable=True
    )
    maps, state = jax.eval_shape(run, variables, images(size))
    found = jax.tree.leaves(state["intermediates"], is_leaf=lambda x: isinstance(x, tuple))
    # A norm of a residual sum returns the sum as well.
    return sum(math.prod(jax.tree.leaves(x)[-1].shape) for x in (*maps, *found))


def is_norm(module, method):
    return method == "__call__" and isinstance(module, LayerNorm | AddLayerNorm)


@pytest.mark.parametrize(
    ("row", "location"),
    sampled(
        [
            (None, 0),
            *((row, at) for row in EXPEDITE for at in sorted({row.location, row.counted_location})),
        ],
        keep=(0, 1),
    ),
    ids=lambda value: getattr(value, "name", value),
)
def test_the_network_has_the_reported_costs(row, location):
    """Products and norms of the network that runs; clustering and resizing by the released rules.

    The network's own products of clustering and of resizing tables do not count. The sum equals the
    rules for the whole backbone exactly, so the residual of the published number, below 0.34, is
    that of the rules.
    """
    name = "COCO panoptic"
    backbone = model_of(BY_NAME[name], row and expedite_of(row, location)).backbone
    variables = {"params": shapes(name)[1]["backbone"]}
    macs = RELEASED.norm * norm_elements(backbone, variables, BACKBONE_SIZE)
    own = [name.removeprefix(PREFIX) for name in MAC_FORMULAS]
    own = [name for name in own if name.startswith(("cluster_superpixels", "reconstruct_tokens"))]
    run = functools.partial(backbone.apply, train=False, method="features")
    macs += count_macs(run, variables, images(BACKBONE_SIZE), leave_out=tuple(own))
    if row:
        swin = backbone.settings
        heads, dim = swin.num_heads[2], swin.dims[2]
        tokens = math.prod(side // 16 for side in BACKBONE_SIZE)  # of the third stage
        blocks = sum(swin.depths[:3]) - location
        old, new = 2 * WINDOW - 1, 2 * CENTERS - 1
        macs -= blocks * heads * (new * old**2 + new**2 * old)
        macs += blocks * heads * RELEASED.resize * new**2
        macs += tokens * dim * (RELEASED.pool + 2 * (row.iterations + 1) * CENTERS**2)
        assert macs == backbone_macs(BACKBONE_SIZE, location=location, iterations=row.iterations)
    else:
        assert macs == backbone_macs(BACKBONE_SIZE)
    if row is None or location == row.counted_location:
        assert macs / 1e9 == pytest.approx(row.gmacs if row else PLAIN_GMACS, abs=0.34)


def test_products_of_the_pixel_decoder():
    maps, _ = features()
    macs = head_macs("ADE20K semantic", "pixel_decoder", maps)
    assert macs == pixel_decoder_macs(SIZE, DIMS, PRODUCTS)


def test_products_of_the_decoder():
    """All predictions cost as published, and less after the last layer alone."""
    network, (_, found) = BY_NAME["ADE20K semantic"], features()
    expected = decoder_macs(SIZE, network, PRODUCTS, cross_logits=True)
    run = functools.partial(head_macs, "ADE20K semantic", "decoder", found)
    assert run(train=True, leave_out=(SEEN,)) == expected
    seen = run(train=True) - expected
    cells = [3 * 5, 6 * 10, 12 * 20]
    assert seen == 3 * sum(cells) * 100 * 256
    # Nine of ten masks and classes are not computed.
    saved = 9 * 100 * 256 * (24 * 40 + 151)
    assert run(train=False) == expected + seen - saved

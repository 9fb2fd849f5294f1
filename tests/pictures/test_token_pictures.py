"""Pictures of tokens show the right groups, clusters and superpixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokenvit_jax as tv
from tokenvit_jax.pictures.draw import COLORS, tint
from tokenvit_jax.pictures.tokens import (
    Clustering,
    Routing,
    color_regions,
    finest_routing,
    plot_clusters,
    plot_groups,
    plot_superpixels,
    stage_clusterings,
    superpixels,
)

rng = np.random.default_rng(0)


def block(length, top_k, *, mark=0, heads=2, num_groups=3):
    groups = np.full((1, heads, length), mark % num_groups)
    keys = rng.integers(length, size=(1, heads, num_groups, top_k))
    return {"attention": {"groups": (groups,), "keys": (keys,)}}


def test_finest_routing_takes_the_last_block_that_selects():
    intermediates = {
        "stages_0_0": block(8 * 12, 96),  # every key is selected
        "stages_1_9": block(4 * 6, 5, mark=0),
        "stages_1_10": block(4 * 6, 5, mark=1),
        "stages_2_0": block(2 * 3, 5, mark=2),
    }
    routing = finest_routing(intermediates, (32, 48))
    assert routing.grid == (4, 6)
    assert routing.groups.shape == (1, 2, 24)
    assert np.all(routing.groups == 1)
    assert routing.keys.shape == (1, 2, 3, 5)


def test_finest_routing_of_sides_that_the_stride_does_not_divide():
    assert finest_routing({"b": block(9 * 13, 5)}, (33, 49)).grid == (9, 13)


@pytest.mark.parametrize("intermediates", [{}, {"stages_0_0": block(64, 64)}])
def test_finest_routing_without_selection(intermediates):
    assert finest_routing(intermediates, (32, 32)) is None


def test_plot_groups_shows_the_largest_groups():
    images = rng.integers(256, size=(2, 32, 48, 3), dtype=np.uint8)
    groups = np.zeros((2, 2, 96), int)
    groups[:, 1, :20], groups[:, 1, 20:50] = 3, 1  # head 1: sizes 46, 30, 0, 20
    keys = np.tile(np.arange(7), (2, 2, 4, 1))
    routing = Routing(groups, keys, (8, 12))
    figure = plot_groups(images, routing, ["a", "b"], head=1, num_groups=3)
    titles = [axis.get_title() for axis in figure.axes]
    pairs = [t for size in (46, 30, 20) for t in (f"{size} queries", "their 7 keys")]
    assert titles == ["a", *pairs, "b", *pairs]
    shown = figure.axes[3].images[0].get_array()
    expected = tint(images[0], np.arange(20, 50), (8, 12), COLORS[1])
    np.testing.assert_array_equal(shown, expected)
    assert len(figure.artists) == 6  # a frame around each pair


def test_plot_groups_with_fewer_groups_than_asked_for():
    routing = Routing(np.zeros((1, 1, 64), int), np.zeros((1, 1, 1, 5), int), (8, 8))
    figure = plot_groups(np.zeros((1, 32, 32, 3), np.uint8), routing, ["a"])
    assert [axis.get_title() for axis in figure.axes] == ["a", "64 queries", "their 5 keys"]


def test_stage_clusterings_are_those_of_the_last_blocks():
    noted = lambda n, mark: {"attention": {"clusters0": (np.full((1, n), mark),)}}  # noqa: E731
    intermediates = {
        "stages_1_9": noted(24, 9),
        "stages_1_10": noted(24, 10),
        "stages_0_0": noted(96, 0),
    }
    found = stage_clusterings(intermediates, (32, 48))
    assert [clustering.grid for clustering in found] == [(8, 12), (4, 6)]
    assert [clustering.assignment[0, 0] for clustering in found] == [0, 10]
    assert stage_clusterings({}, (32, 48)) == []


def test_plot_clusters_shows_regions_and_the_largest_clusters():
    image = rng.integers(256, size=(32, 48, 3), dtype=np.uint8)
    assignment = np.repeat([3, 0, 7], (14, 4, 6))
    coarser = Clustering(np.array([[1, 1, 1, 0, 0, 0]]), (2, 3))
    clusterings = [Clustering(assignment[None], (4, 6)), coarser]
    figure = plot_clusters(image, clusterings, "a", num_clusters=4)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "a", "4 x 6 tokens\n3 clusters", "14 tokens", "6 tokens", "4 tokens",
        "", "2 x 3 tokens\n2 clusters", "3 tokens", "3 tokens", "",
    ]  # fmt: skip
    # A single cluster has the colour that it has in the map, where it is the last row of tokens.
    regions, single = (figure.axes[i].images[0].get_array() for i in (1, 3))
    np.testing.assert_array_equal(single[24:], regions[24:])
    assert (single[:24] != regions[:24]).all(-1).mean() > 0.9


def test_color_regions_gives_each_cluster_one_colour():
    colored = color_regions(np.full((8, 8, 3), 100, np.uint8), np.array([0, 1, 1, 2]), (2, 2))
    corners = colored[[0, 0, 7, 7], [0, 7, 0, 7]]
    np.testing.assert_array_equal(corners[1], corners[2])
    assert len(np.unique(colored.reshape(-1, 3), axis=0)) == 3


def test_superpixels_are_the_nearest_centres_where_the_model_clusters():
    model = tv.create_model(
        "vit_ti", dim=8, depth=3, num_heads=2, mlp_ratio=1, patch_size=8, position_size=(32, 48),
        init_std=0.5, expedite={"alpha": 2, "beta": 1, "clusters": (2, 3)},
    )  # fmt: skip
    images = jnp.asarray(rng.normal(size=(2, 32, 48, 3)), jnp.float32)

    @jax.jit
    def find(images):
        variables = model.init(jax.random.key(0), images, train=False)
        _, state = model.apply(variables, images, train=False, capture_intermediates=True)
        tokens, _ = state["intermediates"]["blocks_1"]["__call__"][0]
        centers = model.settings.expedite.cluster(tokens[:, 1:], (4, 6))
        return tokens[:, 1:], centers, superpixels(model, variables, images).assignment

    tokens, centers, found = find(images)
    distances = np.linalg.norm(tokens[:, :, None] - centers[:, None], axis=-1)
    np.testing.assert_array_equal(found, distances.argmin(-1))
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize(
    ("name", "expedite"),
    [
        ("vit_ti", None),
        ("vit_ti", {"alpha": 0, "beta": 12, "clusters": (2, 2), "mode": "bilinear"}),
        ("swin_t", None),
    ],
)
def test_no_superpixels_of_a_model_that_clusters_no_patches(name, expedite):
    model = tv.create_model(name, expedite=expedite)
    assert superpixels(model, {}, jnp.zeros((1, 64, 64, 3))) is None


def test_plot_superpixels_draws_borders_and_mean_colours():
    image = np.zeros((8, 12, 3), np.uint8)
    image[:, :4] = 90
    clustering = Clustering(np.array([[0, 5, 5, 0, 0, 5]]), (2, 3))
    figure = plot_superpixels(image, clustering, "a")
    left, right = figure.axes
    assert [left.get_title(), right.get_title()] == ["a", "2 x 3 patches, 2 superpixels"]
    (lines,) = left.collections
    segments = {tuple(map(tuple, segment + 0.5)) for segment in lines.get_segments()}
    assert segments == {((4, 0), (4, 4)), ((8, 4), (8, 8)), ((4, 4), (8, 4))}
    means = right.images[0].get_array()
    assert means[0, 0].tolist() == means[7, 7].tolist() == [60] * 3  # two patches of 90, one of 0
    assert means[0, 11].tolist() == [0] * 3


def test_superpixels_of_padding_are_not_drawn():
    image = rng.integers(256, size=(5, 12, 3), dtype=np.uint8)  # in a window of 12 x 12
    clustering = Clustering(np.array([[0, 1, 0, 1, 1, 0, 2, 3, 4]]), (3, 3))
    left, right = plot_superpixels(image, clustering, "x" * 299, (12, 12)).axes
    assert len(left.get_title()) < 120 and left.get_title()[-1] == "x"
    assert right.get_title() == "2 x 3 patches, 2 superpixels"
    ends = np.concatenate(left.collections[0].get_segments()) + 0.5
    assert ends.max(0).tolist() == [8, 8] and left.get_ylim() == (4.5, -0.5)
    assert right.images[0].get_array().shape == (5, 12, 3)

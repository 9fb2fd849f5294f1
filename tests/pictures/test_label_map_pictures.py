"""Pictures of a segmentation show and hold its labels."""

import io

import numpy as np
from PIL import Image

from tokenvit_jax.pictures.draw import as_rgb, distinct_colors
from tokenvit_jax.pictures.label_maps import class_shares, label_image, plot_segmentation

rng = np.random.default_rng(0)


def test_plot_segmentation_names_the_classes_that_occur():
    image = rng.integers(256, size=(8, 10, 3), dtype=np.uint8)
    labels = np.zeros((8, 10), int)
    labels[:2], labels[2, :4] = 3, 1
    assert class_shares(labels) == [(0, 0.7), (3, 0.25), (1, 0.05)]
    figure = plot_segmentation(image, labels, ["$a_b_c$", "car", "bus", "_road"], "$x_y_z$.png")
    legend = figure.axes[2].get_legend()
    assert legend.get_title().get_text() == "share of the pixels"
    assert [text.get_text() for text in legend.get_texts()] == [
        "$a_b_c$: 70.0%", "_road: 25.0%", "car: 5.0%"
    ]  # fmt: skip
    assert [axis.get_title() for axis in figure.axes] == ["$x_y_z$.png", "prediction", ""]
    figure.savefig(io.BytesIO())  # no name is read as a formula
    expected = 0.45 * image[2, 0].mean() + 0.55 * distinct_colors(4)[1]
    np.testing.assert_allclose(figure.axes[1].images[0].get_array()[2, 0], expected, atol=1)


def test_the_picture_of_a_strip_is_not_as_long():
    image, labels = np.zeros((2, 9000, 1), np.uint8), np.zeros((2, 9000), int)
    figure = plot_segmentation(as_rgb(image), labels, ["sky"], "a")
    assert figure.get_figwidth() < 30
    assert figure.axes[0].images[0].get_array().shape == (1, 1000, 3)


def test_grey_and_transparent_images_are_shown_as_rgb():
    grey = rng.integers(256, size=(2, 3, 1), dtype=np.uint8)
    np.testing.assert_array_equal(as_rgb(grey), np.tile(grey, 3))
    np.testing.assert_array_equal(
        as_rgb(np.array([[[9, 5, 1, 255], [9, 5, 1, 0]]], np.uint8)), [[[9, 5, 1], [255, 255, 255]]]
    )


def test_label_image_holds_the_labels():
    labels = rng.integers(150, size=(8, 10))
    file = io.BytesIO()
    label_image(labels, 150).save(file, "png")
    image = Image.open(file)
    np.testing.assert_array_equal(np.asarray(image), labels)
    colors = distinct_colors(150)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colors[labels])
    assert len(np.unique(colors, axis=0)) == 150

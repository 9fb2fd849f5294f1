"""Pictures of a segmentation show and hold its labels."""

import io

import numpy as np
from PIL import Image

from tokenvit_jax.pictures.draw import distinct_colors
from tokenvit_jax.tasks.segmentation.inference import class_shares
from tokenvit_jax.tasks.segmentation.pictures import label_image, plot_segmentation

rng = np.random.default_rng(0)


def test_plot_segmentation_names_the_classes_that_occur():
    image = rng.integers(256, size=(8, 10, 3), dtype=np.uint8)
    labels = np.zeros((8, 10), int)
    labels[:2], labels[2, :4] = 3, 1
    assert class_shares(labels) == [(0, 0.7), (3, 0.25), (1, 0.05)]
    figure = plot_segmentation(image, labels, ["sky", "car", "bus", "road"])
    legend = figure.axes[2].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "sky: 70.0%", "road: 25.0%", "car: 5.0%"
    ]  # fmt: skip
    expected = 0.45 * image[2, 0].mean() + 0.55 * distinct_colors(4)[1]
    np.testing.assert_allclose(figure.axes[1].images[0].get_array()[2, 0], expected, atol=1)


def test_label_image_holds_the_labels():
    labels = rng.integers(150, size=(8, 10))
    file = io.BytesIO()
    label_image(labels, 150).save(file, "png")
    image = Image.open(file)
    np.testing.assert_array_equal(np.asarray(image), labels)
    colors = distinct_colors(150)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colors[labels])
    assert len(np.unique(colors, axis=0)) == 150

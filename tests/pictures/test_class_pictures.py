"""Pictures of a classification show the most probable classes."""

import io

import numpy as np

from tokenvit_jax.tasks.classification.pictures import plot_classes


def test_plot_classes():
    classes = [("$a_b_c$", 0.75), ("_dog", 0.125)]
    figure = plot_classes(np.zeros((32, 24, 3), np.uint8), classes, "cost $5_a_b$.png")
    left, axis = figure.axes
    assert left.get_title() == "cost $5_a_b$.png" and axis.get_title("left") == "probability"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["$a_b_c$", "_dog"]
    assert [bar.get_width() for bar in axis.patches] == [0.75, 0.125]
    assert axis.patches[0].get_y() > axis.patches[1].get_y()  # the first class is on top
    figure.savefig(io.BytesIO())  # no name is read as a formula

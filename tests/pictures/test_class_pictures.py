"""Pictures of a classification show the most probable classes."""

import numpy as np

from tokenvit_jax.tasks.classification.pictures import plot_classes


def test_plot_classes():
    figure = plot_classes(np.zeros((32, 32, 3), np.uint8), [("cat", 0.75), ("dog", 0.125)])
    axis = figure.axes[1]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
    assert [bar.get_width() for bar in axis.patches] == [0.75, 0.125]
    assert axis.patches[0].get_y() > axis.patches[1].get_y()  # the first class is on top

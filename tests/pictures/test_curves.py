"""Learning curves show the logged metrics."""

import numpy as np
import pytest

from tokenvit_jax.errors import UserError
from tokenvit_jax.pictures.curves import plot_learning_curve


def test_learning_curve():
    records = [
        {"step": 10, "loss": 2.0},
        {"step": 20, "loss": 1.0},
        {"step": 20, "eval/accuracy": 0.5, "eval/loss": 1.5},
    ]
    loss, accuracy = plot_learning_curve(records).axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[10, 2.0], [20, 1.0]])
    np.testing.assert_array_equal(accuracy.lines[0].get_xydata(), [[20, 50.0]])
    assert len(plot_learning_curve(records[:2]).axes) == 1


def test_learning_curve_without_metrics():
    with pytest.raises(UserError, match="neither 'loss' nor 'eval/accuracy' was logged"):
        plot_learning_curve([{"step": 1, "data/skipped": 0}])

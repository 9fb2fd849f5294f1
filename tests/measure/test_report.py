"""Tables and plots of measurements."""

import numpy as np

from tokenvit_jax.measure import report

ROWS = [
    {
        "length": length, "heads": 2, "path": "tiles", "eq7": length / 100, "mode": mode,
        "speedup": None if length == 64 else 2.0,
        "contenders": {
            "einsum": {"median_ms": None if length == 64 else 1234.5, "temp_mib": 0.5},
            "heads_first": {"median_ms": 20.0, "temp_mib": 1.0},
            "group": {"median_ms": 10.0, "temp_mib": 2.0},
        },
    }
    for length in (16, 64) for mode in ("forward", "train")
]  # fmt: skip


def test_table():
    header, first, *_, last = report.format_table(ROWS).splitlines()
    assert len(header) == len(first) == len(last)
    assert " ".join(first.split()) == "16 2 tiles 0.16 forward 2 1234 20 10 0.5 1 2"
    assert " ".join(last.split()) == "64 2 tiles 0.64 train - - 20 10 0.5 1 2"


def test_a_contender_may_be_missing_from_a_row():
    rows = [{**row, "contenders": {**row["contenders"]}} for row in ROWS[:2]]
    del rows[1]["contenders"]["heads_first"]
    *_, last = report.format_table(rows).splitlines()
    assert " ".join(last.split()) == "16 2 tiles 0.16 train 2 1234 - 10 0.5 - 2"


def test_curve():
    time_axis, speedup_axis = report.plot_cost(ROWS).axes
    group = time_axis.lines[-1]
    np.testing.assert_array_equal(group.get_xydata(), [[16, 5.0], [64, 5.0]])  # ms per head
    measured, promised = speedup_axis.lines[1:3]
    np.testing.assert_array_equal(measured.get_ydata(), [2.0, np.nan])
    np.testing.assert_array_equal(promised.get_ydata(), [0.16, 0.64])
    assert len(report.plot_cost(ROWS[::2]).axes[0].lines) == 3  # one mode

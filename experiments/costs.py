"""Compares parameters and multiply-adds of models with the published ones, for papers' tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

import tokenvit_jax as tv
from experiments import pages
from tokenvit_jax.measure.macs import Summary, summarize_model
from tokenvit_jax.published import Published

IMAGENET_SIZE = (224, 224)


class Cost(NamedTuple):
    """A row of :func:`cost_table`.

    Attributes:
      label: first cell.
      counted: parameters and multiply-adds counted here.
      published: the paper's figures.
      top1: accuracy [%] as text.
    """

    label: Any
    counted: Summary
    published: Published
    top1: str


def count_macs(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Counts the multiply-adds of one image.

    Args:
      model: the module.
      image_size: height and width [pixels].
    """
    return summarize_model(model, image_size, "").macs


def cost(label: Any, name: str, published: Published, overrides: Mapping = {}) -> Cost:
    """Counts a model at 224 x 224 pixels.

    Args:
      label: first cell of its row.
      name: name of the model.
      published: the paper's figures.
      overrides: settings of the model by name.
    """
    model = tv.create_model(name, **overrides)
    counted = summarize_model(model, IMAGENET_SIZE, name)
    return Cost(label, counted, published, str(published.top1))


def cost_table(column: str, rows: Iterable[Cost], *, as_published: bool = False) -> list[str]:
    """Returns the lines of a table of costs.

    Args:
      column: heading of the labels.
      rows: the models.
      as_published: whether to add the multiply-adds that the paper counts.
    """
    counted = ["GMACs", "as published"] if as_published else ["GMACs"]
    columns = [column, "parameters, M", "published", *counted, "published", "published top-1"]

    def cells(row):
        macs = [row.counted.macs, row.counted.macs_as_published][: len(counted)]
        return [
            row.label,
            f"{row.counted.params / 1e6:.3f}",
            f"{row.published.params_m:g}",
            *(f"{count / 1e9:.3f}" for count in macs),
            f"{row.published.gmacs:g}",
            row.top1,
        ]

    return pages.table(columns, map(cells, rows))


def model_table(names: Sequence[str], columns: Mapping[str, Callable]) -> list[str]:
    """Returns the lines of a table of models and their attributes.

    Args:
      names: names of the models.
      columns: heading -> function of a model that returns its cell.
    """
    models = {name: tv.create_model(name) for name in names}
    return pages.table(
        ["model", *columns],
        (
            [f"`{name}`", *(cell(model) for cell in columns.values())]
            for name, model in models.items()
        ),
    )


def listed(values: Iterable[Any]) -> str:
    """Joins values with commas."""
    return ", ".join(map(str, values))

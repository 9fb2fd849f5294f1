"""The prediction of a label map, for tasks that give every pixel a class."""

from collections.abc import Callable, Sequence

import numpy as np

from tokenvit_jax.tasks.task import Picture, Prediction, by_class, describe_shares


def label_map_prediction(
    labels: np.ndarray, names: Sequence[str], draw: Callable[[str], dict[str, Picture]]
) -> Prediction:
    """Returns a label map with the shares of its classes.

    Args:
      labels: class of every pixel (H, W).
      names: names of the classes.
      draw: function from a caption to pictures by name.
    """
    from tokenvit_jax.pictures.label_maps import class_shares  # matplotlib: drawing only

    shares = dict(class_shares(labels))
    values = [shares.get(label, 0.0) for label in range(len(names))]
    text = describe_shares([(names[label], share) for label, share in shares.items()])
    return Prediction({"labels": labels}, {"shares": by_class(names, values)}, text, draw)

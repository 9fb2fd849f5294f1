"""Draws the records that are kept for evaluation."""

import hashlib
from collections.abc import Sequence


def num_held_out(size: int, share: float) -> int:
    """Returns how many of `size` names :func:`held_out` draws."""
    return max(round(share * size), 1) if size > 1 else 0


def held_out(names: Sequence[str], share: float, seed: int) -> set[str]:
    """Draws the names that are kept for evaluation.

    The draw follows a hash of the seed and the name: it does not depend on the order of the names,
    and names that are added later change it little.

    Args:
      names: distinct names of records.
      share: share of the names; the number is rounded, and at least one of two or more is drawn.
      seed: seed of the draw.
    """

    def key(name: str) -> bytes:
        # Names of files may have bytes that are not UTF-8.
        return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()

    order = sorted(names, key=key)
    return set(order[: num_held_out(len(names), share)])

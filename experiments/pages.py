"""Writes the pages of the experiments: Markdown paragraphs and tables, means and spreads."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tokenvit_jax.measure.report import markdown_table

table = markdown_table
ROOT = Path(__file__).parent.parent


def heading(title: str, script: str, text: str) -> list[str]:
    """Returns the first lines of a page: its title, the command that writes it, and a text.

    Args:
      title: title of the page.
      script: `__file__` of the script that writes it.
      text: text after the command, in the same paragraph.
    """
    module = ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)
    return [f"# {title}", "", *paragraph(f"Written by `python -m {module}`. {text}")]


def paragraph(text: str) -> list[str]:
    """Returns the lines of a paragraph, which ignore line breaks of the text."""
    return textwrap.wrap(" ".join(text.split()), 96, break_on_hyphens=False)


def mean_and_std(values: Sequence[float]) -> str:
    """Formats the mean of values over seeds and, for several seeds, their standard deviation."""
    return f"{np.mean(values):.3f}{_std(values)}"


def signed_mean_and_std(differences: Sequence[float]) -> str:
    """Formats the mean of differences over seeds and their standard deviation."""
    return f"{np.mean(differences):+.3f}{_std(differences)}"


def percentage(shares: Sequence[float]) -> str:
    """Formats shares over seeds as :func:`mean_and_std` does, in percent."""
    percent = 100 * np.asarray(shares)
    return f"{percent.mean():.1f}" + (f" ± {percent.std(ddof=1):.1f}" if len(percent) > 1 else "")


def _std(values: Sequence[float]) -> str:
    return f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""


def write(script: str, lines: Sequence[str], figure: Figure | None = None) -> None:
    """Writes a page and its plot into the folder of the script, and prints the page.

    Args:
      script: `__file__` of NAME.py; the page is NAME.md and the plot NAME.png.
      lines: the page.
      figure: the plot, if there is one.
    """
    text = "\n".join(lines) + "\n"
    Path(script).with_suffix(".md").write_text(text)
    if figure is not None:
        figure.savefig(Path(script).with_suffix(".png"), dpi=120)
    print(text)

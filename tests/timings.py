"""Numbers in logs that differ between runs, because they depend on time."""

NAMES = ("images_per_second", "data/wait", "eval/images_per_second")


def without_timings(line: dict[str, float]) -> dict[str, float]:
    """Returns a line of `metrics.jsonl` without the numbers that depend on time."""
    return {name: value for name, value in line.items() if name not in NAMES}

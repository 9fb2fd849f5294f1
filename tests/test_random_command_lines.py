"""Random command lines that must be refused; `tests/stress` has more, and plausible ones."""

from command_lines import run_lines


def test_nothing_meaningless_is_accepted(tmp_path, monkeypatch):
    assert run_lines(1, 60, tmp_path, monkeypatch, only_meaningless=True) == []

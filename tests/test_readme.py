"""The facts of the README and of the pages in docs/: keys, flags, links and counts of models."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from exact_counts import EXACT
from flax.traverse_util import flatten_dict
from shipped_configs import load_config

import tokenvit_jax as tv
from tokenvit_jax import cli
from tokenvit_jax.ahead.targets import parse_target
from tokenvit_jax.config_keys import list_settings
from tokenvit_jax.measure.macs import format_known
from tokenvit_jax.published import PUBLISHED
from tokenvit_jax.tasks import create_task
from tokenvit_jax.training.validate import check_task

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.md"))
FOLDERS = sorted({page.parent for page in EXPERIMENTS})
# Together these configs have the entries of all tasks and model families.
CONFIGS = [
    ("dgt_t", ""),
    ("pale_t", "tokens"),
    ("deit_s", "search"),
    ("segmenter_ti", ""),
    ("dpt", "kitti"),
    ("mask_rcnn", "swin_t"),
    ("htc", "swinv2_l"),
    ("mask2former", "scenes"),
    ("pose", "figures"),
]


def test_length():
    assert len(README.splitlines()) <= 250


def test_configuration_keys_exist():
    known = set()
    for name, arg in CONFIGS:
        config = load_config(name, arg)
        known |= {*flatten_dict(config.to_dict(), sep="."), *list_settings(config)}
    groups = {key.split(".")[0] for key in known if "." in key} - {"model_overrides"}
    text = "\n".join(page.read_text() for page in PAGES)
    flags = set(re.findall(r"--config\.([a-z_.\d]+)=", text))
    named = set(re.findall(rf"`((?:{'|'.join(groups)})\.[\w.]+)`", text))
    assert len(flags) > 4 and len(named) > 4
    assert flags | named <= known


def test_flags_exist():
    commands = [
        command
        for page in PAGES
        for command in re.findall(
            r"(?:python -m tokenvit_jax\.|tokenvit )([a-z]+)\b((?:[^\n`]*\\\n)*[^\n`#]*)",
            page.read_text(),
        )
    ]
    assert len(commands) > 20
    for name, arguments in commands:
        known = {*importlib.import_module(f"tokenvit_jax.{name}").FLAGS, "help"}
        for flag in re.findall(r"--([a-z]\w*)", arguments):
            assert flag in known, (name, flag)


def test_commands_for_many_devices_are_valid(monkeypatch):
    """With all values: entries of the configuration, targets and numbers of processes."""
    text = (ROOT / "docs" / "scale_out.md").read_text().replace("$JOB_COMPLETION_INDEX", "0")
    pattern = r"(?:python -m tokenvit_jax\.|tokenvit )([a-z]+)((?:\s+(?:\\\s+)?--[^\s`\"]+)+)"
    commands = [
        (name, re.findall(r"--[^\s`\"]+", rest)) for name, rest in re.findall(pattern, text)
    ]
    assert [name for name, _ in commands] == ["train"] * 5 + ["compile"] * 3
    monkeypatch.chdir(ROOT)
    for name, arguments in commands:
        module = importlib.reload(importlib.import_module(f"tokenvit_jax.{name}"))
        module.FLAGS([name, *arguments])
        config = cli.read_config(module.FLAGS)
        check_task(create_task(config), training=True)
        if name == "compile":
            parse_target(module.FLAGS.target)
        else:
            assert module.FLAGS.workdir
        importlib.reload(module)  # its flags are not parsed again


@pytest.mark.parametrize("name", tv.list_models())
def test_model_row(name):
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", MODELS, re.MULTILINE)
    (params, macs, _), paper = EXACT[name], PUBLISHED.get(name)
    known = (
        [f"{paper.params_m:g} M", format_known(paper.gmacs), f"{paper.top1}"] if paper else [""] * 3
    )
    cells = [f"{params:,}", known[0], f"{macs / 1e9:.3f}", *known[1:]]
    assert [cell.strip() for cell in row.split("|")] == cells


@pytest.mark.parametrize("page", PAGES + EXPERIMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_linked_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor


def test_all_pages_are_linked_from_the_readme():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README, page.name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_all_pages_of_an_experiment_are_linked_from_its_readme(folder):
    """The navigation of the documentation lists only the README of each folder."""
    text = (folder / "README.md").read_text()
    for page in {*folder.glob("*.md")} - {folder / "README.md"}:
        assert f"]({page.name})" in text, page.name


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("settings", [(), ("EXTRA=cuda",)], ids=["plain", "extra"])
def test_commands_of_the_makefile_are_whole(settings):
    """The shell can read every line that a target runs."""
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"(?m)^\.PHONY: (.*)$", text)[1].split()
    for target in targets:
        call = ["make", "--dry-run", "--always-make", "-C", ROOT, target, *settings]
        lines = subprocess.run(call, capture_output=True, text=True, check=True).stdout
        assert "pytest" in lines or "test" not in target
        subprocess.run(["sh", "-n"], input=lines, text=True, check=True)

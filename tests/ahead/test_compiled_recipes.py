"""The page of compiled recipes."""

import pytest
from shipped_configs import FOLDER

from experiments import compiled_recipes
from tokenvit_jax.ahead.targets import parse_target
from tokenvit_jax.recipes.compiled import BOUNDS


def test_page_shows_the_stored_rows_and_the_bounds():
    rows = compiled_recipes.read_rows()
    assert rows
    text = "\n".join(compiled_recipes.page(rows)) + "\n"
    assert text == compiled_recipes.PAGE.read_text()  # else: compiled_recipes page


def test_a_row_that_does_not_fit_shows_its_memory():
    row = dict(compiled_recipes.read_rows()[0], fits=False)
    cells = list(compiled_recipes._cells(row))
    assert cells[3] == "does not fit" and len(cells) == 12


def test_floors_with_and_without_instructions_are_told_apart():
    old = {"recipe": "a", "target": "h100"}
    new = {"recipe": "b", "target": "h100", "limits": {}}
    mixed = " ".join(compiled_recipes._floors([old, new]))
    assert "`a`" in mixed and "`b`" not in mixed
    assert compiled_recipes._floors([new]) == []
    assert compiled_recipes._floors([old | {"target": "v5e:16x16"}]) == []


def test_every_file_is_a_recipe_and_every_bound_is_one():
    recipes = compiled_recipes.recipes()
    assert {recipe.split(":")[0] for recipe in recipes} == {
        path.stem for path in FOLDER.glob("*.py")
    }
    assert set(BOUNDS) <= set(recipes)
    for bounds in BOUNDS.values():
        for target, bound in bounds.items():
            assert parse_target(target).num_devices == 1
            assert (bound.memory_gib or 0) * 2**30 <= parse_target(target).device.memory


def test_every_family_has_bounds_for_a_gpu_and_a_tpu():
    for family in (
        "dgt_t",
        "clustr_t",
        "pale_t",
        "deit_s",
        "deit_s:level3",
        "swin_t",
        "segmenter_s",
    ):
        platforms = {parse_target(target).device.platform for target in BOUNDS[family]}
        assert platforms == {"cuda", "tpu"}


@pytest.mark.parametrize(
    ("recipe", "target", "expected"),
    [
        ("dgt_t", "h100", [128, 64, 32, 16, 8, 4, 2]),
        ("dgt_t", "v5e:16x16", [4, 2]),
        ("segmenter_s", "h100", [8, 4, 2, 1]),
        ("segmenter_s", "v5e:16x16", [1]),
        # Images of a group stay together on a device.
        ("htc:swinv2_l", "h100x8", [8, 4, 2]),
        ("htc:swinv2_l", "v5e:16x16", [2]),
    ],
)
def test_batches(recipe, target, expected):
    assert compiled_recipes.batches(recipe, target) == expected


@pytest.mark.parametrize(
    ("largest", "estimate", "expected"),
    [(16, 16, [16]), (4, 5, [16, 4]), (2, 5, [16, 4, 2]), (0, 1, [16, 2])],
)
def test_the_largest_batch_that_fits_is_compiled(largest, estimate, expected, monkeypatch):
    tried = []

    def run(recipe, target, batch):
        tried.append(batch)
        return {"fits": batch <= largest, "estimated_largest_batch_per_device": estimate}

    monkeypatch.setattr(compiled_recipes, "batches", lambda recipe, target: [16, 8, 4, 2])
    monkeypatch.setattr(compiled_recipes, "run", run)
    assert compiled_recipes.compile_row("recipe", "target")["fits"] == (largest > 0)
    assert tried == expected


def test_efficiency_is_the_share_of_the_step_without_collectives():
    row = {"floor_seconds": 0.4, "collective_seconds": 0.2, "batch_size": 8}
    speed = {"low": 8 / (0.4 / 0.4 + 0.2), "high": 8 / (0.4 / 0.5 + 0.2), "bound": 8 / 0.6}
    assert compiled_recipes._efficiency(row | {"images_per_second": speed}) == "80 to 83"
    unknown = speed | {"low": None, "high": None}
    assert compiled_recipes._efficiency(row | {"images_per_second": unknown}) == "67"

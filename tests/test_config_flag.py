"""The flag --config: files and names of configs, overrides of any setting, the list of entries."""

import sys

import pytest
from absl import flags
from ml_collections import FieldReference

from tokenvit_jax import config_flag
from tokenvit_jax.config import Entry, make_config
from tokenvit_jax.tasks import TASKS, default_config, entries_of

from tokenvit_jax.valid import whole


@pytest.fixture
def parse(monkeypatch):
    """Returns the configuration of a command line."""

    def parse_arguments(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        flag_values = flags.FlagValues()
        config_flag.define(flag_values)
        flag_values(sys.argv)
        return flag_values["config"].value

    return parse_arguments


def test_a_name_and_a_path_of_a_shipped_config_work_in_any_folder(parse, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    by_name, by_path = parse("--config=dgt_t:digits"), parse("--config=configs/dgt_t.py:digits")
    assert by_name.dataset == "digits"
    assert by_name.to_dict() == by_path.to_dict()
    assert parse("--config=dgt_t").dataset == "imagenet2012"
    # An own file of this path comes first.
    text = "from tokenvit_jax.tasks import default_config\n"
    text += "def get_config():\n    return default_config('segmentation')\n"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dgt_t.py").write_text(text)
    assert parse("--config=configs/dgt_t.py").task == "segmentation"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dgt_tt", "--config=dgt_tt: no such file, and no config has this name (did you mean 'dg"),
        ("other/dgt_t.py", "--config=other/dgt_t.py: no such file"),
        ("", "--config=: no such file"),
        ("/", "--config=/: no such file"),
    ],
)
def test_unknown_config_is_named(parse, text, message):
    with pytest.raises(flags.Error) as error:
        parse(f"--config={text}")
    assert message in str(error.value)


def test_settings_that_a_config_does_not_have_can_be_set(parse):
    config = parse(
        "--config=deit_ti:digits",
        "--config.model_overrides.qk_norm=fixed",
        "--config.model_overrides.dropout=0.25",
        "--config.model_overrides.distilled",
        "--config.model_overrides.depth=2",
        "--config.model_overrides.token_reducer.method=tome",
        "--config.model_overrides.token_reducer.keep=(9, 3)",
        "--config.model_overrides.expedite.alpha=1",
    )
    found = config.model_overrides.to_dict()
    assert (found["qk_norm"], found["dropout"], found["distilled"]) == ("fixed", 0.25, True)
    assert found["depth"] == 2
    assert found["token_reducer"] == {"method": "tome", "keep": (9, 3)}
    assert found["expedite"] == {"alpha": 1}
    assert "pool" not in found  # only what was given
    head = parse("--config=segmenter_ti:scenes", "--config.head_overrides.mlp_ratio=2")
    assert head.head_overrides.mlp_ratio == 2


def test_settings_are_those_of_the_chosen_model(parse):
    changed = "--config=dgt_t:digits", "--config.model=deit_ti"
    assert parse(*changed, "--config.model_overrides.pool=mean").model_overrides.pool == "mean"
    with pytest.raises(flags.Error, match=r"model_overrides\.pool is not a key"):
        parse(changed[0], "--config.model_overrides.pool=mean")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model_overrides.qk_nrm", "did you mean 'model_overrides.qk_norm'?"),
        ("model_overrides.token_reducer.kep", "did you mean 'model_overrides.token_reducer.keep'?"),
        ("model_overrides.num_classes", "not a key"),  # the dataset determines them
        ("model_overrides.dtype", "not a key"),
        ("model_overrides.depth.x", "not a key"),
        ("batch_sise", "did you mean 'batch_size'?"),
        ("zzz", "--help lists all keys"),
        ("head", "config.head is an entry of the tasks: segmentation"),
    ],
)
def test_wrong_key_is_named(parse, key, message):
    with pytest.raises(flags.Error) as error:
        parse("--config=deit_ti:digits", f"--config.{key}=1")
    assert str(error.value).startswith(f"--config.{key} is not a key of the configuration; ")
    assert message in str(error.value)


@pytest.mark.parametrize("arguments", [["--config.model_overrides.depth=x"], ["--config.seed=1.5"]])
def test_wrong_value_is_named(parse, arguments):
    with pytest.raises(flags.Error, match=arguments[0]):
        parse("--config=deit_ti:digits", *arguments)


@pytest.mark.parametrize("task", TASKS)
def test_every_entry_has_a_meaning_and_its_default(task):
    entries, config = entries_of(task), default_config(task)
    assert all(entry.meaning for entry in entries.values())
    listed = {key: (value, meaning) for key, value, meaning in config_flag.list_entries(config)}
    assert entries.keys() - listed.keys() <= {"model_overrides", "head_overrides"}
    for key, entry in entries.items():
        reference = isinstance(entry.default, FieldReference)
        expected = (entry.default.get() if reference else entry.default, entry.meaning)
        assert listed.get(key, expected) == expected, key
    assert all(meaning for _, meaning in listed.values())
    assert "model_overrides.num_groups" in listed  # a setting of the default model


def test_list_has_the_values_of_a_config(parse):
    config = parse("--config=deit_ti:digits", "--config.model_overrides.token_reducer.method=tome")
    listed = {key: value for key, value, _ in config_flag.list_entries(config)}
    assert listed["model_overrides.dim"] == 64
    assert listed["model_overrides.pool"] == "token"  # the published value
    assert listed["model_overrides.token_reducer.method"] == "tome"
    assert "model_overrides.expedite.alpha" not in listed
    meanings = {key: meaning for key, _, meaning in config_flag.list_entries(config)}
    assert meanings["model_overrides.token_reducer"].startswith("a TokenReducer or its attributes")
    assert meanings["model_overrides.depth"] == "number of blocks"


def test_configs_share_no_reference():
    entries = {"a.size": Entry(FieldReference(224, field_type=object), "a size", whole(1))}
    first, second = make_config(entries).lock(), make_config(entries).lock()
    first.a.size = (256, 192)
    assert first.a.size == (256, 192)
    assert second.a.size == 224

"""The flag --config: files and names of configs, overrides of any setting, the list of entries."""

import pytest
from absl import flags
from ml_collections import FieldReference

from tokenvit_jax import config_flag
from tokenvit_jax.config import Entry, make_config
from tokenvit_jax.config_keys import list_entries
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import TASKS, default_config, entries_of
from tokenvit_jax.valid import whole


@pytest.fixture
def parse():
    """Returns the configuration of a command line."""

    def parse_arguments(*arguments):
        flag_values = config_flag.ConfigFlags()
        flags.DEFINE_string("workdir", None, "folder", flag_values=flag_values)
        assert flag_values(["train", *arguments]) == ["train"]
        return flag_values["config"].value

    return parse_arguments


def message_of(parse, *arguments):
    """Returns the message of a command line that is refused, which is one short line."""
    with pytest.raises(UserError) as error:
        parse(*arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


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
        ("", "--config= is empty; `tokenvit list configs` prints the names"),
        (" ", "--config=  is empty"),
        (":digits", "--config= is empty"),
        ("/", "--config=/ is a folder; valid: FILE.py or the name of a config"),
        ("~nobody_here/a.py", "--config=~nobody_here/a.py: "),
        ("dgt_t:digit", "config argument 'digit' is not valid (did you mean 'digits'?)"),
        ("dgt_t.py", "--config=dgt_t.py: no such file"),
        ("--workdir=x", "--config has no value: --workdir=x follows it"),
    ],
)
def test_unknown_config_is_named(parse, text, message):
    assert message in message_of(parse, "--config", text)


# Text of a configuration file -> message.
FILES = {
    "def get_config(:\n": "SyntaxError: invalid syntax (line 1)",
    "\n1 / 0\n": "ZeroDivisionError: division by zero (line 2)",
    "def get_config():\n    raise ValueError('no\\n way')\n": "ValueError: no way (line 2)",
    "import no_such_module\n": "ModuleNotFoundError: No module named 'no_such_module' (line 1)",
    "import sys\nsys.exit(3)\n": "SystemExit: 3 (line 2)",
    "from config_file import get_config\n": "ImportError: cannot import name 'get_config'",
    "def get_config():\n    return get_config()\n": "RecursionError: ",
    "x = 1\n": "the file has no function get_config()",
    "get_config = {}\n": "the file has no function get_config()",
    "def get_config():\n    return None\n": "get_config() returns None; valid: a configur",
    "def get_config():\n    return {'seed': 1}\n": "get_config() returns {'seed': 1}; valid",
    "def get_config(arg):\n    return arg\n": "get_config() has an argument; valid: --config=",
    "\0": "SyntaxError: source code string cannot contain null bytes",
}


@pytest.mark.parametrize("text", FILES, ids=list(map(str, range(len(FILES)))))
def test_file_that_fails_is_named_with_its_line(parse, tmp_path, text):
    file = tmp_path / "own.py"
    file.write_text(text)
    message = message_of(parse, f"--config={file}")
    assert message.startswith(f"--config={file}") and FILES[text] in message


def test_what_a_file_prints_is_no_result_and_its_argument_is_checked(parse, tmp_path, capsys):
    text = "print('loading')\nfrom tokenvit_jax.tasks import default_config\n"
    text += "def get_config():\n    print('made')\n    return default_config('classification')\n"
    (tmp_path / "own.py").write_text(text)
    config = parse(f"--config={tmp_path / 'own.py'}", "--config.seed=3")
    assert config.seed == 3
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "loading\nmade\n"
    message = message_of(parse, f"--config={tmp_path / 'own.py'}:a")
    assert message.endswith("own.py:a is not valid: get_config() has no argument; valid: no :ARG"
                            "UMENT")  # fmt: skip
    (tmp_path / "own.txt").write_text(text)
    assert "is no Python file; valid" in message_of(parse, f"--config={tmp_path / 'own.txt'}")


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
    message = message_of(parse, changed[0], "--config.model_overrides.pool=mean")
    assert "model_overrides.pool is not a key" in message


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
        ("", "--help lists all keys"),
        ("data.", "did you mean 'dataset'?"),
        ("data..workers", "did you mean 'data.workers'?"),
        ("head_overrides.depth", "config.head_overrides is an entry of the tasks: segmentation"),
    ],
)
def test_wrong_key_is_named(parse, key, message):
    found = message_of(parse, DEIT, f"--config.{key}=1")
    assert found.startswith(f"--config.{key} is not a key of the configuration; ")
    assert message in found


DEIT = "--config=deit_ti:digits"
SEGMENTER = "--config=segmenter_ti:scenes"


@pytest.mark.parametrize(
    ("config", "argument", "valid"),
    [
        (DEIT, "--config.model_overrides.depth=x", "; valid: whole numbers"),
        (DEIT, "--config.seed=1.5", "; valid: whole numbers from 0 to 4294967295"),
        (DEIT, "--config.num_steps=abc", "; valid: whole numbers from 1 to 2147483647"),
        (DEIT, "--config.num_steps=1e3", "; valid: whole numbers from 1"),
        (DEIT, "--config.num_steps=True", "; valid: whole numbers from 1"),
        (DEIT, "--config.num_steps=", "; valid: whole numbers from 1"),
        (DEIT, f"--config.num_steps={'9' * 5000}", "; valid: whole numbers from 1"),
        (DEIT, "--config.clip_norm=(1)", "; valid: 0, or numbers from 1e-06 to 1000000"),
        (DEIT, "--config.augment.crop_scale=(1,", "; valid: 2 ascending values"),
        (DEIT, "--config.augment.crop_scale=0.5", "; valid: 2 ascending values"),
        (DEIT, f"--config.augment.crop_scale={'(' * 9000}", "; valid: 2 ascending values"),
        (DEIT, "--config.data=3", ": data is a group of entries; valid: --config.data.NAME=VALUE"),
        (DEIT, "--config.augment.randaugment={}", ": augment.randaugment is a group of entries; "),
        (DEIT, "--config.model_overrides=5", "; valid: --config.model_overrides.NAME=VALUE, or"),
        (DEIT, "--config.model_overrides={1: 2}", "; valid: --config.model_overrides.NAME=VALUE"),
        (DEIT, "--config.model_overrides.token_reducer={'a.b': 1}", "; valid: values by name in"),
        (DEIT, "--noconfig.seed", "; valid: --config.seed=VALUE"),
        (SEGMENTER, "--noconfig.augment.photometric=1", "; valid: --config.augment.photometric=VA"),
        (SEGMENTER, "--config.augment.photometric=maybe", "; valid: True, False"),
        (SEGMENTER, "--config.data.eval_size=big", "; valid: (0, 0); or 2 values"),
    ],
)
def test_wrong_value_is_named(parse, config, argument, valid):
    message = message_of(parse, config, argument)
    assert message.startswith(argument[:200]) and f"is not valid{valid}" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.num_steps"], "--config.num_steps has no value; valid: whole numbers from 1"),
        (["--config.num_steps", "--config.seed=1"], "--config.num_steps has no value; valid: who"),
        (
            ["--config.model_overrides.depth=2", "--config.model_overrides={}"],
            "--config.model_overrides={} replaces --config.model_overrides.depth=2, which stands",
        ),
    ],
)
def test_overrides_in_the_wrong_order_or_without_value(parse, arguments, message):
    assert message_of(parse, DEIT, *arguments).startswith(message)


def test_override_needs_a_config(parse):
    assert message_of(parse, "--config.seed=1") == (
        "--config.seed=1 needs --config=FILE.py or --config=NAME"
    )
    assert parse() is None
    assert "--config=a --config=b" in message_of(parse, "--config=a", "--config=b")


def test_what_an_override_switches_off_gets_its_default(parse):
    config, off = "--config=segmenter_s", "--config.optimizer.schedule=cosine"
    assert parse(config).optimizer.power == 0.9
    assert parse(config, off).optimizer.power == 1.0
    assert parse(config, off, "--config.optimizer.power=0.9").optimizer.power == 0.9
    assert parse(config, off, "--config.seed=-1").optimizer.power == 0.9  # will be refused
    config = parse("--config=finetune:vit_b,3680", "--config.optimizer.warmup_steps=0")
    assert config.optimizer.warmup_learning_rate == 1e-6
    assert config.is_locked


def test_forms_of_overrides(parse):
    config = parse(
        "--config.seed=007", "-config.batch_size", "32", "--workdir", "x", DEIT,
        "--config.image_size=(32, 48)", "--config.clip_norm", "-1", "--config.num_steps=20",
        "--config.num_steps=10", "--config.initial.workdir=", "--config.data.classes=['a', 'b']",
        "--config.model_overrides={'drop_path': 0}", "--config.model_overrides.drop_path=0.5",
        "--config.augment.crop_scale=0.5, 1", "--config.dataset=a=b",
    )  # fmt: skip
    assert (config.seed, config.batch_size, config.num_steps) == (7, 32, 10)
    assert (config.image_size, config.clip_norm) == ((32, 48), -1.0)
    assert (config.initial.workdir, config.data.classes) == ("", ("a", "b"))
    assert config.model_overrides.to_dict() == {"drop_path": 0.5}
    assert (config.augment.crop_scale, config.dataset) == ((0.5, 1), "a=b")
    assert config.is_locked
    config = parse(SEGMENTER, "--noconfig.augment.photometric", "--config.inference.stride=32")
    assert (config.augment.photometric, config.inference.stride) == (False, 32)
    assert parse(SEGMENTER, "--config.augment.photometric").augment.photometric is True


@pytest.mark.parametrize("task", TASKS)
def test_every_entry_has_a_meaning_and_its_default(task):
    entries, config = entries_of(task), default_config(task)
    assert all(entry.meaning for entry in entries.values())
    listed = {key: (value, meaning) for key, value, meaning in list_entries(config)}
    assert entries.keys() - listed.keys() <= {"model_overrides", "head_overrides"}
    for key, entry in entries.items():
        reference = isinstance(entry.default, FieldReference)
        expected = (entry.default.get() if reference else entry.default, entry.text)
        assert listed.get(key, expected) == expected, key
    assert all(meaning for _, meaning in listed.values())
    own = {
        "dgt_t": "num_groups",
        "clustr_s": "aggregation",
        "vit_b_r50": "position_size",
        "swin_t": "window_size",
    }
    own = own[config.model]
    assert f"model_overrides.{own}" in listed  # a setting of the default model


def test_list_has_the_values_of_a_config(parse):
    config = parse("--config=deit_ti:digits", "--config.model_overrides.token_reducer.method=tome")
    listed = {key: value for key, value, _ in list_entries(config)}
    assert listed["model_overrides.dim"] == 64
    assert listed["model_overrides.pool"] == "token"  # the published value
    assert listed["model_overrides.token_reducer.method"] == "tome"
    assert "model_overrides.expedite.alpha" not in listed
    meanings = {key: meaning for key, _, meaning in list_entries(config)}
    assert meanings["model_overrides.token_reducer"].startswith("a TokenReducer or its attributes")
    assert meanings["model_overrides.depth"].startswith("number of blocks (whole numbers from ")


def test_configs_share_no_reference():
    entries = {"a.size": Entry(FieldReference(224, field_type=object), "a size", whole(1))}
    first, second = make_config(entries).lock(), make_config(entries).lock()
    first.a.size = (256, 192)
    assert first.a.size == (256, 192)
    assert second.a.size == 224

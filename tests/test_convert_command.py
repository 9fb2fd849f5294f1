"""Conversion of a file of weights to a run and back: the command and its error messages."""

import copy
import json
import pickle
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax import cli, convert
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks.segmentation.model import HEADS, Segmenter
from tokenvit_jax.training.checkpoint import load_checkpoint
from tokenvit_jax.training.workdir import read_config
from tokenvit_jax.weights import LAYOUTS, export_weights, import_weights, parameter_shapes

SETTINGS = {"patch_size": 8, "position_size": (32, 32)}


def run(monkeypatch, capsys, *args, override=(), **flags):
    flags = [f"--{key}={value}" for key, value in flags.items()]
    flags += [f"--override={text}" for text in override]
    monkeypatch.setattr(sys, "argv", ["convert", *flags, *args])
    with pytest.raises(SystemExit) as exit_info:
        cli.run(convert.main, copy.deepcopy(convert.FLAGS), required=("source", "out"))
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


def random_arrays(**settings):
    """Returns a DeiT-Ti with 10 classes, random parameters, and the same in timm's layout."""
    model = tv.create_model("deit_ti", num_classes=10, **SETTINGS | settings)
    shapes = parameter_shapes(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return model, params, export_weights(params, model, LAYOUTS["timm"]["deit"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "deit.safetensors"
    save_file(random_arrays(distilled=True)[2], path)
    return path


def test_names_and_shapes_match_timm(weights):
    arrays = load_file(weights)
    assert arrays["cls_token"].shape == arrays["dist_token"].shape == (1, 1, 192)
    assert arrays["pos_embed"].shape == (1, 18, 192)
    assert arrays["patch_embed.proj.weight"].shape == (192, 3, 8, 8)
    assert arrays["blocks.11.attn.qkv.weight"].shape == (576, 192)
    assert arrays["blocks.0.mlp.fc1.weight"].shape == (768, 192)
    assert arrays["head_dist.bias"].shape == (10,)
    assert len(arrays) == 4 + 12 * 12 + 7


@pytest.mark.parametrize("settings", [{}, {"distilled": True}, {"pool": "mean"}])
def test_export_and_import_are_inverse(settings):
    model, params, arrays = random_arrays(**settings)
    read = LAYOUTS["timm"]["deit"].model_overrides(arrays)
    assert read == {"distilled": False, "pool": "token"} | SETTINGS | settings
    found = import_weights(arrays, model, LAYOUTS["timm"]["deit"])
    jax.tree.map(np.testing.assert_array_equal, found, params)
    kernel = found["blocks_3"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel.T, arrays["blocks.3.mlp.fc1.weight"])


@pytest.mark.parametrize("family", sampled(["swin", "swinv2"]))
def test_export_and_import_of_swin_are_inverse(family):
    """Stages and blocks keep their numbers; arrays that the model computes are ignored."""
    narrow = {"dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)}
    model = tv.create_model(f"{family}_t", num_classes=10, window_size=6, **narrow)
    shapes, layout = parameter_shapes(model), LAYOUTS["timm"][family]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    arrays = export_weights(params, model, layout)
    block = "layers.2.blocks.1"
    expected = {
        "patch_embed.norm.weight": (8,),
        "layers.3.downsample.reduction.weight": (32, 96),
        f"{block}.mlp.fc1.weight": (96, 24),
        "head.fc.weight": (10, 32),
    } | (
        {f"{block}.attn.relative_position_bias_table": (121, 3)}
        if family == "swin"
        else {f"{block}.attn.logit_scale": (3, 1, 1), f"{block}.attn.cpb_mlp.2.weight": (3, 512)}
    )
    assert {name: arrays[name].shape for name in expected} == expected
    assert layout.model_overrides(arrays) == ({"window_size": 6} if family == "swin" else {})
    assert layout.image_size(model, arrays) == (192 if family == "swin" else 256)
    computed = {"layers.0.blocks.0.attn.relative_position_index": np.zeros((36, 36), np.int64)}
    found = import_weights(arrays | computed, model, layout)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_command_writes_a_run_and_the_file_again(monkeypatch, capsys, tmp_path, weights):
    workdir, back = tmp_path / "run", tmp_path / "back.safetensors"
    flags = {"model": "deit_ti", "dataset": "digits", "source": weights, "out": workdir}
    status, out, err = run(monkeypatch, capsys, **flags)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "deit_ti, layout timm, digits, image_size 32",
        "not in the file, taken from the published models: --normalization=imagenet "
        "--eval_crop=0.9 --eval_interpolation=bicubic",
        f"{weights} -> {workdir}",
    ]
    config = read_config(workdir)
    assert config.model == "deit_ti" and config.image_size == 32
    # `train` continues from the first batch.
    progress = (workdir / "checkpoints" / "0" / "progress" / "metadata").read_text()
    assert json.loads(progress) == {"data": {"next_index": 0}}
    assert config.model_overrides.distilled is True
    assert config.data.normalization == "imagenet"
    loaded = load_checkpoint(workdir)
    assert loaded.step == 0
    arrays = load_file(weights)
    np.testing.assert_array_equal(
        loaded.variables["params"]["blocks_11"]["attention"]["qkv"]["kernel"],
        arrays["blocks.11.attn.qkv.weight"].T,
    )
    assert run(monkeypatch, capsys, source=workdir, out=back)[0] == 0
    found = load_file(back)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    status, _, err = run(monkeypatch, capsys, **flags)
    assert (status, err) == (
        1,
        f"error: --out={workdir} exists already; valid: a path where nothing exists, or an empty "
        "folder\n",
    )
    # Back: into a folder that is created; not over a folder; not into a file.
    assert run(monkeypatch, capsys, source=workdir, out=tmp_path / "new" / "back")[0] == 0
    assert load_file(tmp_path / "new" / "back").keys() == arrays.keys()
    status, _, err = run(monkeypatch, capsys, source=workdir, out=tmp_path / "new")
    assert (status, err) == (
        1,
        f"error: --out={tmp_path / 'new'} is a folder; valid: the path of a file\n",
    )
    status, _, err = run(monkeypatch, capsys, source=workdir, out=back / "file")
    assert status == 1 and err.startswith(f"error: --out={back / 'file'} cannot be written: ")
    status, _, err = run(monkeypatch, capsys, layout="google", source=workdir, out=back)
    assert (status, err) == (
        1,
        "error: --layout=google has no model 'deit_ti'; valid: vit\n",
    )


def test_flags_and_paths_without_effect_are_rejected(monkeypatch, capsys, tmp_path, weights):
    workdir, file = tmp_path / "run", tmp_path / "file"
    flags = {"model": "deit_ti", "source": weights}
    assert run(monkeypatch, capsys, out=workdir, **flags)[0] == 0
    own = tmp_path / "own.safetensors"
    assert run(monkeypatch, capsys, layout="own", source=workdir, out=own)[0] == 0
    file.touch()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.safetensors.index.json").touch()
    for extra, message in (
        ({**flags, "checkpoint": "best"}, f"--checkpoint has no effect: --source={weights} is a"),
        ({"source": own, "num_classes": 0}, f"--num_classes has no effect: --source={own} holds"),
        ({"source": workdir, "override": ["depth=2"]}, "--override has no effect: --source="),
        ({"source": workdir, "out": own}, f"--out={own} exists already; valid: a path where"),
        ({"source": workdir, "layout": "own", "out": file}, f"--out={file} exists already; valid"),
        ({"source": workdir, "out": "back.npz"}, "--out=back.npz is not valid; valid: NAME.safet"),
        ({**flags, "out": file}, f"--out={file} exists already; valid: a path"),
        ({**flags, "data_dir": tmp_path}, f"--data_dir={tmp_path} needs --dataset"),
        ({**flags, "override": ["num_classes=3"]}, "--override=num_classes is not valid: the file"),
        (
            {**flags, "source": tmp_path / "parts"},
            "parts/model.safetensors.index.json is no",
        ),
    ):
        status, _, err = run(monkeypatch, capsys, **{"out": tmp_path / "out"} | extra)
        assert status == 1 and message in err, err


DECODERS = {
    "mask_transformer": {
        "proj_dec.weight": (192, 192),
        "cls_emb": (1, 5, 192),
        "blocks.1.norm2.bias": (192,),
        "blocks.1.attn.qkv.weight": (576, 192),
        "blocks.1.attn.proj.bias": (192,),
        "blocks.0.mlp.fc1.weight": (768, 192),
        "decoder_norm.weight": (192,),
        "proj_patch": (192, 192),
        "proj_classes": (192, 192),
        "mask_norm.bias": (5,),
    },
    "linear": {"head.weight": (5, 192), "head.bias": (5,)},
}


def segmenter_arrays(name="vit_ti", distilled=False, head="linear"):
    """Returns random parameters of a Segmenter with 5 classes, and the same in its layout."""
    backbone = tv.create_model(name, distilled=distilled, **SETTINGS)
    model = Segmenter(backbone, HEADS[head](num_classes=5))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), parameter_shapes(model)
    )
    return params, export_weights(params, model, LAYOUTS["segmenter"]["vit"])


@pytest.mark.parametrize(
    ("name", "distilled", "head"),
    sampled([("vit_ti", False, "mask_transformer"), ("deit_ti", True, "linear")]),
)
def test_export_and_import_of_segmenter_are_inverse(
    monkeypatch, capsys, tmp_path, name, distilled, head
):
    params, arrays = segmenter_arrays(name, distilled, head)
    decoder = {key.removeprefix("decoder."): x for key, x in arrays.items() if "decoder." in key}
    assert {key: decoder[key].shape for key in DECODERS[head]} == DECODERS[head]
    assert len(decoder) == (2 if head == "linear" else 2 + 1 + 2 * 12 + 2 + 2 + 2)
    assert len(arrays) - len(decoder) == 4 + 12 * 12 + 2 + distilled
    if head == "mask_transformer":  # multiplies tokens from the right in both: not transposed
        kernel = params["head"]["patch_projection"]["kernel"]
        np.testing.assert_array_equal(decoder["proj_patch"], kernel)

    source, workdir, back = (tmp_path / name for name in ("a.safetensors", "run", "back"))
    unused = {f"encoder.{key}.bias": np.ones(1000, np.float32) for key in ("head", "head_dist")}
    save_file(arrays | unused, source)
    flags = {"model": name, "layout": "segmenter", "dataset": "scenes", "source": source}
    status, out, _ = run(monkeypatch, capsys, out=workdir, **flags)
    assert (status, out.splitlines()[-1]) == (0, f"{source} -> {workdir}")
    config = read_config(workdir)
    expected = {"pool": "token", "norm_epsilon": 1e-5, "position_resize": "bilinear"} | SETTINGS
    assert config.model_overrides.to_dict() == expected | {"distilled": distilled}
    assert (config.head, config.image_size) == (head, 32)
    assert config.head_overrides.to_dict() == ({} if head == "linear" else {"depth": 2})
    assert config.data.normalization == ("imagenet" if name == "deit_ti" else "inception")
    found = load_checkpoint(workdir).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert run(monkeypatch, capsys, layout="segmenter", source=workdir, out=back)[0] == 0
    jax.tree.map(np.testing.assert_array_equal, load_file(back), arrays)


def test_file_that_does_not_fit_a_segmenter_is_rejected(monkeypatch, capsys, tmp_path):
    source = tmp_path / "a.safetensors"
    save_file(segmenter_arrays()[1], source)
    flags = {"model": "vit_ti", "layout": "segmenter", "dataset": "scenes", "source": source}
    for changes, message in (
        (
            {"dataset": "digits"},
            "layout=segmenter is for segmentation: config.dataset='digits' has no",
        ),
        (
            {"layout": "timm", "dataset": "none"},
            "source=.* entries do not fit the model: blocks.0.attn",
        ),
        (
            {"dataset": "scnes"},
            r"error: no dataset 'scnes' \(did you mean 'scenes'\?\); valid: ade",
        ),
        ({"eval_crop": 0.9}, "--eval_crop has no effect: segmentation shows the whole image"),
        ({"model": "swin_t"}, "layout=segmenter has no model 'swin_t'; valid: vit, deit"),
    ):
        status, _, err = run(monkeypatch, capsys, out=tmp_path / "run", **flags | changes)
        assert status == 1 and re.search(message, err), err


def test_all_mismatches_are_reported_together(monkeypatch, capsys, tmp_path, weights):
    arrays = load_file(weights)
    del arrays["blocks.2.norm1.weight"]
    arrays["norm.weight"] = np.zeros(191, np.float32)
    arrays["extra"] = np.zeros(3, np.float32)
    source = tmp_path / "wrong.safetensors"
    save_file(arrays, source)
    out = tmp_path / "run"
    flags = {"model": "deit_ti", "dataset": "digits", "source": source, "out": out}
    status, _, err = run(monkeypatch, capsys, **flags)
    assert status == 1 and "3 entries do not fit the model" in err
    assert "blocks.2.norm1.weight is missing" in err
    assert "norm.weight has shape (191,), expected (192,)" in err
    assert "extra (3,) has no counterpart in the model" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"not weights at all",
            "is neither a safetensors file, a NumPy archive, nor a file of torch",
        ),
        (pickle.dumps({"cls_token": Path("a")}), "is refused: it is a pickle that holds more"),
        (None, "no such file or folder"),
    ],
)
def test_unreadable_file_is_rejected(monkeypatch, capsys, tmp_path, content, message):
    source = tmp_path / "weights.bin"
    if content is not None:
        source.write_bytes(content)
    status, _, err = run(monkeypatch, capsys, model="deit_ti", source=source, out=tmp_path / "run")
    assert status == 1
    assert err.startswith(f"error: --source={source}")
    assert re.search(message, err), err


def test_unknown_normalization_is_rejected(monkeypatch, capsys, tmp_path, weights):
    flags = {"model": "deit_ti", "source": weights, "out": tmp_path / "run"}
    status, _, err = run(monkeypatch, capsys, **flags, normalization="half")
    assert status == 2
    assert "--normalization=half is not valid; valid: imagenet, inception, clip" in err
    assert not (tmp_path / "run").exists()


def test_source_that_does_not_exist_is_named(monkeypatch, capsys, tmp_path):
    source = tmp_path / "runn"  # the model is not needed when converting back
    (tmp_path / "run").mkdir()
    hint = " (did you mean 'run'?)"
    for flags in ({}, {"model": "deit_ti"}, {"layout": "own"}):
        status, _, err = run(monkeypatch, capsys, source=source, out=tmp_path / "out", **flags)
        assert (status, err) == (1, f"error: --source={source}: no such file or folder{hint}\n")


def test_folder_of_hugging_face_has_a_file_of_weights(tmp_path):
    (tmp_path / "a.pth").touch()
    with pytest.raises(UserError, match=r"holds neither a run nor model.* or .*; it holds a\.pth$"):
        convert.weights_file(tmp_path)
    (tmp_path / "config.json").touch()  # the workdir of a run
    assert convert.weights_file(tmp_path) == tmp_path
    for name in ("pytorch_model.bin", "model.safetensors.index.json", "model.safetensors"):
        (tmp_path / name).touch()
        assert convert.weights_file(tmp_path) == tmp_path / name


def test_settings_are_literals_or_strings():
    texts = ["window_size=16", "pretrained_window_sizes=(8, 8, 8, 4)", "activation=gelu"]
    assert convert.parse_overrides(texts) == {
        "window_size": 16,
        "pretrained_window_sizes": (8, 8, 8, 4),
        "activation": "gelu",
    }
    for text in ("window_size", "=3", "a b=3"):
        with pytest.raises(UserError, match=f"^--override={text} is not valid; valid: NAME=VALUE"):
            convert.parse_overrides([text])
    with pytest.raises(UserError, match=r"^--override=dim is given twice; valid: once$"):
        convert.parse_overrides(["dim=1", "dim=2"])
    for text in ("{[]: 1}", "-" * 99999, "(" * 99999, "1" * 9999):
        assert convert.parse_overrides([f"dim={text}"]) == {"dim": text}


def test_wrong_model_is_rejected(monkeypatch, capsys, tmp_path, weights):
    flags = {"source": weights, "out": tmp_path / "run"}
    for extra, message in (
        ({}, "--model is missing: the file does not name its model"),
        ({"model": "deit_x"}, "unknown model 'deit_x'"),
        ({"model": "dgt_t"}, "no layout has the model 'dgt_t'; valid: vit, deit, swin, swinv2"),
        (
            {"model": "dgt_t", "layout": "timm"},
            "--layout=timm has no model 'dgt_t'; valid: vit, deit, swin, swinv2",
        ),
    ):
        status, _, err = run(monkeypatch, capsys, **flags, **extra)
        assert status == 1 and message in err, err


def test_imported_model_computes(weights):
    arrays = load_file(weights)
    model = tv.create_model("deit_ti", num_classes=10, distilled=True, **SETTINGS)
    params = import_weights(arrays, model, LAYOUTS["timm"]["deit"])
    logits = jax.eval_shape(
        lambda x: model.apply({"params": params}, x, train=False), jnp.zeros((1, 32, 32, 3))
    )
    assert logits.shape == (1, 10)

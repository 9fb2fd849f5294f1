"""What an imported run has: model, classes, images; and what is said about the file."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.training import conversion
from tokenvit_jax.training.conversion import Choices, import_file
from tokenvit_jax.weights import LAYOUTS, export_weights, parameter_shapes

NARROW = {"dim": 16, "depth": 1, "num_heads": 2}
SWIN = {"dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}


@pytest.fixture
def convert(monkeypatch, tmp_path):
    """Returns a function that imports arrays: lines, configuration and parameters of the run."""
    written = {}
    monkeypatch.setattr(conversion, "write_run", lambda out, *run: written.update(run=run))

    def convert(arrays, name="vit_ti", settings=NARROW, layout="auto", **choices):
        save_file(arrays, tmp_path / "w.safetensors")
        choices["model_overrides"] = settings | choices.get("model_overrides", {})
        out = tmp_path / "run"
        lines = import_file(tmp_path / "w.safetensors", out, name, layout, Choices(**choices))
        config, variables = written["run"]
        return lines, config, variables["params"]

    return convert


def arrays_of(layout="timm", name="vit_ti", num_classes=10, settings=NARROW, **overrides):
    model = tv.create_model(name, num_classes=num_classes, **settings | overrides)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), parameter_shapes(model))
    return export_weights(params, model, LAYOUTS[layout][name.split("_")[0]])


def test_number_of_classes(convert):
    """The classifier has the number; ImageNet has 1000, another dataset must be named."""
    for count, dataset, lines in ((1000, "imagenet2012", []), (37, "none", [])):
        lines, config, params = convert(arrays_of(num_classes=count))
        classes = "37 classes" if dataset == "none" else dataset
        assert lines[0] == f"vit_ti, layout timm, {classes}, image_size 224"
        assert config.dataset == dataset and params["classifier"]["bias"].shape == (count,)
    assert config.data.classes[36] == "class 36" and len(config.data.classes) == 37
    _, config, _ = convert(arrays_of(num_classes=10), dataset="digits")
    assert config.dataset == "digits" and config.data.classes == ()
    lines, config, _ = convert(arrays_of(num_classes=37), dataset="digits", num_classes=37)
    assert config.dataset == "none"
    assert lines[1] == (
        "--dataset=digits has 10 classes, the run 37 classes: it has no names of classes"
    )
    with pytest.raises(
        UserError, match=r"^--num_classes=5: the file has 37 classes; valid: 37, or 0 to leave"
    ):
        convert(arrays_of(num_classes=37), num_classes=5)


def test_without_a_classifier(convert):
    headless = arrays_of(num_classes=0)
    for arrays, choices in (
        (headless, {}),
        (headless, {"num_classes": 0, "dataset": "digits"}),
        (arrays_of(num_classes=37), {"num_classes": 0}),
    ):
        lines, config, params = convert(arrays, **choices)
        assert lines[0] == "vit_ti, layout timm, no classifier, image_size 224"
        assert config.dataset == "none" and config.data.classes == ()
        assert "classifier" not in params
    with pytest.raises(UserError, match=r"^--num_classes=5: the file has no classifier; valid: 0$"):
        convert(headless, num_classes=5)


def test_images_of_the_published_models(convert):
    """Crop and normalisation are those of the published models, unless flags change them."""
    small = {"patch_size": 14, "position_size": (518, 518)}
    clip = {"pre_norm": True, "patch_bias": False, "projection": 8}
    for layout, name, settings, expected in (
        ("timm", "vit_ti", NARROW, (224, "inception", 0.9)),
        ("timm", "deit_ti", NARROW | {"position_size": (384, 384)}, (384, "imagenet", 1.0)),
        ("dinov2", "vit_ti", NARROW | small | {"layer_scale": 1.0}, (518, "imagenet", 1.0)),
        ("clip", "vit_ti", NARROW | clip, (224, "clip", 1.0)),
        ("huggingface", "vit_ti", NARROW | clip, (224, "clip", 1.0)),
        ("google", "vit_ti", NARROW, (224, "inception", 0.9)),
        ("swin", "swin_t", SWIN, (224, "imagenet", 0.875)),
    ):
        headless = 0 if layout in ("dinov2", "clip") or "projection" in settings else 10
        arrays = arrays_of(layout, name, headless, settings)
        arrays |= {"mask_token": np.ones(3, np.float32)} if layout == "dinov2" else {}
        tiny = SWIN if name == "swin_t" else NARROW
        lines, config, _ = convert(arrays, name, tiny)
        data = config.data
        found = (config.image_size, data.normalization, data.eval_crop)
        assert found == expected, (layout, name)
        assert lines[0].startswith(f"{name}, layout {layout}, ")
        assert f"--eval_crop={expected[2]} --eval_interpolation=bicubic" in lines[-1]
        assert ("--override=activation=quick_gelu" in lines[-1]) == ("projection" in settings)
    lines, config, _ = convert(
        arrays_of(), normalization="imagenet", eval_crop=0.8, eval_interpolation="bilinear"
    )
    data = config.data
    assert (data.normalization, data.eval_crop, data.eval_interpolation) == (
        "imagenet", 0.8, "bilinear",
    )  # fmt: skip
    assert len(lines) == 1  # nothing is taken from the published models
    with pytest.raises(UserError, match=r"^config.data.eval_crop=1.5 is not valid; valid: num"):
        convert(arrays_of(), eval_crop=1.5)


def test_windows_of_swin_v2_are_not_guessed_in_silence(convert):
    arrays = arrays_of("timm", "swinv2_t", 10, SWIN)
    lines, config, _ = convert(arrays, "swinv2_t", SWIN)
    windows = "--override=window_size=8 --override=pretrained_window_sizes=(8, 8, 8, 8)"
    assert windows in lines[-1]
    lines, config, _ = convert(arrays, "swinv2_t", SWIN, model_overrides={"window_size": 12})
    assert "--override=window_size" not in lines[-1]
    assert config.model_overrides.window_size == 12
    for stage, side in enumerate((16, 16, 16, 8)):
        name = f"layers.{stage}.blocks.0.attn.relative_position_index"
        arrays[name] = np.zeros((side**2, side**2), np.int64)
    lines, config, _ = convert(arrays, "swinv2_t", SWIN)
    assert config.model_overrides.window_size == 16 and config.image_size == 256
    assert config.model_overrides.pretrained_window_sizes == (16, 16, 16, 8)
    assert "override" not in lines[-1]


def test_a_file_of_another_model_is_recognised(convert):
    with pytest.raises(UserError, match=r"; the file looks like --model=deit_ti or vit_ti$"):
        convert(arrays_of(settings={}), "vit_s", {})
    arrays = arrays_of()
    arrays["norm.weight"][:] = np.inf
    with pytest.raises(UserError, match=r"1 entry .*norm\.weight has values that are not finite$"):
        convert(arrays)


@pytest.mark.parametrize(
    ("layout", "name", "array", "shapes"),
    [
        ("timm", "vit_ti", "pos_embed", [(1, 1, 16), (1, 10**5, 1), (16,)]),
        ("timm", "vit_ti", "patch_embed.proj.weight", [(1,), (1, 1, 1, 10**5)]),
        ("timm", "vit_ti", "reg_token", [(16,), (1, 10**5, 1)]),
        ("google", "vit_ti", "embedding/kernel", [(3, 16)]),
        ("clip", "vit_ti", "visual.positional_embedding", [(), (10**5, 1)]),
        ("timm", "swin_t", "layers.0.blocks.0.attn.relative_position_bias_table",
         [(10**6, 1), (3,)]),
    ],
)  # fmt: skip
def test_strange_shapes_are_mismatches(convert, layout, name, array, shapes):
    """Settings are read from the shapes of arrays, which may be any."""
    settings = NARROW if name == "vit_ti" else SWIN
    clip = {"pre_norm": True, "patch_bias": False, "projection": 8} if layout == "clip" else {}
    arrays = arrays_of(layout, name, 0 if clip else 10, settings, **clip)
    for shape in shapes:
        strange = arrays | {array: np.ones(shape, np.float32)}
        with pytest.raises(UserError, match=r"^--(source=.*w|override).*(do|does) not fit|valid:"):
            convert(strange, name, settings)


def test_messages(convert):
    arrays = arrays_of()
    for changes, message in (
        ({"dataset": "digts"}, r"^no dataset 'digts' \(did you mean 'digits'\?\)"),
        (
            {"layout": "google"},
            r"^--source=.*w.safetensors: \d+ entries .*; and \d+ more; .* like --layout=timm$",
        ),
        (
            {"layout": "timm", "dataset": "scenes"},
            r"^--layout=timm is for classification: config.dataset='scenes' has no label",
        ),
        ({"model_overrides": {"windows": 3}}, "^--override: model vit_ti has no setting 'windows'"),
        *(
            ({"model_overrides": {key: value}}, f"^--override: {key}={value!r} is not valid; valid")
            for key, value in (
                ("dim", "abc"),
                ("dim", True),
                ("num_heads", 0),
                ("layer_scale", "x"),
                ("patch_size", 0),
                ("drop_path", 2),
            )
        ),
        ({"name": "vit_t"}, "unknown model 'vit_t'"),
        ({"name": "swin_t", "settings": {}}, "fit no layout of swin_t; the nearest is"),
    ):
        with pytest.raises(UserError, match=message):
            convert(arrays, **changes)

import pytest
from make_task import check_config

from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import default_config, tasks_with


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("data.eval_crop", 0.0, "data.eval_crop=0.0; valid: above 0, up to 1"),
        ("augment.crop_scale", (3.0,), "augment.crop_scale=(3.0,); valid: lowest and highest, abo"),
        ("augment.crop_scale", (0.5, 2.0), "crop_scale=(0.5, 2.0); valid: lowest and highest, abo"),
        ("augment.crop_ratio", (2.0, 1.0), "crop_ratio=(2.0, 1.0); valid: lowest and highest, abo"),
    ],
)
def test_wrong_value_for_classification_is_named(key, value, message):
    config = default_config("classification")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        check_config(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("data.eval_short_side", -1, "data.eval_short_side=-1 is not valid; valid: at least 0"),
        ("augment.short_side", -1, "augment.short_side=-1 is not valid; valid: at least 0"),
        ("data.eval_size", (32, 0), "data.eval_size=(32, 0); valid: height and width, or (0, 0)"),
        ("data.eval_size", (31, 32), "data.eval_size=(31, 32); valid: at least 32 each"),
        ("data.label_size", (-1, 8), "data.label_size=(-1, 8); valid: height and width, or"),
        ("augment.scale_range", (2.0, 1.0), "augment.scale_range=(2.0, 1.0); valid: lowest and"),
        ("augment.scale_range", (0.0, 1.0), "augment.scale_range=(0.0, 1.0); valid: lowest and"),
        ("inference.window", -1, "inference.window=-1 is not valid; valid: at least 0"),
        ("inference.stride", (8, 2, 1), "inference.stride=(8, 2, 1) is not valid; valid: at least"),
        (
            "image_size",
            (31, 64),
            "image_size=(31, 64) is not valid; valid: at least 32, up to 32768",
        ),
        ("image_size", "64", "image_size='64' is not valid; valid: at least 32"),
        ("image_size", 10**12, "image_size=1000000000000 is not valid; valid: at least 32"),
        ("in_channels", 2, "in_channels=2 is not valid; valid: 1, 3, 4"),
        ("augment.max_class_share", 0.0, "augment.max_class_share=0.0; valid: above 0, up to 1"),
    ],
)
def test_wrong_value_for_segmentation_is_named(key, value, message):
    config = default_config("segmentation")
    config.dataset = "scenes"
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        check_config(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "task, key, value",
    [
        ("segmentation", "augment.crop_scale", (0.5, 1.0)),
        ("segmentation", "augment.randaugment.num_ops", 2),
        ("segmentation", "augment.rotation", 10.0),
        ("segmentation", "mix.mixup", 0.8),
        ("segmentation", "label_smoothing", 0.1),
        ("classification", "inference.stride", 32),
        ("segmentation", "token_labels.weight", 0.5),
        ("classification", "augment.scale_range", (0.5, 2.0)),
        ("classification", "augment.photometric", True),
        ("classification", "data.eval_size", (64, 64)),
    ],
)
def test_option_of_the_other_task_is_refused(task, key, value):
    config = default_config(task)
    with pytest.raises((KeyError, AttributeError)):
        config.update_from_flattened_dict({key: value})
    assert tasks_with(key) == list({"classification", "segmentation"} - {task})

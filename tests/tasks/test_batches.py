import pytest

from tokenvit_jax.config import default_config
from tokenvit_jax.errors import UserError
from tokenvit_jax.tasks import batches


@pytest.fixture
def config():
    config = default_config()
    config.dataset = "scenes"
    config.image_size = 32
    config.batch_size = 4
    config.data.eval_batch_size = 4
    config.data.label_size = (128, 128)
    return config


def test_wrong_value_for_classification_is_named():
    config = default_config()
    config.data.eval_crop = 0.0
    with pytest.raises(UserError) as error:
        batches.eval_dataset(config)
    assert "data.eval_crop=0.0; valid: above 0, up to 1" in str(error.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("data.eval_short_side", -1, "data.eval_short_side=-1; valid: 0 or more"),
        ("augment.short_side", -1, "augment.short_side=-1; valid: 0 or more"),
        ("data.eval_size", (32, 0), "data.eval_size=(32, 0); valid: height and width, or (0, 0)"),
        ("data.eval_size", (31, 32), "data.eval_size=(31, 32); valid: at least 32 each"),
        ("data.label_size", (-1, 8), "data.label_size=(-1, 8); valid: height and width, or"),
        ("augment.scale_range", (2.0, 1.0), "augment.scale_range=(2.0, 1.0); valid: lowest and"),
        ("augment.scale_range", (0.0, 1.0), "augment.scale_range=(0.0, 1.0); valid: lowest and"),
        ("augment.max_class_share", 0.0, "augment.max_class_share=0.0; valid: above 0, up to 1"),
    ],
)
def test_wrong_value_is_named(config, key, value, message):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        batches.train_dataset(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "dataset, key, value",
    [
        ("scenes", "augment.crop_scale", (0.5, 1.0)),
        ("scenes", "augment.randaugment.num_ops", 2),
        ("scenes", "augment.rotation", 10.0),
        ("scenes", "mix.mixup", 0.8),
        ("scenes", "label_smoothing", 0.1),
        ("scenes", "retention.penalty", 1e-3),
        ("digits", "inference.stride", 32),
        ("scenes", "token_labels.weight", 0.5),
        ("digits", "augment.scale_range", (0.5, 2.0)),
        ("digits", "augment.photometric", True),
        ("digits", "data.eval_size", (64, 64)),
    ],
)
def test_option_of_the_other_task_is_refused(config, dataset, key, value):
    config.data.label_size = (0, 0)
    config.update_from_flattened_dict({"dataset": dataset, key: value})
    with pytest.raises(UserError) as error:
        batches.eval_dataset(config)
    tasks = ["segmentation", "classification"]
    own, other = tasks if dataset == "scenes" else tasks[::-1]
    expected = f"config.{key}={value} is for {other}, config.dataset={dataset!r} is for {own}; "
    assert str(error.value).startswith(expected)


def test_whole_records_are_for_classification(config):
    config.data.label_size = (0, 0)
    with pytest.raises(UserError, match="dataset 'scenes' has label maps"):
        batches.record_dataset(config)

"""Every registered model: contract of shapes, names, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import variable_shapes


@functools.cache
def abstract_variables(model, size):
    return variable_shapes(model, jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))


PLAIN = [*tv.list_models("deit_*"), *tv.list_models("vit_*")]


# The sizes of a family differ in widths, which do not meet the padding of odd images.
SIZES = [(name, (33, 97)) for name in tv.list_models("*_t*")]
SIZES += [*sampled(((name, (224, 224)) for name in tv.list_models()), keep=())]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_contract_of_shapes(name, size):
    plain = name in PLAIN
    depth = {"depth": 1} if plain else {"depths": (1, 1, 1, 1)}
    model = tv.create_model(name, num_classes=7, **depth)
    assert model.strides == ((model.settings.patch_size,) if plain else (4, 8, 16, 32))
    variables = abstract_variables(model, (64, 64))  # parameters do not depend on the image size
    chex.assert_type(jax.tree.leaves(variables["params"]), jnp.float32)
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    apply = lambda method: jax.eval_shape(  # noqa: E731
        lambda v, x: model.apply(v, x, train=False, method=method), variables, images
    )
    logits = apply("__call__")
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    for stride, stage in zip(model.strides, apply("features"), strict=True):
        assert stage.shape[:3] == (2, -(-size[0] // stride), -(-size[1] // stride))

    def restored(model, images, train):
        tokens, restore = model.encode(images, train)
        return restore(tokens[..., :3])

    if size != (224, 224):  # nor does the way back from the tokens depend on widths
        rows, columns = (-(-side // model.strides[0]) for side in size)
        assert apply(restored).shape == (2, rows, columns, 3)


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(UserError, match=r"unknown model 'dgt_x'.*valid: .*dgt_b, dgt_s, dgt_t"):
        tv.create_model("dgt_x")
    with pytest.raises(
        UserError, match=r"no setting 'topk' \(did you mean 'top_k'\?\); valid:.*top_k"
    ):
        tv.create_model("dgt_t", topk=3)
    with pytest.raises(UserError, match=r"dims of model dgt_t is \(8, 8\); it needs 4 entries"):
        tv.create_model("dgt_t", dims=(8, 8))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 31, 64, 3), "images are 31 x 64; height and width must be at least 32"),
        ((64, 64, 3), r"images have shape .* expected \(batch, height, width, channels\)"),
        ((0, 64, 64, 3), "expected at least one image and one channel"),
        ((1, 64, 64, 0), "expected at least one image and one channel"),
    ],
)
def test_bad_images_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        tv.create_model("dgt_t").init(jax.random.key(0), jnp.zeros(shape), train=False)


def test_images_of_another_type_are_named():
    init = functools.partial(tv.create_model("vit_ti").init, jax.random.key(0))
    with pytest.raises(UserError, match="images have type uint8; expected floating point"):
        init(jnp.zeros((1, 32, 32, 3), jnp.uint8))
    with pytest.raises(UserError, match="images have type list"):
        init([0.0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_ti", {"depth": 1}),
        ("dgt_t", {}),
        ("clustr_t", {}),
        ("pale_t", {"position": "ape"}),
        ("swin_t", {}),
    ],
)
def test_images_with_other_channels_than_the_variables_are_named(name, settings):
    settings = settings if "depth" in settings else {"depths": (1, 0, 0, 0), **settings}
    model = tv.create_model(name, **settings)
    variables = abstract_variables(model, (32, 32))
    grey = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    with pytest.raises(UserError, match=r"images have 1 channels; .* initialised for 3"):
        jax.eval_shape(model.apply, variables, grey)


def test_heads_that_do_not_divide_the_channels_are_named():
    message = r"num_heads=3 does not divide 64 channels, dims=\(64, .*; valid: divisors of 64"
    with pytest.raises(UserError, match=message):
        tv.create_model("dgt_t", num_heads=(3, 4, 8, 16))
    # A stage without blocks has no heads.
    tv.create_model("dgt_t", num_heads=(3, 4, 8, 16), depths=(0, 1, 0, 0))


def test_list_models_by_pattern():
    assert tv.list_models("*_t") == ["clustr_t", "dgt_t", "pale_t", "swin_t", "swinv2_t"]

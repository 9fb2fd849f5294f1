"""Weights that are cast before the model are exactly those that it would cast itself."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import sampled

from tokenvit_jax.models import create_model
from tokenvit_jax.models.backbone import variable_shapes

SHALLOW = {"depths": (1, 0, 0, 1)}


@pytest.mark.parametrize(
    ("name", "settings"),
    sampled(
        [
            ("deit_s", {"depth": 1}),
            (
                "vit_b_r50",
                {
                    "depth": 1,
                    "patch_size": 8,
                    "stem": {"widths": (32, 32), "depths": (1, 1), "num_groups": 8},
                },
            ),
            ("swin_t", SHALLOW),
            ("swinv2_t", SHALLOW),
            ("dgt_s", SHALLOW),
            ("clustr_t", SHALLOW),
            ("pale_t", SHALLOW),
        ],
        keep=(0, 4),
    ),
)
def test_no_weight_is_cast_back(name, settings):
    """Nothing but the traced program is needed to see who reads the weights in which type."""
    model = create_model(name, dtype=jnp.bfloat16, **settings)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = dict(variable_shapes(model, images))
    params = variables.pop("params")
    cast = jax.eval_shape(functools.partial(model.cast_weights, convolutions=True), params)

    def apply(params, state, images):
        # Without the cast in front of `Backbone.apply`.
        return nn.Module.apply(model, {"params": params, **state}, images, train=False)

    def reads(params):
        """Returns the types to which each parameter is converted, by place."""
        jaxpr = jax.make_jaxpr(apply)(params, variables, images).jaxpr
        types = {var: set() for var in jaxpr.invars}
        for equation in jaxpr.eqns:
            for var in equation.invars:
                if not isinstance(var, jax.extend.core.Literal) and var in types:
                    types[var].add(str(equation.params.get("new_dtype", "used")))
        return [types[var] for var in jaxpr.invars[: len(jax.tree.leaves(params))]]

    changed = [
        (before, after)
        for old, new, before, after in zip(
            *map(jax.tree.leaves, (params, cast)), reads(params), reads(cast), strict=True
        )
        if old.dtype != new.dtype
    ]
    assert len(changed) > 4
    for path, kernel in jax.tree_util.tree_leaves_with_path(cast):
        standardized = path[0].key == "stem"  # in float32
        if kernel.ndim == 4:
            assert kernel.dtype == (jnp.float32 if standardized else jnp.bfloat16), path
    for before, after in changed:
        assert before == {"bfloat16"}
        assert "float32" not in after


def test_apply_casts_first():
    """Values and gradients are those of the model that casts each weight where it is used."""
    model = create_model("deit_s", dtype=jnp.bfloat16, depth=1, dim=16, num_heads=1)
    images = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def gradients(apply):
        return jax.jit(jax.grad(lambda variables: (apply(variables, images) ** 2).sum()))(variables)

    expected = gradients(lambda *args: nn.Module.apply(model, *args))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, gradients(model.apply), expected)

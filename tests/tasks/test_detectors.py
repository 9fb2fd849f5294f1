"""Detectors on hierarchical backbones: norms of the maps, and clusters inside the backbone."""

import functools

import jax
import jax.numpy as jnp
import pytest
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax.heads import MaskRcnn, RetinaNet
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.tasks.detection.model import Detector

IMAGES = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)


def head_of(cls):
    return cls(3, channels=8, num_candidates=20, max_detections=5)


@pytest.mark.parametrize("cls", [MaskRcnn, RetinaNet])
@pytest.mark.parametrize(
    "name",
    sampled(["clustr_t", "dgt_t", "pale_t", "swin_t", "swinv2_t"], keep=("clustr_t", "swin_t")),
)
def test_each_map_that_the_head_reads_has_one_norm(name, cls):
    """The stages of a ClusTR end in one."""
    backbone = tv.create_model(name, depths=(1, 1, 1, 1))
    init = functools.partial(
        Detector(backbone, head_of(cls)).init, train=False, method="head_inputs"
    )
    params = jax.eval_shape(init, jax.random.key(0), IMAGES)["params"]
    norms = {key: layer["scale"].size for key, layer in params.items() if "map_norm" in key}
    numbers = range(cls.first_map, 4) if name != "clustr_t" else ()
    assert norms == {f"map_norm_{i + 1}": backbone.settings.dims[i] for i in numbers}


@pytest.mark.slow
def test_clusters_in_the_backbone_change_no_parameter_and_no_shape():
    settings = {"depths": (1, 1, 3, 1), "window_size": 4}
    clustered = Expedite(1, 1, (3, 3), window=1, neighbors=1)
    found = []
    for more in ({}, {"expedite": clustered}):
        model = Detector(tv.create_model("swinv2_t", **settings, **more), head_of(MaskRcnn))
        variables = variable_shapes(model, IMAGES)
        found.append((variables, jax.eval_shape(model.apply, variables, IMAGES)))
    plain, clustered = found
    assert clustered == plain
    assert clustered[1].masks.shape == (2, 5, 28, 28)

"""Exact counts of models with heads on maps, and their costs as mmcv counts them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from exact_counts import EXACT
from sampled import sampled

import tokenvit_jax as tv
from experiments.segmentation.counts import NUM_CLASSES, PUBLISHED, count, count_parameters
from tokenvit_jax.heads import FcnHead, SemanticFpn, UperNet
from tokenvit_jax.measure.macs import count_macs
from tokenvit_jax.tasks.segmentation.model import HEADS, Segmenter

# Parameters with 150 classes and the auxiliary head. mmsegmentation's Swin-T has as many.
PARAMETERS = {
    "upernet": {
        "clustr_t": 41_477_045, "clustr_s": 52_485_569, "clustr_b": 70_221_062,
        "dgt_t": 52_461_356, "dgt_s": 81_918_263, "dgt_b": 122_219_152,
        "pale_t": 51_544_236, "pale_s": 79_961_708, "pale_b": 118_836_268,
        "swin_t": 59_941_862, "swin_s": 81_259_766, "swin_b": 121_279_716,
    },
    "semantic_fpn": {
        "clustr_t": 15_419_679, "clustr_s": 26_428_203, "clustr_b": 43_999_856,
        "swin_t": 31_893_840, "swin_s": 53_211_744, "swin_b": 91_241_038,
    },
}  # fmt: skip
CASES = [(head, name) for head, counts in PARAMETERS.items() for name in counts]


count_parameters = functools.cache(count_parameters)


@pytest.mark.parametrize(("head", "name"), sampled(CASES, keep=(0, 9, 12)))
def test_parameters(head, name):
    """Blocks are equal in classifiers and here: with one of them, the difference is the same."""
    classifier = tv.create_model(name, depths=(0, 0, 0, 1))
    auxiliary = FcnHead(NUM_CLASSES) if HEADS[head].has_auxiliary else None
    model = Segmenter(classifier, HEADS[head](NUM_CLASSES), auxiliary)
    params = count_parameters(model) - count_parameters(classifier) + EXACT[name][0]
    assert params == PARAMETERS[head][name]
    if (head, name) in PUBLISHED:  # some are whole millions; Swin-B: 121
        published = PUBLISHED[head, name].params_m
        assert params / 1e6 == pytest.approx(published, abs=0.5 if published % 1 == 0 else 0.06)


@pytest.mark.parametrize(
    ("head", "size", "dims", "expected"),
    [
        (UperNet, (512, 2048), (64, 128, 256, 512), 842.296),
        (SemanticFpn, (512, 512), (64, 128, 256, 512), 21.429),
    ],
)
def test_products_of_heads(head, size, dims, expected):
    strides = (4, 8, 16, 32)
    maps = [
        jax.ShapeDtypeStruct((1, size[0] // stride, size[1] // stride, dim), jnp.float32)
        for stride, dim in zip(strides, dims, strict=True)
    ]
    head = head(NUM_CLASSES)
    variables = jax.eval_shape(lambda x: head.init(jax.random.key(0), x, train=False), maps)
    macs = count_macs(lambda v, x: head.apply(v, x, train=False), variables, maps)
    assert macs / 1e9 == pytest.approx(expected, abs=6e-4)


def test_cost_as_mmcv_counts_it():
    """UperNet with Swin-T at 512 x 2048: the paper's 945."""
    model = Segmenter(tv.create_model("swin_t"), UperNet(NUM_CLASSES), FcnHead(NUM_CLASSES))
    counted = count(model)
    assert counted.params == PARAMETERS["upernet"]["swin_t"]
    assert counted.macs / 1e9 == pytest.approx(943.17, abs=0.006)
    assert counted.mmcv_macs / 1e9 == pytest.approx(944.95, abs=0.006)

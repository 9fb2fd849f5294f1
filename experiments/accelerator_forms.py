"""Times forms of operators on a GPU, to choose the form that wins there.

    python -m experiments.accelerator_forms

Every kernel that `tokenvit_jax/kernels/forms.py` lists for NVIDIA GPUs runs against the default
form of its operator, which `TOKENVIT_JAX_KERNELS=off` selects; other forms against each other.
Every form is one compiled program in bfloat16 (distances and clustering in float32), timed as the
median of 20 calls after three; a "-" is a form without gradient, or one that the library refuses.
Writes docs/benchmarks/gpu_forms.md.
"""

import contextlib
import datetime
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments import pages
from tokenvit_jax import ops
from tokenvit_jax.kernels.group_attention_dense import attend_dense_by_cudnn
from tokenvit_jax.measure.operators import forward_backward
from tokenvit_jax.ops.channel_affine import channel_sums
from tokenvit_jax.ops.selection import largest_mask, top_indices

RESULT = Path(__file__).parent.parent / "docs" / "benchmarks" / "gpu_forms.md"
CALLS = 20
# (images, length, heads, head dim): DeiT-S without and with class token; stages 2 and 4 of DGT-T;
# windows of Swin-T; stage 1 of DGT-T; ViT-L/16 at 1024 x 1024.
ATTENTION_SHAPES = (
    (128, 196, 6, 64), (128, 197, 6, 64), (128, 784, 4, 32), (128, 49, 16, 32), (8192, 49, 3, 32),
    (8, 3136, 2, 32), (8, 4096, 16, 64),
)  # fmt: skip
MAX_LOGITS = 3e9  # more are not held in memory
# (side, channels): the feed-forward networks of DGT-T.
DEPTHWISE_SHAPES = ((56, 256), (28, 512), (14, 1024), (7, 2048))
NUM_GROUPS, TOP_K = 48, 98


class Form(NamedTuple):
    """A form of an operator at one shape.

    Attributes:
      operator: the operator with its shape.
      name: the form.
      fn: function of the inputs.
      inputs: arrays.
      num_differentiated: number of leading inputs that have a gradient.
      kernels: whether operators may take their kernels.
    """

    operator: str
    name: str
    fn: Callable[..., jax.Array]
    inputs: tuple[jax.Array, ...]
    num_differentiated: int
    kernels: bool = True


class Case(NamedTuple):
    """An operator at one shape, with kernels.

    Attributes:
      name: the operator with its shape.
      covers: operators of `FORMS` whose kernels take part.
      fn: function of the inputs.
      inputs: returns the inputs.
      num_differentiated: number of leading inputs that have a gradient.
    """

    name: str
    covers: tuple[str, ...]
    fn: Callable[..., jax.Array]
    inputs: Callable[[], tuple[jax.Array, ...]]
    num_differentiated: int = 0


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    """Returns normal random numbers."""
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def integers(seed: int, bound: int, *shape: int) -> jax.Array:
    """Returns random integers from 0 to bound - 1."""
    return jax.random.randint(jax.random.key(seed), shape, 0, bound)


def kernel_cases() -> Iterator[Case]:
    """Yields a case for every operator of `FORMS` that has a kernel for NVIDIA GPUs."""
    f32 = jnp.float32

    def heads(*shape):
        return lambda: tuple(normal(seed, *shape) for seed in range(3))

    for shape in ((128, 197, 6, 64), (128, 49, 16, 32)):
        yield Case(
            f"attention {shape}", ("attention",), ops.dot_product_attention, heads(*shape), 3
        )
    yield Case(
        "scored attention (128, 197, 6, 64)", ("scored attention",), _scored,
        heads(128, 197, 6, 64), 3,
    )  # fmt: skip
    yield Case(
        "window attention (128, 56, 56, 3, 32)", ("window attention",),
        functools.partial(ops.window_attention, window=(7, 7), shift=(3, 3)),
        lambda: (*heads(128, 56, 56, 3, 32)(), normal(3, 3, 49, 49, dtype=f32)), 4,
    )  # fmt: skip
    yield Case(
        "pale attention (128, 14, 14, 8, 32)", ("pale attention",),
        functools.partial(ops.pale_attention, pale=(7, 7)), heads(128, 14, 14, 8, 32), 3,
    )  # fmt: skip
    for images, length, num_heads, path in ((128, 784, 4, "dense"), (16, 3136, 2, "tiles")):
        yield Case(
            f"group attention ({images}, {length}, {num_heads}, 32), {path}",
            (f"group attention, {path}",),
            functools.partial(_grouped, path=path),
            lambda shape=(images, length, num_heads, 32): (
                *heads(*shape)(), normal(3, shape[2], NUM_GROUPS, 32, dtype=f32)
            ), 3,
        )  # fmt: skip
    yield Case(
        "group sums (128, 784, 4, 32)", ("group sums",),
        lambda q, groups: ops.group_sums(q, groups, NUM_GROUPS).sums,
        lambda: (normal(0, 128, 784, 4, 32), integers(1, NUM_GROUPS, 128, 4, 784)),
    )  # fmt: skip
    yield Case(
        "assignment (16, 100, 200) of about 60", ("assignment",), ops.assign_targets,
        lambda: (normal(0, 16, 200, 100, dtype=f32), integers(1, 5, 16, 100) < 3),
    )  # fmt: skip
    yield Case(
        "density peaks (16, 3136, 64) to 784",
        ("nearest neighbors", "nearest denser token", "nearest center", "cluster centers",
         "distances"),
        lambda x: ops.cluster_density_peaks(x, 784).assignment,
        lambda: (normal(0, 16, 3136, 64),),
    )  # fmt: skip
    yield Case(
        "merge tokens (128, 3136, 64) to 784", ("merge tokens", "cluster sums"),
        lambda x, scores, assignment: ops.merge_tokens(x, assignment, 784, scores),
        lambda: (normal(0, 128, 3136, 64), normal(1, 128, 3136), integers(2, 784, 128, 3136)), 2,
    )  # fmt: skip
    yield Case(
        "depthwise 3 x 3 after GELU (128, 28, 28, 512)",
        ("depthwise block", "depthwise block gradient", "sums of gelu", "gelu gradient"),
        _depthwise_after_gelu,
        lambda: (normal(0, 128, 28, 28, 512), normal(1, 3, 3, 512), normal(2, 512)), 3,
    )  # fmt: skip
    yield Case(
        "three depthwise 3 x 3 (128, 28, 28, 128)", ("depthwise branches",),
        lambda x, *kernels: sum(ops.depthwise_branches(x, kernels)[0]),
        lambda: (normal(0, 128, 28, 28, 128), *(normal(i, 3, 3, 128) for i in (1, 2, 3))), 4,
    )  # fmt: skip
    yield Case(
        "queries, keys and values (128, 197, 384)", ("parts of a linear layer",),
        lambda *args: sum(ops.linear_parts(*args, 3)),
        lambda: (normal(0, 128, 197, 384), normal(1, 384, 1152), normal(2, 1152)), 0,
    )  # fmt: skip
    yield Case(
        "GELU behind a bias (128, 197, 1536)", ("gelu", "gelu gradient"), ops.bias_gelu,
        lambda: (normal(0, 128, 197, 1536), normal(1, 1536)), 2,
    )  # fmt: skip
    yield Case(
        "sums of channels (128, 56, 56, 256)", ("channel sums",), channel_sums,
        lambda: (normal(0, 128, 56, 56, 256),), 1,
    )  # fmt: skip
    yield Case(
        "add and LayerNorm (128, 197, 384)", ("layer norm", "layer norm gradient"),
        lambda x, branch, scale, bias: sum(
            ops.add_layer_norm(x, branch, scale, bias, epsilon=1e-6)
        ),
        lambda: (normal(0, 128, 197, 384), normal(1, 128, 197, 384),
                 *(normal(seed, 384, dtype=f32) for seed in (2, 3))), 4,
    )  # fmt: skip
    yield Case(
        "98 largest of 196 (128, 8, 196)", ("top indices",),
        lambda scores: top_indices(scores, 98), lambda: (normal(0, 128, 8, 196, dtype=f32),),
    )  # fmt: skip
    pooling = lambda: (  # noqa: E731
        normal(0, 128, 196, 384), jnp.tile(jnp.arange(98), (128, 1)),
        jnp.abs(normal(1, 128, 196, dtype=f32)),
    )  # fmt: skip
    yield Case(
        "K-Medoids (128, 196, 384) to 98", ("k-medoids",),
        lambda *args: ops.kmedoids(*args).indices, pooling,
    )  # fmt: skip
    yield Case(
        "K-Means (128, 196, 384) to 98", ("k-means",), lambda *args: ops.kmeans(*args).centers,
        pooling,
    )  # fmt: skip
    yield Case(
        "reconstruction (8, 1600, 1024) from 784",
        ("reconstruction, nearest centers", "precise product"), ops.reconstruct_tokens,
        lambda: tuple(normal(seed, 8, size, 1024) for seed, size in enumerate((1600, 784, 784))),
        3,
    )  # fmt: skip


def _scored(q, k, v):
    output, received = ops.scored_attention(q, k, v)
    return output + received[:, :, None, None].astype(output.dtype)


def _grouped(q, k, v, centroids, path):
    return ops.group_attention(q, k, v, centroids, top_k=TOP_K, path=path).output


def _depthwise_after_gelu(x, kernel, bias):
    deferred, sums = ops.defer_gelu(x, bias, with_sums=True)
    scale = jnp.sqrt(1 + sums[1])  # stands for the BatchNorm in between
    return ops.depthwise_block(
        deferred, kernel, input_bias=bias, scale=scale, shift=sums[0], deferred=True, residual=True
    )[0]


def kernel_forms() -> Iterator[Form]:
    """Yields every case with kernels and with the default forms."""
    for name, _, fn, inputs, num_differentiated in kernel_cases():
        arrays = inputs()
        for form, kernels in (("kernels", True), ("default", False)):
            yield Form(name, form, fn, arrays, num_differentiated, kernels)


def attention_forms() -> Iterator[Form]:
    """Yields attention by XLA and by cuDNN, also padded to a multiple of 64."""

    def padded(q, k, v):
        length, to = q.shape[1], -(-q.shape[1] // 64) * 64
        q, k, v = (jnp.pad(x, ((0, 0), (0, to - length), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = jnp.full((len(q),), length, jnp.int32)
        out = jax.nn.dot_product_attention(
            q, k, v, implementation="cudnn", query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
        )  # fmt: skip
        return out[:, :length]

    for shape in ATTENTION_SHAPES:
        images, length, heads, _ = shape
        forms = {
            name: functools.partial(jax.nn.dot_product_attention, implementation=name)
            for name in ("xla", "cudnn")
        }
        if images * heads * length**2 > MAX_LOGITS:
            del forms["xla"]
        for name, fn in (forms | {"cudnn, padded": padded}).items():
            inputs = tuple(normal(seed, *shape) for seed in range(3))
            yield Form(f"attention {shape}", name, fn, inputs, 3)


def group_attention_forms() -> Iterator[Form]:
    """Yields dynamic group attention, its mask of selected keys, and cuDNN's share of it."""

    def by_cudnn(q, k, v, groups, selected):
        q, k, v, groups, selected = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, groups, selected))
        output = attend_dense_by_cudnn(q * q.shape[-1] ** -0.5, k, v, groups, selected)
        return jnp.swapaxes(output, 1, 2)

    def ours(q, k, v, centroids):
        return ops.group_attention(q, k, v, centroids, top_k=TOP_K).output

    for length, heads in ((196, 8), (784, 4)):
        operator = f"group attention (128, {length}, {heads}, 32)"
        qkv = tuple(normal(seed, 128, length, heads, 32) for seed in range(3))
        centroids = normal(3, heads, NUM_GROUPS, 32, dtype=jnp.float32)
        groups = jax.random.randint(jax.random.key(4), (128, length, heads), 0, NUM_GROUPS)
        selected = normal(5, 128, length, heads, NUM_GROUPS) > 1
        scores = normal(6, 128, heads, length, NUM_GROUPS, dtype=jnp.float32)
        yield Form(operator, "ours", ours, (*qkv, centroids), 3)
        yield Form(operator, "cudnn, given the mask", by_cudnn, (*qkv, groups, selected), 3)
        yield Form(operator, "mask: ours", lambda x: largest_mask(x, TOP_K), (scores,), 0)
        yield Form(operator, "keys: lax.top_k", _top_keys, (scores,), 0)


def _top_keys(scores):
    return lax.top_k(jnp.swapaxes(scores, 2, 3), TOP_K)[1]


def depthwise_forms() -> Iterator[Form]:
    """Yields the depthwise 3 x 3 convolution as shifted products and as XLA's convolution."""

    def library(x, kernel):
        return lax.conv_general_dilated(
            x, kernel[:, :, None], (1, 1), "SAME", feature_group_count=x.shape[-1],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    for side, channels in DEPTHWISE_SHAPES:
        inputs = normal(0, 128, side, side, channels), normal(1, 3, 3, channels)
        for name, fn in (("ours", ops.depthwise_conv), ("conv_general_dilated", library)):
            yield Form(f"depthwise 3 x 3 (128, {side}, {side}, {channels})", name, fn, inputs, 2)


def distance_forms() -> Iterator[Form]:
    """Yields the nearest token of every token with products of several precisions."""
    tokens = normal(0, 16, 3136, 64, dtype=jnp.float32)
    presets = lax.DotAlgorithmPreset
    for name, precision in (
        ("HIGHEST", "highest"),
        ("TF32_TF32_F32_X3", presets.TF32_TF32_F32_X3),
        ("BF16_BF16_F32_X3", presets.BF16_BF16_F32_X3),
        ("TF32_TF32_F32", presets.TF32_TF32_F32),
    ):
        fn = functools.partial(_nearest, precision=precision)
        yield Form("products and arg min (16, 3136, 3136), 64 channels", name, fn, (tokens,), 0)


def _nearest(x, precision):
    return jnp.argmin(jnp.einsum("bld,bsd->bls", x, x, precision=precision), -1)


@contextlib.contextmanager
def with_kernels(kernels: bool) -> Iterator[None]:
    """Allows or forbids kernels in what is traced in this context."""
    if kernels:
        yield
        return
    before = os.environ.get("TOKENVIT_JAX_KERNELS")
    os.environ["TOKENVIT_JAX_KERNELS"] = "off"
    jax.clear_caches()  # operators are traced once for their shapes
    try:
        yield
    finally:
        del os.environ["TOKENVIT_JAX_KERNELS"]
        if before is not None:
            os.environ["TOKENVIT_JAX_KERNELS"] = before
        jax.clear_caches()


def measure(form: Form) -> dict[str, float | None]:
    """Returns the times of the forward pass, and of forward and backward together [ms]."""
    with with_kernels(form.kernels):
        return _measure(form)


def _measure(form):
    times = {"forward": _median(form.fn, form.inputs), "both": None}
    if form.num_differentiated and times["forward"] is not None:
        d_output = normal(9, *jax.eval_shape(form.fn, *form.inputs).shape)
        both = forward_backward(form.fn, form.num_differentiated)
        times["both"] = _median(both, (d_output, *form.inputs))
    return times


def _median(fn: Callable[..., Any], inputs: tuple[jax.Array, ...]) -> float | None:
    """Returns the median time of a call [ms]; None if the library or the memory refuses it."""
    fn = jax.jit(fn)
    try:
        times = [_duration(fn, inputs) for _ in range(3 + CALLS)]
    except Exception:  # jax raises many types
        return None
    return 1e3 * statistics.median(times[3:])


def _duration(fn, inputs):
    start = time.perf_counter()
    jax.block_until_ready(fn(*inputs))
    return time.perf_counter() - start


def page(rows: list[tuple[str, str, float | None, float | None]], where: str) -> str:
    """Returns the page for rows (operator, form, forward [ms], forward and backward [ms])."""
    text = lambda number: "-" if number is None else f"{number:.3f}"  # noqa: E731
    lines = [
        *pages.heading(
            "Forms of operators on a GPU",
            __file__,
            f"{where} Shapes are (images, tokens, heads, head dim) or (images, height, width, "
            "channels); times in milliseconds, including the launch of a call.",
        ),
        "",
        *pages.table(
            ["operator", "form", "forward", "forward and backward"],
            ([operator, form, text(first), text(both)] for operator, form, first, both in rows),
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the page."""
    rows = []
    parts = (
        kernel_forms, attention_forms, group_attention_forms, depthwise_forms, distance_forms
    )  # fmt: skip
    for forms in parts:
        for form in forms():
            rows.append((form.operator, form.name, *measure(form).values()))
            print(*rows[-1], flush=True)
    where = f"{datetime.date.today()}, {jax.devices()[0].device_kind}, jax {jax.__version__}."
    RESULT.write_text(page(rows, where))


if __name__ == "__main__":
    main()

"""Times operators at the shapes of the models, each against its obvious alternatives."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.measure import alternatives, detection_operators, mask_operators
from tokenvit_jax.measure.cases import Case
from tokenvit_jax.measure.timing import (
    Program,
    build_all,
    compile_program,
    describe_times,
    fits_memory,
    normal,
    time_in_turns,
)
from tokenvit_jax.ops.group_attention import cheaper_path, cheaper_path_on_cpu

# DGT, Table 1.
HEAD_DIM, NUM_GROUPS, TOP_K = 32, 48, 98
# (length, heads): stages 3, 2 and 1 of DGT-T at 224 x 224, and stage 1 at 512 x 512.
GROUP_ATTENTION_SHAPES = ((196, 8), (784, 4), (3136, 2), (16384, 2))
# (side, channels): the convolution inside the feed-forward network of each stage at 224 x 224.
DEPTHWISE_SHAPES = {
    "dgt_t": ((56, 256), (28, 512), (14, 1024), (7, 2048)),
    "dgt_b": ((56, 512), (28, 1024), (14, 2048), (7, 4096)),
}
# (length, heads, head dim): stage 4 of DGT-T; DeiT-S; DeiT-S at 384 x 384.
ATTENTION_SHAPES = ((49, 16, 32), (197, 6, 64), (577, 6, 64))
# (tokens, channels): stage 1 of ClusTR at 224 x 224, 512 x 512 and 800 x 1344.
CLUSTER_SHAPES = ((3136, 64), (16384, 64), (67200, 64))
# (tokens, clusters, channels): blocks of DeiT-S at level 3 of Token Pooling, and K = N / 4.
POOLING_SHAPES = ((194, 187, 384), (187, 163, 384), (118, 85, 384), (196, 49, 384))
# (grid, clusters, channels): Segmenter with ViT-L/16 at 640 x 640, and at 1024 x 2048.
SUPERPIXEL_SHAPES = (((40, 40), (28, 28), 1024), ((64, 128), (32, 64), 1024))
# Tokens per cluster in stage 1 of ClusTR, fine scale.
CLUSTER_RATIO = 16


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def benchmark_operator(
    name: str, batch_size: int | None, dtype: jnp.dtype, modes: Sequence[str]
) -> list[dict[str, Any]]:
    """Times an operator and its alternatives at the shapes of the models.

    Args:
      name: a key of :data:`CASES`.
      batch_size: images per batch; None: the default of the operator.
      dtype: type of the computation.
      modes: "forward", "train" (forward and backward) or both.

    Returns:
      A row for every case and mode, see :func:`benchmark_case`.

    Raises:
      UserError: only "train" is requested, and the operator has no gradient.
    """
    rows = [
        benchmark_case(case, mode)
        for case in CASES[name](batch_size, dtype)
        for mode in modes
        if mode == "forward" or case.num_differentiated
    ]
    if not rows:
        raise UserError(f"--op={name} has no gradient; it takes --mode=forward")
    return rows


def benchmark_case(case: Case, mode: str, *, seconds: float = 2.0) -> dict[str, Any]:
    """Times all contenders of a case in turns.

    Args:
      case: operator, shape and contenders.
      mode: "forward", or "train" for forward and backward.
      seconds: approximate time to spend on each contender [s].

    Returns:
      The shape; "contenders", the numbers of each contender; and "speedup", the time of the obvious
      alternative divided by ours, or None if the alternative does not fit into memory and is only
      compiled.
    """
    inputs = case.inputs
    if mode == "train":
        result = jax.eval_shape(next(iter(case.contenders.values())), *inputs)
        inputs = (normal(9, result.shape, result.dtype), *inputs)
    builders = {}
    for name, fn in case.contenders.items():
        fn = fn if mode == "forward" else forward_backward(fn, case.num_differentiated)
        builders[name] = functools.partial(compile_program, fn, *inputs)
    programs = build_all(builders)
    calls = {
        name: lambda program=program: program.call(*inputs)
        for name, program in programs.items()
        if fits_memory(program.temp_bytes)
    }
    peers = case.peers(mode)
    times = time_in_turns(peers | calls, seconds=seconds)
    timings = {name: describe_times(programs[name], times.get(name, [])) for name in programs}
    alternative, *_, ours = (timing["median_ms"] for timing in timings.values())
    speedup = alternative / ours if alternative and ours else None
    unknown = Program(None, None, None, None)
    timings = {name: describe_times(unknown, times[name]) for name in peers} | timings
    return {**case.shape, "mode": mode, "speedup": speedup, "contenders": timings}


def forward_backward(fn: Callable[..., jax.Array], num_differentiated: int) -> Callable:
    """Returns ``run(d_output, *inputs) -> output, gradients`` of the leading inputs."""

    def run(d_output, *inputs):
        differentiated, rest = inputs[:num_differentiated], inputs[num_differentiated:]
        output, pull = jax.vjp(lambda *xs: fn(*xs, *rest), *differentiated)
        return output, pull(d_output)

    return run


# ------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------


def group_attention_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=GROUP_ATTENTION_SHAPES
) -> Iterator[Case]:
    """Yields attention in dynamic groups against attention of all queries with all keys.

    "eq7" is the speed-up that the operation counts of the DGT paper promise: 2L^2C divided by
    2kLC + 2LGC + kG log L.
    """
    for length, heads in shapes:
        shape = (batch_size or 1, length, heads, HEAD_DIM)
        yield Case(
            shape={
                "length": length,
                "heads": heads,
                "path": _path(shape),
                "eq7": 2 * length**2 * heads * HEAD_DIM / equation_6(length, heads * HEAD_DIM),
            },
            inputs=(
                *(normal(seed, shape, dtype) for seed in range(3)),
                normal(3, (heads, NUM_GROUPS, HEAD_DIM)),
            ),
            num_differentiated=3,
            contenders={
                "einsum": lambda q, k, v, _: alternatives.einsum_attention(q, k, v),
                **_cudnn_attention(shape, dtype),
                "heads_first": lambda q, k, v, _: ops.dot_product_attention(q, k, v),
                "group": lambda q, k, v, c: ops.group_attention(q, k, v, c, top_k=TOP_K).output,
            },
        )


def _path(shape):
    """Returns the path of group attention on this device."""
    top_k = min(TOP_K, shape[1])
    if jax.default_backend() == "cpu":
        return cheaper_path_on_cpu(shape, NUM_GROUPS, top_k)
    return cheaper_path(shape[1], NUM_GROUPS, top_k)


def _cudnn_attention(shape, dtype):
    """Returns attention by cuDNN as a contender, where it takes queries of this shape and type."""

    def attend(q, k, v, *_):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    q = jax.ShapeDtypeStruct(shape, dtype)
    try:
        jax.eval_shape(attend, q, q, q)
    except (RuntimeError, ValueError, NotImplementedError):  # no GPU, or not this shape or type
        return {}
    return {"cudnn": attend}


def equation_6(length: int, channels: int) -> float:
    """Returns 2kLC + 2LGC + kG log L, the operations of group attention (Eq. 6 of DGT)."""
    per_channel = 2 * TOP_K * length + 2 * length * NUM_GROUPS
    return per_channel * channels + TOP_K * NUM_GROUPS * math.log2(length)


def depthwise_conv_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=DEPTHWISE_SHAPES
) -> Iterator[Case]:
    """Yields 3x3 depthwise convolutions against XLA's with one feature group per channel."""

    def grouped(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    for model, sizes in shapes.items():
        for side, channels in sizes:
            yield Case(
                shape={"model": model, "side": side, "channels": channels},
                inputs=(
                    normal(0, (batch_size or 8, side, side, channels), dtype),
                    normal(1, (3, 3, channels), dtype),
                ),
                num_differentiated=2,
                contenders={"feature_groups": grouped, "depthwise_conv": ops.depthwise_conv},
            )


def dot_product_attention_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=ATTENTION_SHAPES
) -> Iterator[Case]:
    """Yields attention of all queries with all keys against plain einsum and JAX's function."""
    for length, heads, dim in shapes:
        shape = (batch_size or 8, length, heads, dim)
        yield Case(
            shape={"length": length, "heads": heads, "head_dim": dim},
            inputs=tuple(normal(seed, shape, dtype) for seed in range(3)),
            num_differentiated=3,
            contenders={
                "einsum": alternatives.einsum_attention,
                "jax.nn": jax.nn.dot_product_attention,
                "heads_first": ops.dot_product_attention,
            },
        )


def cluster_density_peaks_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=CLUSTER_SHAPES
) -> Iterator[Case]:
    """Yields clustering by density peaks against the same with all distances at once.

    Clusters have no gradient. On most machines, the obvious form is only compiled for the longest
    input, because it does not fit into memory.
    """
    for length, channels in shapes:
        num_clusters = length // CLUSTER_RATIO
        cluster = functools.partial(ops.cluster_density_peaks, num_clusters=num_clusters)
        yield Case(
            shape={"tokens": length, "channels": channels, "clusters": num_clusters},
            inputs=(normal(0, (batch_size or 1, length, channels), dtype),),
            num_differentiated=0,
            contenders={
                "unchunked": functools.partial(
                    alternatives.cluster_unchunked, num_clusters=num_clusters
                ),
                "density_peaks": lambda x, cluster=cluster: cluster(x).assignment,
            },
        )


def kmedoids_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=POOLING_SHAPES
) -> Iterator[Case]:
    """Yields K-Medoids against its equations as products with the membership in K clusters.

    "masked" is a compromise: one masked sum over N x N distances for all clusters.
    """
    contenders = {
        "products": alternatives.kmedoids_by_products,
        "masked": alternatives.kmedoids_by_masks,
        "kmedoids": lambda x, initial: ops.kmedoids(x, initial).indices,
    }
    return _pooling_cases(batch_size, dtype, shapes, contenders)


def kmeans_cases(batch_size: int | None, dtype: jnp.dtype, shapes=POOLING_SHAPES) -> Iterator[Case]:
    """Yields K-Means against its equations as products with the membership in K clusters."""
    contenders = {
        "products": alternatives.kmeans_by_products,
        "kmeans": lambda x, initial: ops.kmeans(x, initial).centers,
    }
    return _pooling_cases(batch_size, dtype, shapes, contenders)


def _pooling_cases(batch_size, dtype, shapes, contenders):
    batch = batch_size or 8
    for length, num_clusters, channels in shapes:
        tokens = normal(0, (batch, length, channels), dtype)
        draw = np.random.default_rng(1)
        first = np.stack([draw.permutation(length)[:num_clusters] for _ in range(batch)])
        yield Case(
            shape={"tokens": length, "clusters": num_clusters, "channels": channels},
            inputs=(tokens, jnp.asarray(first, jnp.int32)),
            num_differentiated=0,  # the result has fewer tokens than the input
            contenders=contenders,
        )


def cluster_superpixels_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=SUPERPIXEL_SHAPES
) -> Iterator[Case]:
    """Yields soft clustering in neighbourhoods against the same with all centres and a mask."""
    for grid, clusters, channels in shapes:
        tokens = normal(0, (batch_size or 1, math.prod(grid), channels), dtype)
        sides = {"grid": grid, "clusters": clusters}
        yield Case(
            shape=_superpixel_shape(grid, clusters, channels),
            inputs=(tokens,),
            num_differentiated=0,  # the result has fewer tokens than the input
            contenders={
                "masked": functools.partial(alternatives.cluster_superpixels_masked, **sides),
                "tiles": functools.partial(ops.cluster_superpixels, **sides),
            },
        )


def reconstruct_tokens_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=SUPERPIXEL_SHAPES
) -> Iterator[Case]:
    """Yields reconstruction from the 20 nearest centres against `lax.top_k`."""
    for grid, clusters, channels in shapes:
        batch = batch_size or 1
        few, many = (batch, math.prod(clusters), channels), (batch, math.prod(grid), channels)
        yield Case(
            shape=_superpixel_shape(grid, clusters, channels),
            inputs=tuple(normal(seed, shape, dtype) for seed, shape in enumerate((many, few, few))),
            num_differentiated=3,
            contenders={
                "top_k": alternatives.reconstruct_by_top_k,
                "nearest": ops.reconstruct_tokens,
            },
        )


def _superpixel_shape(grid, clusters, channels):
    names = ("{}x{}".format(*sides) for sides in (grid, clusters))
    return dict(zip(("grid", "clusters"), names, strict=True)) | {"channels": channels}


CASES = {
    "group_attention": group_attention_cases,
    "depthwise_conv": depthwise_conv_cases,
    "dot_product_attention": dot_product_attention_cases,
    "cluster_density_peaks": cluster_density_peaks_cases,
    "kmedoids": kmedoids_cases,
    "kmeans": kmeans_cases,
    "cluster_superpixels": cluster_superpixels_cases,
    "reconstruct_tokens": reconstruct_tokens_cases,
    **detection_operators.CASES,
    **mask_operators.CASES,
}

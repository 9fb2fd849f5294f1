"""On a simulated GPU, operators and networks give the same with kernels as on a CPU without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from lowering import training_step
from operator_cases import CASES, cast
from programs import lower
from shipped_configs import load_config
from simulated_gpu import noted_kernels, simulated_gpu
from test_models_on_device import SIZE, network
from test_models_on_device import run_of as network_run
from test_operators_on_device import NAMES, run_of
from tolerances import TOLERANCES, distance, problems

from tokenvit_jax.kernels import arithmetic, cudnn, platforms

# Calls with kernels of ours; attention by cuDNN and XLA's operations would need a GPU.
WITH_KERNELS = {
    "add_layer_norm", "affine_gradient", "affine_of", "assign_clusters", "assign_targets",
    "bias_gelu", "bipartite_matching", "channel_affine", "channel_sums", "cluster_density_peaks",
    "clustered_attention", "defer_gelu", "density_peaks", "depthwise_block", "depthwise_branches",
    "depthwise_conv", "group_attention", "group_sums", "kmeans", "kmedoids", "layer_norm",
    "merge_tokens", "query_prototypes", "update_centroids", "used_clusters", "window_attention",
}  # fmt: skip
CALLS = [x for x in NAMES if x[0] in WITH_KERNELS] + [("dot_product_attention", "odd length")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), CALLS, ids=lambda part: part.replace(" ", "_"))
def test_operator(name, call, cpu, monkeypatch):
    case, found = CASES[name][call], []
    expected = lower(run_of(case), cast(case, "float32"), cpu, "float32").compile()
    monkeypatch.setattr(platforms, "platform_of", lambda device: "cuda")
    jax.clear_caches()
    for dtype in ("float32", "bfloat16"):
        inputs = cast(case, dtype)
        rounded = tuple(x.astype("float32") if x.dtype == dtype else x for x in inputs)
        right = jax.device_get(expected(*rounded))
        with simulated_gpu() as gpu:
            left = jax.device_get(lower(run_of(case), inputs, cpu, dtype).compile()(*inputs))
        lines = problems(left, right, dtype, case.chooses) + gpu.faults
        found += [f"{dtype}: {line}" for line in lines]
    assert not found, "\n".join(found)
    assert gpu.ran


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dgt", "clustr", "pale"])
def test_network(name, cpu, monkeypatch):
    draw = np.random.default_rng(0)
    images = draw.standard_normal((2, SIZE, SIZE, 3), np.float32)
    model = network(name, "float32")
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images[:1])
    inputs = jax.device_get((variables, images, np.array([3, 7], np.int32)))
    gradient, logits = lower(network_run(model), inputs, cpu, "float32").compile()(*inputs)
    monkeypatch.setattr(platforms, "platform_of", lambda device: "cuda")
    with simulated_gpu() as gpu:
        run = network_run(network(name, "bfloat16"))
        found = jax.device_get(lower(run, inputs, cpu, "bfloat16").compile()(*inputs))
    assert distance(found[1], logits) <= TOLERANCES["bfloat16"].network
    assert distance(found[0], gradient) <= TOLERANCES["bfloat16"].gradient
    assert "window_attention_gradient" in gpu.ran
    assert not gpu.faults


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), [("dgt_t", 2688), ("clustr_t", 1344)])
def test_kernels_of_training_steps_stay_in_their_arrays(name, images, monkeypatch):
    """Also where arrays have more than 2^31 numbers, so that 32 bits do not tell their places."""
    kernels = noted_kernels(monkeypatch)
    config = load_config(name)
    config.batch_size = images
    step, *arguments = training_step(config)
    with cudnn.assumed(), platforms.kernels_traced_once():
        jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",))
    found = []
    for kernel in kernels:
        last = kernel.num_programs - 1
        inputs = [np.zeros(x.shape, x.dtype) for x in kernel.inputs]  # as yet without memory
        found += kernel.run(inputs, programs=sorted({0, last // 2, last}))[1]
    assert len(kernels) > 10
    assert not found, "\n".join(found)


def test_sum_of_rows_and_what_is_larger_than_not_a_number():
    def kernel(x, total, larger, larger_or_nan):
        rows = jax.lax.fori_loop(0, 4, lambda i, rows: rows + x[i], jnp.zeros(16))
        total[...] = jnp.sum(rows)
        larger[...] = jnp.maximum(x[0], 1.0)
        larger_or_nan[...] = arithmetic.maximum(x[0], 1.0)

    x = np.arange(64, dtype=np.float32).reshape(4, 16)
    x[0, 0] = np.nan
    results, faults = called(kernel, x, shapes=[(), (16,), (16,)])
    larger = np.maximum(np.nan_to_num(x[0], nan=1), 1)
    with_nan = np.where(np.isnan(x[0]), np.nan, larger)
    np.testing.assert_array_equal(results[1], larger)  # as instructions of a GPU have it
    np.testing.assert_array_equal(results[2], with_nan)
    assert np.isnan(results[0]) and not faults


def test_what_a_mask_leaves_out_is_not_a_number():
    def kernel(x, half, filled):
        mask = jnp.arange(16) < 8
        half[...] = plt.load(x.at[...], mask=mask)
        filled[...] = plt.load(x.at[...], mask=mask, other=0.0)

    x = np.arange(16, dtype=np.float32)
    (half, filled), faults = called(kernel, x, shapes=[(16,), (16,)])
    np.testing.assert_array_equal(half, np.where(x < 8, x, np.nan))
    np.testing.assert_array_equal(filled, np.where(x < 8, x, 0))
    assert not faults


def reversed_place():
    return 15 - jnp.arange(16)


def reads_outside(x, y):
    y[...] = plt.load(x.at[jnp.arange(16) + 1])


def reads_nothing_written(x, y):
    y[...] = x[...] + y[...]


def needs_a_barrier(x, y):
    y[...] = x[...]
    y[...] = plt.load(y.at[reversed_place()])


def needs_a_barrier_for_a_number(x, y):
    y[0] = x[0]
    y[1] = y[0] + 1


def needs_a_barrier_after_reading(x, y):
    y[...] = x[...]
    plt.debug_barrier()
    back = plt.load(y.at[reversed_place()])
    y[...] = back + y[...]


def needs_a_barrier_in_another_shape(x, y):
    place = jnp.arange(256)
    plt.store(y.at[place], plt.load(x.at[place % 16]))
    square = 16 * jnp.arange(16)[:, None] + jnp.arange(16)
    plt.store(y.at[square], plt.load(y.at[square]) + 1)


def has_its_barriers(x, y):
    y[...] = x[...]
    plt.debug_barrier()
    back = plt.load(y.at[reversed_place()])
    plt.debug_barrier()
    y[...] = back


def programs_disagree(x, y):
    y[...] = x[...] + pl.program_id(0)


def programs_agree(x, y):
    y[...] = x[...]


def one_place(x, y):
    y[...] = x[...]
    plt.debug_barrier()
    plt.store(y.at[jnp.arange(16) // 2], x[...])


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (reads_outside, "is outside of (16,), at 1 to 16"),
        (reads_nothing_written, "reads what nobody has written"),
        (needs_a_barrier, "reads what another thread wrote, without a barrier"),
        (needs_a_barrier_for_a_number, "reads what another thread wrote, without a barrier"),
        (needs_a_barrier_after_reading, "writes what another thread reads, without a barrier"),
        (needs_a_barrier_in_another_shape, "reads what another thread wrote, without a barrier"),
        (has_its_barriers, None),
        (programs_disagree, "writes what another program writes"),
        (programs_agree, None),
        (one_place, "writes several values to one place"),
    ],
)
def test_faults_are_found(kernel, fault):
    grid = (2,) if "programs" in kernel.__name__ else ()
    size = 256 if "shape" in kernel.__name__ else 16
    _, faults = called(kernel, np.arange(16, dtype=np.float32), shapes=[(size,)], grid=grid)
    assert not faults if fault is None else any(fault in line for line in faults), faults


def called(kernel, x, shapes, grid=()):
    """Calls a kernel on the simulated GPU; returns results and faults."""
    call = pl.pallas_call(
        kernel,
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=grid,
        compiler_params=plt.CompilerParams(),
    )
    with simulated_gpu() as gpu:
        results = jax.device_get(jax.jit(call)(x))
    assert gpu.ran == [kernel.__name__]
    return results, gpu.faults

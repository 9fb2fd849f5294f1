"""The origins of a GPU's kernels, by the names that a profiler shows."""

import jax
import pytest

from tokenvit_jax.measure import profile
from tokenvit_jax.measure.profile import UNKNOWN, origins_of_kernels

PROGRAM = """
HloModule jit_f

%fused_computation.3 (p.0: f32[8]) -> f32[8] {
  %slice.1 = f32[8]{0} dynamic-slice(%p.0), metadata={op_name="jit(f)/attention/slice"}
  ROOT %product.1 = f32[8]{0} custom-call(%slice.1), metadata={op_name="jit(f)/attention/dot"}
}

ENTRY %main.9 (x: f32[8]) -> f32[8] {
  %library.4 = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused_computation.3
  %loop_fusion.7 = f32[8]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(f)/mlp/add"}
  %call.2 = f32[8]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/norm1/layer_norm"}, backend_config={grid_x = 4 : i32, name = "layer_norm"}
}
"""


def test_kernels_bear_the_names_of_their_operations_or_their_own():
    origins = origins_of_kernels(PROGRAM)
    assert origins["loop_fusion.7"] == origins["loop_fusion_7"] == "jit(f)/mlp/add"
    assert origins["call_2"] == origins["layer_norm"] == "jit(f)/norm1/layer_norm"
    assert origins["library_4"] == "jit(f)/attention/dot"  # that of what the fusion calls


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (("loop_fusion.7", "loop_fusion_7"), "jit(f)/mlp/add"),
        (("command_buffer_3", "loop_fusion_7"), "jit(f)/mlp/add"),
        (("command_buffer_3", "layer_norm"), "jit(f)/norm1/layer_norm"),
        # XLA tells kernels of one name, of other shapes, apart.
        (("command_buffer_3", "layer_norm__1"), "jit(f)/norm1/layer_norm"),
        (("command_buffer_3", "layer_norm__1_2"), UNKNOWN),
        (("library.4", "nvjet_tst"), "jit(f)/attention/dot"),
        (("command_buffer_3", "nvjet_tst"), UNKNOWN),
        (("MemcpyD2D",), ""),
    ],
)
def test_events_of_a_gpu(monkeypatch, names, part):
    monkeypatch.setattr(profile, "trace", lambda run: [(names, 2_000_000)])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compiled = jax.stages.Compiled.__new__(jax.stages.Compiled)
    monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda self: PROGRAM)
    times = profile.times_of_parts(compiled, lambda: (), part_of=lambda origin: origin)
    assert times[part] == 2.0 and sum(times.values()) == 2.0

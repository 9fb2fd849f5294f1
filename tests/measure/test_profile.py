"""The origins of a GPU's kernels, by the names that a profiler shows."""

from tokenvit_jax.measure.profile import origins_of_kernels

PROGRAM = """
  %loop_fusion.7 = f32[8]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(f)/mlp/add"}
  %call.2 = f32[8]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/norm1/layer_norm"}, backend_config={grid_x = 4 : i32, name = "layer_norm"}
"""


def test_kernels_bear_the_names_of_their_operations_or_their_own():
    origins = origins_of_kernels(PROGRAM)
    assert origins["loop_fusion.7"] == origins["loop_fusion_7"] == "jit(f)/mlp/add"
    assert origins["call_2"] == origins["layer_norm"] == "jit(f)/norm1/layer_norm"

"""The reader of compiled programs, on two small programs that were compiled for two targets.

Both convolve images (8 x 8, 4 channels) with a 3 x 3 kernel in steps of 2, multiply with a matrix
(128, 64), sort five times in a loop, multiply in full float32 precision, and add up.
"""

from pathlib import Path

import pytest

from tokenvit_jax.ahead.hlo import Collective, Message, read_program
from tokenvit_jax.ahead.hlo_text import main_memory_bytes, shape_bytes
from tokenvit_jax.ahead.products import Work

FOLDER = Path(__file__).parent


def read(name):
    return read_program((FOLDER / f"{name}.hlo").read_text())


def kernel(program, name):
    (found,) = [kernel for kernel in program.kernels if kernel.name == name]
    return found


def test_program_for_a_gpu():
    program = read("h100x2")  # 8 images on each
    assert sum(kernel.times for kernel in program.kernels) == 9 + 3 * 5
    assert program.unknown_loops == 0
    convolution = kernel(program, "cudnn-conv.2")
    assert convolution.work == (Work(2 * 8 * 4 * 4 * 8 * 3 * 3 * 4, "bfloat16"),)
    assert convolution.bytes == 2 * (8 * 9 * 9 * 4 + 8 * 4 * 4 * 8 + 3 * 3 * 4 * 8)
    product = kernel(program, "custom-call.4")
    assert product.work == (Work(2 * 8 * 128 * 64, "bfloat16"),)
    assert product.bytes == 2 * (8 * 128 + 128 * 64 + 8 * 64)  # without the library's workspace
    assert kernel(program, "custom-call.5").work == (Work(2 * 8 * 128 * 64, "float32"),)
    sort = kernel(program, "fusion")
    assert (sort.times, sort.origin) == (5, "jit(fn)/while/body/closed_call/jit(sort)/sort")
    assert program.collectives == [Collective(1, "all-reduce", (Message(4, "jit(fn)/reduce_sum"),))]


def test_program_for_a_tpu():
    program = read("v5e_2x2")  # 4 images on each
    convolution = kernel(program, "fusion")
    # One row and one column of padding: 11 of 12 pairs of places and kernel rows meet a pixel.
    assert convolution.work == (Work(2 * 4 * 8 * 11 * 11 * 4, "bfloat16"),)
    assert convolution.bytes == 0  # all of it is in the memory on the chip
    assert kernel(program, "copy-start").bytes == 2 * 128 * 64
    assert kernel(program, "fusion.1").work == (Work(2 * 4 * 128 * 64, "bfloat16"),)
    assert kernel(program, "sort.17").times == 5  # the bound is in the condition of the loop
    assert program.unknown_loops == 0
    assert [collective.kind for collective in program.collectives] == ["all-reduce"]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[2,3]{1,0}", 12),
        ("(f32[4]{0}, pred[8], s32[])", 16 + 8 + 4),
        ("f8e4m3fn[16]", 16),
        ("s4[16]", 8),
        ("bf16[16,4096]{1,0:T(8,128)(2,1)S(1)}", 2 * 16 * 4096),
        ("token[]", 0),
    ],
)
def test_bytes(shape, size):
    assert shape_bytes(shape) == size
    assert main_memory_bytes(shape) == (0 if "S(1)" in shape else size)


COPIES = """
ENTRY %main (weight: f32[512,256]) -> f32[512,256] {
  %weight = f32[512,256]{1,0} parameter(0)
  %slice-start = ((f32[512,256]{1,0}), f32[128,256]{1,0:S(1)}, s32[]) slice-start(%weight)
  %slice-done = f32[128,256]{1,0:S(1)} slice-done(%slice-start)
  %copy-start = (f32[128,256]{1,0}, f32[128,256]{1,0:S(1)}, u32[]) copy-start(%slice-done)
  %copy-start.1 = (f32[512,256]{1,0}, f32[512,256]{1,0}, u32[]) copy-start(%weight)
}
"""


def test_copies_beside_the_computation():
    found = {kernel.name: kernel.bytes for kernel in read_program(COPIES).kernels}
    slice_, whole = 4 * 128 * 256, 4 * 512 * 256
    assert found == {"slice-start": slice_, "copy-start": slice_, "copy-start.1": 2 * whole}


MESSAGES = """
ENTRY %main (x: f32[1000], y: f32[24]) -> (f32[1000], f32[24]) {
  %x = f32[1000]{0:T(1024)} parameter(0)
  %y = f32[24]{0:T(128)S(1)} parameter(1)
  ROOT %all-reduce = (f32[1000]{0:T(1024)}, f32[24]{0:T(128)S(1)}) all-reduce(%x, %y), to_apply=%add
}
"""


def test_messages_from_the_memory_on_the_chip():
    (collective,) = read_program(MESSAGES).collectives
    assert collective.bytes == 4 * 1024


SLICES = """
%sliced (x: f32[100], i: s32[], y: f32[8]) -> f32[8] {
  %x = f32[100]{0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[8]{0} parameter(2)
  %first = f32[8]{0} slice(%x), slice={[0:8]}
  %second = f32[8]{0} dynamic-slice(%x, %i), dynamic_slice_sizes={8}
  %squares = f32[100]{0} multiply(%x, %x)
  %squared = f32[8]{0} slice(%squares), slice={[0:8]}
  %first_sum = f32[8]{0} add(%first, %squared)
  %sum = f32[8]{0} add(%first_sum, %second)
  ROOT %both = f32[8]{0} add(%sum, %y)
}

ENTRY %main (x: f32[100], i: s32[], y: f32[8]) -> f32[8] {
  %x = f32[100]{0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[8]{0} parameter(2)
  ROOT %fusion = f32[8]{0} fusion(%x, %i, %y), kind=kLoop, calls=%sliced
}
"""


def test_of_an_operand_that_is_sliced_only_the_slices_are_read():
    (fusion,) = read_program(SLICES).kernels
    assert fusion.bytes == 4 * (8 + 2 * 8 + 1 + 8)
    (whole,) = read_program(SLICES.replace("multiply(", "reverse(")).kernels
    assert whole.bytes == 4 * (8 + 100 + 1 + 8)
    (reshaped,) = read_program(SLICES.replace("multiply(%x, %x)", "bitcast(%x)")).kernels
    assert reshaped.bytes == fusion.bytes


def test_an_array_that_is_an_operand_twice_is_read_once():
    text = SLICES.replace(
        "fusion(%x, %i, %y), kind=kLoop, calls=%sliced", "custom-call(%y, %y, %i)"
    )
    (call,) = read_program(text).kernels
    assert call.bytes == 4 * (8 + 8 + 1)


GATHER = """
ENTRY %main (a: f32[2,4], b: bf16[6]) -> (f32[16,4], bf16[48]) {
  %a = f32[2,4]{1,0} parameter(0), metadata={op_name="a"}
  %b = bf16[6]{0} parameter(1), metadata={op_name="b"}
  %start = ((f32[2,4]{1,0}, bf16[6]{0}), (f32[16,4]{1,0}, bf16[48]{0})) all-gather-start(%a, %b), \
dimensions={0}
  ROOT %done = (f32[16,4]{1,0}, bf16[48]{0}) all-gather-done(%start)
}
"""


@pytest.mark.parametrize("start", [True, False])
def test_a_gather_counts_with_its_results(start):
    text = GATHER
    if not start:  # results only
        text = text.replace("((f32[2,4]{1,0}, bf16[6]{0}), ", "").replace(
            "[48]{0})) a", "[48]{0}) a"
        )
        text = text.replace("all-gather-start", "all-gather")
    messages = Message(4 * 16 * 4, "a"), Message(2 * 48, "b")
    assert read_program(text).collectives == [Collective(1, "all-gather", messages)]


LIBRARY = """
ENTRY %main (q: bf16[2,4,8,16]) -> bf16[2,4,8,16] {
  %q = bf16[2,4,8,16]{3,2,1,0} parameter(0)
  %k = bf16[2,4,32,16]{3,2,1,0} parameter(1)
  %call = (bf16[2,4,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="TARGET", \
backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":\
["2","4","8","32"]}}}
}
"""


@pytest.mark.parametrize(("target", "products"), [("", 2), ("Backward", 5)])
def test_attention_of_a_library(target, products):
    text = LIBRARY.replace("TARGET", f"__cudnn$fmhaSoftmax{target}")
    (attention,) = read_program(text).kernels
    assert attention.work == (Work(products * 2 * (2 * 4 * 8 * 32) * 16, "bfloat16"),)


GROUPED = """
ENTRY %main (x: f32[2,8,8,4]) -> f32[2,8,8,4] {
  %x = f32[2,8,8,4]{3,2,1,0} parameter(0)
  %k = f32[3,3,1,4]{3,2,1,0} parameter(1)
  %y = f32[2,8,8,4]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_01io->b01f, feature_group_count=4
  %z = f32[2,8,8]{2,1,0} dot(%y, %k), lhs_batch_dims={0}, lhs_contracting_dims={3}, \
algorithm=dot_tf32_tf32_f32_x3
  %unknown = f32[] while(%z), condition=%c, body=%b
}

%c (p: f32[]) -> pred[] {
  %p = f32[] parameter(0)
  ROOT %less = pred[] compare(%p, %p), direction=GT
}

%b (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  ROOT %copy = f32[] copy(%p)
}
"""


def test_groups_passes_and_loops_that_depend_on_data():
    program = read_program(GROUPED)
    convolution, product, copy = program.kernels
    assert convolution.work == (Work(2 * 2 * 4 * 22 * 22, "default"),)
    assert product.work == (Work(3 * 2 * 2 * 8 * 8 * 4, "default"),)
    assert (copy.times, program.unknown_loops) == (1, 1)

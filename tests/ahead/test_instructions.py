"""Launches of a program's kernels, from files as XLA's GPU compiler writes them."""

import pytest

from tokenvit_jax.ahead.hlo import read_program
from tokenvit_jax.ahead.instructions import read_launches
from tokenvit_jax.ahead.products import Work

ENTRY = """.visible .entry NAME(
\t.param .u64 .ptr .align 256 NAME_param_0
)
.reqntid 128, 1, 1
{
BODY
\tret;
}
"""
SUM = "\tadd.rn.f32 \t%f1, %f1, %f3;"
SEARCH = """$L__BB0_1:
\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };
\tld.global.b32 \t%r5, [%rd1];
\tsetp.ne.b32 \t%p1, %r5, 0;
\t@%p1 bra \t$L__BB0_1;"""
SEQUENCE = """\
001: kCopy           [source       | next=003 (2)] kCopy
002: kCublasLtMatmul [prev=001 (1) | next=003 (1)] kCublasLtMatmul
003: kWhile        [prev=002 (1) | next=005 (1)]
condition:
    004: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1] threads: [1, 1, 1]  \
shared_memory: 0 bytes
  body:
    005: kCustomKernel   [source       | sink        ] loop_add_fusion grid: [1, 1, 1] \
threads: [1, 1, 1]  shared_memory: 0 bytes
    006: kCustomKernel   [source       | next=007 (1)] find__1 grid: [4, 5, 6] \
threads: [128, 1, 1]  shared_memory: 512 bytes
007: kCustomKernel [prev=003 (1) | next=008 (1)] sort_6_1 grid: [16, 1, 1] threads: [1024, 1, 1] \
 shared_memory: 0 bytes
008: kCustomKernel [prev=007 (1) | sink        ] sort_6_1__1 grid: [64, 1, 1] \
threads: [16, 2, 1]  shared_memory: 0 bytes
009: kCustomKernel [prev=007 (1) | sink        ] elsewhere grid: [1, 1, 1] threads: [1, 1, 1] \
 shared_memory: 0 bytes
"""
NAMES = {
    1: "copy.1", 2: "custom-call.1", 3: "while.10", 4: "loop_add_fusion", 5: "loop_add_fusion.2",
    6: "pallas_call.3", 7: "fusion", 8: "fusion", 9: "fusion.7",
}  # fmt: skip
HLO = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%sorted
  ROOT %pallas_call.3 = f32[8]{0} custom-call(%fusion), \
custom_call_target="__gpu$xla.gpu.triton"
}
"""


@pytest.fixture
def folder(tmp_path):
    def write(name, text):
        (tmp_path / f"module_0001.jit_step.{name}").write_text(text)

    def entry(name, body):
        return ENTRY.replace("NAME", name).replace("BODY", body)

    write("1.ptx", entry("loop_add_fusion", SUM) + entry("sort_6_1", SUM))
    write("12.ptx", entry("find__1", SEARCH))
    write("13.ptx", entry("sort_6_1__1", f"{SUM}\n{SUM}"))
    write("thunk_sequence.txt", SEQUENCE)
    # Thunks without a number follow each other in the same file.
    head = 'thunk_metadata {\n  thunk_info {\n    profile_annotation: "command_buffer_1"\n  }\n}\n'
    write("thunk_metadata.txt", head + "".join(
        f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n    '
        f'thunk_id: {number}\n  }}\n  thunk_kind: "kCustomKernel"\n}}\n'
        for number, name in NAMES.items()
    ))  # fmt: skip
    return tmp_path


def test_launches_by_instruction(folder):
    found = read_launches(folder)
    assert set(found) == {"loop_add_fusion", "loop_add_fusion.2", "pallas_call.3", "fusion"}
    (find,) = found["pallas_call.3"]
    assert (find.blocks, find.threads, find.warps) == (120, 128, 4)
    assert (find.counts.pipes["memory"], find.counts.unknown_loops) == (1, 1)
    first, second = found["fusion"]  # a sort takes several launches
    assert (first.blocks, first.threads, first.counts.pipes["float"]) == (16, 1024, 1)
    assert (second.blocks, second.threads, second.counts.pipes["float"]) == (64, 32, 2)


def test_a_folder_without_files(tmp_path):
    assert read_launches(tmp_path) == {}


def test_kernels_have_the_products_of_their_launches(folder):
    program = read_program(HLO, read_launches(folder))
    sort, find = program.kernels
    assert len(sort.launches) == 2 and sort.work == ()
    assert find.work == (Work(120 * 4 * 2 * 16 * 8 * 16, "bfloat16"),)
    assert program.unknown_loops == 1
    plain = read_program(HLO)
    assert [kernel.launches for kernel in plain.kernels] == [(), ()] and not plain.unknown_loops

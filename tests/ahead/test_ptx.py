"""Instructions of kernels, from their assembly."""

import pytest

from tokenvit_jax.ahead.ptx import PIPES, read_kernels

KERNEL = """
.visible .entry first(
\t.param .u64 .ptr .align 16 first_param_0
)
.reqntid 128, 1, 1
{
\t.reg .b32 \t%r<9>;
BODY
\tret;
}
"""


def count(body):
    return read_kernels(KERNEL.replace("BODY", body))["first"]


def pipes_of(body):
    return {name: number for name, number in count(body).pipes.items() if number}


def test_names_of_all_kernels():
    text = KERNEL.replace("BODY", "")
    text += text.replace("first", "second__1")
    assert list(read_kernels(text)) == ["first", "second__1"]
    assert read_kernels(text)["first"].pipes == dict.fromkeys(PIPES, 0)


@pytest.mark.parametrize(
    ("statement", "pipes"),
    [
        ("mov.b32 %r1, %r2;", {}),
        ("ld.param.b64 %rd1, [first_param_0];", {}),
        ("cvt.u64.u32 %rd1, %r1;", {}),
        ("neg.f32 %r1, %r2;", {}),
        ("fma.rn.f32 %r1, %r2, %r3, %r4;", {"float": 1}),
        ("add.rn.bf16x2 %r1, %r2, %r3;", {"float": 1}),
        ("max.NaN.f32 %r1, %r2, %r3;", {"logic": 1}),
        ("setp.lt.f32 %p1, %r2, %r3;", {"logic": 1}),
        ("cvt.f32.bf16 %r1, %rs1;", {"logic": 1.5}),
        ("cvt.rn.bf16x2.f32 %r1, %r2, %r3;", {"conversion": 1}),
        ("ex2.approx.ftz.f32 %r1, %r2;", {"special": 1}),
        ("ex2.approx.f32 %r1, %r2;", {"special": 1, "float": 2, "logic": 1}),
        ("div.full.f32 %r1, %r2, %r3;", {"special": 1, "float": 4, "logic": 2}),
        ("div.full.f32 %r1, %r2, 0f42800000;", {"float": 1}),
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", {"memory": 4}),
        ("st.global.b16 [%rd1], %rs1;", {"memory": 1}),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];", {"memory": 4}),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", {"memory": 1}),
        ("redux.sync.add.s32 %r1, %r2, %r3;", {"memory": 2}),
    ],
)  # fmt: skip
def test_what_the_assembler_makes_of_an_instruction(statement, pipes):
    found = pipes_of(statement)
    assert found.pop("issue", 0) == (1 if "memory" in pipes else sum(pipes.values()))
    assert found == pipes


def test_instructions_without_a_pipe_of_their_own_only_take_the_schedulers():
    assert pipes_of("add.s32 %r1, %r2, 1; bar.sync 0;\nmad.lo.s32 %r1, %r2, 2, %r3;") == {
        "issue": 3
    }


def test_divisions_by_the_same_number_share_its_reciprocal():
    body = """
    mov.b32 %r9, 0f42800000;
    div.full.f32 %r1, %r2, %r3;
    div.full.f32 %r4, %r5, %r3;
    div.full.f32 %r6, %r7, %r9;
    """
    assert pipes_of(body) == {"issue": 3 + 6, "float": 3 + 3, "special": 1, "logic": 2}


LOOP = """
    mov.b32 %r5, 0;
    mov.b32 %r1, %r5;
    sub.rn.f32 %f1, %f2, %f3;
$L_1:
    add.rn.f32 %f1, %f1, %f2;
    add.s32 %r1, %r1, 64;
    setp.ne.b32 %p1, %r1, 640;
    @%p1 bra $L_1;
    sub.rn.f32 %f1, %f2, %f3;
"""


def with_bound(kind, bound, start="0", guard="%p1"):
    text = LOOP.replace("setp.ne.b32 %p1, %r1, 640", f"setp.{kind} %p1, %r1, {bound}")
    return text.replace("mov.b32 %r5, 0;", f"mov.b32 %r5, {start};").replace("@%p1", f"@{guard}")


@pytest.mark.parametrize(
    ("body", "rounds"),
    [
        (LOOP, 10),
        (with_bound("lt.s32", 640), 10),
        (with_bound("lt.s32", 0, start="-128"), 2),
        (with_bound("lt.u32", 192, start="-64"), 4),  # 0 after the first round
        (with_bound("ge.s32", 300, guard="!%p1"), 5),
        (with_bound("ne.b32", 128, start="%ctaid.x"), 2),  # of the first block
        # The register with the start has another value later.
        (LOOP.replace("    setp", "    add.s32 %r5, %r5, 1;\n    setp"), 10),
        (with_bound("ne.b32", "%r7"), None),
        (LOOP.replace("mov.b32 %r5, 0", "ld.global.b32 %r5, [%rd1]"), None),
        (LOOP.replace("    setp", "    @%p2 add.s32 %r1, %r1, 64;\n    setp"), None),
        (LOOP.replace("640", "641"), None),  # never
    ],
)
def test_rounds_of_a_loop(body, rounds):
    counts = count(body)
    assert counts.pipes["float"] == 2 + (rounds or 1)
    assert counts.pipes["logic"] == (rounds or 1)
    assert counts.unknown_loops == (rounds is None)


def test_a_counter_may_be_a_part_of_a_wider_one():
    body = """
    mov.b64 %rd1, 0;
$L_1:
    add.s64 %rd2, %rd1, 8;
    cvt.u32.u64 %r1, %rd2;
    mov.b64 %rd1, %rd2;
    shl.b32 %r2, %r1, 1;
    setp.eq.b32 %p1, %r2, 48;
    @!%p1 bra $L_1;
    """
    assert count(body).pipes["logic"] == 3


def test_a_loop_in_a_loop_whose_condition_is_at_its_beginning():
    body = """
    mov.b32 %r1, 0;
$L_outer:
    setp.eq.b32 %p1, %r1, 5;
    @%p1 bra $L_end;
    mul.rn.f32 %f1, %f1, %f2;
    mov.b32 %r2, 3;
$L_inner:
    ex2.approx.ftz.f32 %f3, %f3;
    add.s32 %r2, %r2, -1;
    setp.gt.s32 %p2, %r2, 0;
    @%p2 bra $L_inner;
    add.s32 %r1, %r1, 1;
    bra.uni $L_outer;
$L_end:
    cvt.rn.bf16x2.f32 %r4, %f1, %f3;
    """
    counts = count(body)
    assert counts.unknown_loops == 0
    assert counts.pipes["float"] == 5 and counts.pipes["special"] == 15
    assert counts.pipes["conversion"] == 1  # what follows the loop counts, too


def test_blocks_may_stand_in_another_order_than_they_run():
    body = """
    mov.b32 %r1, 0;
    bra.uni $L_body;
$L_latch:
    add.s32 %r1, %r1, 1;
    setp.lt.u32 %p1, %r1, 7;
    @!%p1 bra $L_end;
$L_body:
    mul.rn.f32 %f1, %f1, %f2;
    bra.uni $L_latch;
$L_end:
    neg.f32 %f1, %f1;
    """
    assert count(body).pipes["float"] == 7


def test_of_two_branches_the_longer_one_counts():
    body = """
    setp.lt.s32 %p1, %r1, %r2;
    @%p1 bra $L_else;
    add.rn.f32 %f1, %f1, %f2;
    add.rn.f32 %f1, %f1, %f2;
    bra.uni $L_end;
$L_else:
    ex2.approx.ftz.f32 %f1, %f1;
$L_end:
    cvt.rn.bf16x2.f32 %r4, %f1, %f3;
    """
    assert pipes_of(body) == {"issue": 5, "logic": 1, "float": 2, "conversion": 1}


def test_products_of_a_warp():
    wide = "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1, %r2}, %rd1, %rd2, 1, 1, 1;"
    assert count(f"{wide}\n{wide}").products == {"bfloat16": 2 * 2 * 64 * 32 * 16 / 4}
    narrow = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r1};"
    assert count(narrow).products == {"default": 2 * 16 * 8 * 8}


@pytest.mark.parametrize(
    ("statements", "issued"),
    [
        ("fma.rn.f32 %r1, %r2, %r3, %r4; fma.rn.f32 %r5, %r2, %r3, %r4;", 1),
        ("mul.f32 %r1, %r2, %r3; mul.f32 %r5, %r2, %r3; neg.f32 %r1, %r1; ex2.approx.ftz.f32 %r6, "
         "%r5; mul.f32 %r7, %r2, %r3; ex2.approx.ftz.f32 %r8, %r7;", 2),
        # Another argument, an argument with another value, another instruction.
        ("mul.f32 %r1, %r2, %r3; mul.f32 %r5, %r2, %r4;", 2),
        ("mul.f32 %r1, %r2, %r3; add.f32 %r2, %r3, %r3; mul.f32 %r5, %r2, %r3;", 3),
        ("mul.f32 %r1, %r2, %r3; add.f32 %r5, %r2, %r3;", 2),
        # Reads, without and with a write between them; and under another condition.
        ("ld.global.b32 %r1, [%rd1]; ld.global.b32 %r2, [%rd1];", 1),
        ("ld.global.b32 %r1, [%rd1]; st.global.b32 [%rd2], %r3; ld.global.b32 %r2, [%rd1];", 3),
        ("mov.u32 %r1, 0; @%p1 ld.global.b32 %r1, [%rd1]; mov.u32 %r2, 0; @%p1 ld.global.b32 %r2, "
         "[%rd1];", 1),
        ("mov.u32 %r1, 0; @%p1 ld.global.b32 %r1, [%rd1]; mov.u32 %r2, 0; @%p2 ld.global.b32 %r2, "
         "[%rd1];", 2),
        # What exchanges threads' values is not the same twice.
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1; shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", 2),
    ],
)  # fmt: skip
def test_repeated_instructions_count_once(statements, issued):
    assert pipes_of(statements)["issue"] == issued

"""Budgets of every shipped kernel and configuration, and that a broken budget is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import triton
import triton.language as tl

from csrc_triton import device
from csrc_triton.aot import AotCase
from profiling import aot_report, sass


@pytest.mark.slow
@pytest.mark.parametrize("op", aot_report.operations())
def test_shipped_configurations_keep_their_budgets(op):
    cases = aot_report.cases(op)
    for architecture, section in (("sm_80", "sm_80"), ("sm_90", "sm_90"), ("sm_86", "default")):
        listed = [case.name for case in cases if case.architecture == architecture]
        assert len(listed) >= len(device.table(op)[section]), f"aot_cases() lacks {section}"
    assert not [
        line for case in cases for line in aot_report.violations(case, aot_report.measure(case))
    ]


@pytest.fixture
def opcodes(monkeypatch) -> Callable[[str], list[str]]:
    """Opcodes of the first case of a kernel of lora_linear on sm_90, in order."""
    listings, disassemble = [], sass.disassemble

    def kept(*arguments) -> str:
        listings.append(disassemble(*arguments))
        return listings[-1]

    def of(kernel: str) -> list[str]:
        cases = aot_report.cases("lora_linear")
        aot_report.measure(
            next(case for case in cases if case.architecture == "sm_90" and kernel in case.name)
        )
        return [instruction.opcode for instruction in sass.parse(listings[-1])[0]]

    monkeypatch.setattr(sass, "disassemble", kept)
    return of


def test_the_second_decode_kernel_waits_for_the_first(opcodes):
    """Launched while the first runs, it reads no more than an index and a rank before its end."""
    assert "PREEXIT" in opcodes("decode_shrink")
    second = opcodes("decode_expand")
    before = second[: second.index("ACQBULK")]
    assert before.count("LDG") <= 2 and "EXIT" not in before and "STG" not in before


@triton.jit
def _product(
    a, b, out, depth, stride_a, stride_b, stride_out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    step = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        x = tl.load(a + row * stride_a + (start + step)[None, :])
        y = tl.load(b + (start + step)[:, None] * stride_b + column)
        total = tl.dot(x, y, total, input_precision="ieee")
    tl.store(out + row * stride_out + column, total.to(out.dtype.element_ty))


def product(architecture: str, dtype: str = "bf16", rows: int = 128, **changes) -> AotCase:
    integers = ("depth", "stride_a", "stride_b", "stride_out")
    case = AotCase(
        name=f"product {dtype} {architecture}",
        function=_product,
        signature={name: f"*{dtype}" for name in ("a", "b", "out")}
        | dict.fromkeys(integers, "i32"),
        constexprs={"ROWS": rows, "COLUMNS": 128, "DEPTH": 64},
        divisible=frozenset(integers),
        num_warps=8,
        num_stages=3,
        architecture=architecture,
        expects_mma=True,
        flops=2 * rows * 128 * 1024,
        bytes=2 * (rows + 128) * 1024,
        iterations=1024 // 64,
    )
    return replace(case, **changes)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90"])
def test_a_clean_kernel_is_clean(architecture):
    case = product(architecture)
    found = aot_report.measure(case)
    assert aot_report.violations(case, found) == []
    assert found.sass.loop_mma > 0 and found.registers > 0 and found.blocks > 0
    # Two or three buffers of (128 x 64 + 64 x 128) bfloat16.
    assert found.shared in (2 * 32_768, 3 * 32_768)
    assert 0 < found.sass.loop_instructions < found.sass.instructions


def test_an_accumulator_beyond_the_registers_is_seen():
    case = product("sm_80", rows=256, num_warps=4)
    broken = "\n".join(aot_report.violations(case, aot_report.measure(case)))
    assert "local-memory accesses in a loop" in broken and "B spilled" in broken


def test_too_much_shared_memory_is_seen():
    case = product("sm_90", num_stages=8)
    broken = aot_report.violations(case, aot_report.measure(case))
    assert len(broken) == 1 and "shared memory, limit 232,448" in broken[0]


def test_missing_tensor_cores_are_seen():
    case = product("sm_80", dtype="fp32", rows=32)
    broken = "\n".join(aot_report.violations(case, aot_report.measure(case)))
    assert "no tensor-core instruction" in broken


def test_a_warning_of_the_assembler_is_seen():
    case = product("sm_90")
    found = replace(aot_report.measure(case), warnings=("(C7511) Potential Performance Loss",))
    assert aot_report.violations(case, found)[0].endswith("(C7511) Potential Performance Loss")


def test_a_product_that_may_be_miscompiled_is_seen():
    case = product("sm_90")
    found = aot_report.measure(case)
    found = replace(found, sass=replace(found.sass, loop_register_a=2))
    assert "2 products with A in registers in a loop" in aot_report.violations(case, found)[0]


def test_a_case_must_name_every_argument():
    case = product("sm_90", constexprs={"ROWS": 128, "COLUMNS": 128})
    with pytest.raises(ValueError, match="product bf16 sm_90.*do not fit the arguments"):
        aot_report.measure(case)


def test_report(monkeypatch, capsys):
    clean, broken = product("sm_80"), product("sm_90", num_stages=8)
    monkeypatch.setattr(aot_report, "operations", lambda: ["product"])
    monkeypatch.setattr(aot_report, "cases", lambda op: [clean, broken])
    assert aot_report.main(["--architecture", "sm_80", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["cases"]
    assert record["name"] == clean.name and record["sass"]["loop_mma"] > 0
    assert 0.4 < record["predicted_share_of_peak"] < 1
    assert aot_report.main([]) == 1
    printed = capsys.readouterr().out
    assert clean.name in printed and "limit 232,448" in printed


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "blocks"),
    [
        ("sm_80", 8, 255, 0, 1),  # 65,536 registers / (8 x 32 x 256)
        ("sm_80", 4, 128, 0, 4),
        ("sm_80", 4, 32, 0, 16),  # 64 warps
        ("sm_80", 1, 32, 0, 32),
        ("sm_80", 4, 32, 54_000, 3),
        ("sm_90", 4, 32, 232_448, 1),
    ],
)
def test_blocks_per_multiprocessor(architecture, warps, registers, shared, blocks):
    found = aot_report.blocks_per_multiprocessor(architecture, warps, registers, shared)
    assert found == blocks


LISTING = """
main:
.text.main:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R0 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0040*/                   BRA P2, `(.L_x_3) ;
.L_x_1:
        /*0050*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   LDL.64 R8, [R1+0x8] ;
        /*0090*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def test_code_moved_behind_the_end_counts_in_its_loop():
    assert sass.analyze(LISTING) == sass.Sass(
        instructions=11,
        loop_instructions=5,
        loop_local=1,
        mma=2,
        loop_mma=1,
        loop_register_a=1,
        narrow=0,
        exposed_copies=False,
    )


COPIES = """
.L_x_0:
        /*0000*/                   DEPBAR.LE SB0, {pending} ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   STG.E.U16 desc[UR4][R6.64], R4 ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize(("pending", "exposed"), [("0x0", True), ("0x1", False)])
def test_copies_that_are_waited_for_at_once_are_seen(pending, exposed):
    counts = sass.analyze(COPIES.format(pending=pending))
    assert counts.exposed_copies is exposed and counts.narrow == 1


def test_narrow_accesses_and_exposed_copies_break_a_budget():
    case = product("sm_90")
    clean = aot_report.measure(case)
    slow = replace(clean.sass, narrow=9, exposed_copies=True)
    broken = "\n".join(aot_report.violations(case, replace(clean, sass=slow)))
    assert "9 narrow accesses, limit 4" in broken and "copies that it has just issued" in broken

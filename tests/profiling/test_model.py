"""The cycle model on programs that are small enough to count by hand, and on a compiled one."""

from __future__ import annotations

import pytest

from profiling import model

LOOP = """
.L_x_0:
{body}
        /*0100*/               @P1 BRA `(.L_x_0) ;
        /*0110*/                   EXIT ;
"""


def clocks(*body: str, architecture: str = "sm_80", warps: int = 4, blocks: int = 1) -> float:
    lines = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(body)]
    return model.loop_clocks(architecture, LOOP.format(body="\n".join(lines)), warps, blocks)


MMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"


@pytest.mark.parametrize(
    ("body", "architecture", "warps", "expected"),
    [
        ([MMA] * 16, "sm_80", 4, 16 * 8.0),
        # Two warps on each tensor core, which the barrier keeps in step.
        ([BARRIER, *[MMA] * 16], "sm_80", 8, 32 * 8.0),
        (["FFMA R4, R5, R6, R4"] * 64, "sm_80", 4, 64 * 2.0),
        (["FFMA R4, R5, R6, R4"] * 64, "sm_90", 4, 64 * 1.0),
    ],
)
def test_what_bounds_a_loop(body, architecture, warps, expected):
    assert clocks(*body, architecture=architecture, warps=warps) == pytest.approx(
        expected, rel=0.15
    )


def test_blocks_share_the_pipes_and_hide_latency():
    body = [BARRIER, *[MMA] * 4]
    alone, together = (clocks(*body, blocks=blocks) for blocks in (1, 4))
    assert together < alone
    assert together == pytest.approx(4 * 8.0, rel=0.15)


def encoded(instruction: str, sets: int = 7, waits: int = 0) -> str:
    """An instruction with the control fields of its encoding."""
    control = 1 | sets << 5 | 7 << 8 | waits << 11
    return f"{instruction} ;\n        /* {control << 41:#018x} */\n"


def test_a_load_that_nothing_hides_takes_its_latency():
    load = encoded("LDG.E.128 R8, desc[UR4][R2.64]", sets=0)
    assert clocks(load, encoded(MMA, waits=1)) > model.MACHINES["sm_80"].latency
    assert clocks(load, encoded(MMA)) < model.MACHINES["sm_80"].latency


@pytest.mark.parametrize(("architecture", "blocks"), [("sm_86", 1), ("sm_80", 0)])
def test_no_prediction(architecture, blocks):
    assert clocks(MMA, architecture=architecture, blocks=blocks) == 0
    assert model.loop_clocks("sm_80", "        /*0000*/   EXIT ;", 4, 1) == 0


# A copy, and the loop that waits for a barrier in shared memory.
TMA = "UTMALDG.2D [UR4], [UR10]"
WAIT = (
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [R8+URZ], R5 ;\n"
    "        /*9000*/              @!P3 BRA `(.L_x_2) ;\n"
    ".L_x_7:\n"
    "        /*9010*/                   NOP"
)
SPIN = """
.L_x_2:
        /*9100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [R8+URZ], R5 ;
        /*9110*/              @!P3 BRA `(.L_x_2) ;
        /*9120*/                   BRA `(.L_x_7) ;
"""


@pytest.mark.parametrize(
    ("products", "size", "ahead", "expected"),
    [
        # 48 bytes a clock from L2, behind which 16 products hide.
        (16, 48_000, 1, 1000.0),
        (400, 480, 1, 400 * 6.4),
        # A copy that is waited for in its own iteration is not hidden.
        (16, 4_800, 0, 100 + 16 * 6.4 + 600),
    ],
)
def test_copies_by_tma(products, size, ahead, expected):
    body = [BARRIER, TMA, WAIT, *[MMA] * products]
    lines = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(body)]
    listing = LOOP.format(body="\n".join(lines)) + SPIN
    found = model.loop_clocks("sm_90", listing, 4, 1, model.TmaCopies(size, ahead))
    assert found == pytest.approx(expected, rel=0.1)

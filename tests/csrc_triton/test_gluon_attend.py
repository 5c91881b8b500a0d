"""The form of attend in Gluon: its source on a stand-in for the language, and when it is chosen."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import attention_gate
from csrc_triton import device as configs
from csrc_triton.perceiver_attention import gluon_attend, kernels, reference
from profiling import aot_report
from tests.csrc_triton import gluon_stand_in
from tests.csrc_triton.checks import random
from tests.csrc_triton.gluon_stand_in import Hazard, stand_in
from tests.csrc_triton.interpreter import interpreted

TILE = {"BLOCK_P": 16, "BLOCK_S": 16, "VAR": 2, "num_warps": 4, "num_stages": 2, kernels.GLUON: 1}


def inputs(n: int, p: int, s: int, z: int, lengths: list[int] | None = None) -> list[torch.Tensor]:
    norm = random(n, s, seed=2).abs() + 0.5
    if lengths is not None:
        norm = norm * (torch.arange(s) < torch.tensor(lengths)[:, None])
    tensors = random(n, p, z, seed=0) / z**0.5, random(n, s, z, seed=1), norm
    return [tensor.float() for tensor in tensors]


def assert_right(tensors, tile=TILE, plan=(1, False)) -> None:
    """In float32, against the reference in float64; a part that is not written is NaN."""
    make = torch.Tensor.new_empty

    def poisoned(*arguments, **options):
        tensor = make(*arguments, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -1)

    with stand_in(), interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        found = kernels.perceiver_attention(*tensors, config=tile, plan=plan)
    expected = reference.perceiver_attention(*(t.double() for t in tensors))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_ragged_batch(stages, fixed, splits):
    """Several row tiles, of which the last is not full; slices without a token and with one."""
    tensors = inputs(4, 21, 73, 16, lengths=[0, 1, 73, 33])
    assert_right(tensors, {**TILE, "num_stages": stages}, (splits, fixed))


@pytest.mark.parametrize("splits", [1, 2])
def test_visible_tokens_behind_many_masked_ones(splits):
    query, context, norm = inputs(2, 5, 100, 16, lengths=[100, 70])
    norm[0, :67] = 0
    norm[1, 16:40] = 0
    assert_right([query, context, norm], plan=(splits, True))


@pytest.mark.parametrize("fixed", [False, True])
def test_scores_that_grow_beyond_a_fixed_reference(fixed):
    """Row 0 exceeds the reference of the first tile by 2^115, row 1 by 2^3, row 2 never."""
    query, context, norm = inputs(1, 3, 40, 16)
    context[0, :, 0] = torch.arange(40) * 2.0
    query[..., 0] = torch.tensor([1.0, 0.03, -1.0])
    assert_right([query, context, torch.ones_like(norm)], plan=(1, fixed))


def test_a_first_tile_that_is_masked():
    query, context, norm = inputs(1, 3, 48, 16)
    norm[0, 1:20] = 0
    assert_right([query, context, norm], plan=(1, True))


def test_strided_queries_and_a_part_of_a_context():
    query, context, norm = inputs(3, 40, 40, 32)
    assert_right([query[:, ::2], context, norm])
    assert_right([query[1:2, ::3], context[1:2], norm[1:2]])


@pytest.mark.parametrize("width", gluon_attend.TILES)
def test_tiles_of_the_tuner(width):
    for tile in gluon_attend.TILES[width]:
        assert_right(inputs(1, 70, 150, width), {**tile, kernels.GLUON: 1}, (1, True))


# --- the stand-in sees what it is for --------------------------------------------------------


@pytest.mark.parametrize("missing", ["barrier", "fence", "wait", "expect"])
def test_a_missing_barrier_fence_or_wait_is_a_hazard(missing, monkeypatch):
    monkeypatch.setattr(gluon_stand_in.Program, missing, lambda *_, **__: None)
    with pytest.raises(AssertionError):
        assert_right(inputs(1, 5, 73, 16))


def test_a_copy_that_comes_too_early_is_a_hazard(monkeypatch):
    """Two stages whose copies are two tiles ahead."""
    code = gluon_attend._copy_tile.fn.__code__
    patched = {"_copy_tile": None}

    def early(context, row, x, ready, step, count, stages):
        return patched["_copy_tile"](context, row, x, ready, step + 1, count, stages)

    run = gluon_stand_in.FunctionType

    def function(source, scope):
        made = run(source, scope)
        if source is code:
            patched["_copy_tile"] = made
            return early
        return made

    monkeypatch.setattr(gluon_stand_in, "FunctionType", function)
    with pytest.raises(Hazard):
        assert_right(inputs(1, 5, 73, 16))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of sm_90",
)
def test_the_gate_on_cuda():
    (tile,) = gluon_attend.TILES[512]
    assert attention_gate.failures({**tile, kernels.GLUON: 1}, 512, "cuda") == []


# --- budgets and choice ----------------------------------------------------------------------


def gluon_cases():
    return [c for c in kernels.aot_cases() if c.function is gluon_attend.attend]


def test_every_tile_is_compiled_in_every_form():
    tiles = sum(len(tiles) for tiles in gluon_attend.TILES.values())
    assert len(gluon_cases()) == 4 * tiles
    assert {case.architecture for case in gluon_cases()} == {"sm_90"}
    assert all(case.expects_overlap and case.tma_bytes for case in gluon_cases())


def test_the_widest_tile_keeps_its_budget_and_overlaps_its_copies():
    (case,) = (c for c in gluon_cases() if c.constexprs["Z"] == 512 and c.name.endswith(" fixed"))
    found = aot_report.measure(case, predict=True)
    assert aot_report.violations(case, found) == [] and found.sass.loop_mma == 36
    # All warps of the shipped tile wait for its copies.
    share = aot_report.predicted_share(case, found)
    assert share is not None and 0.5 < share < 0.7


def test_no_shipped_tile_selects_it():
    entries = [e for section in configs.table("perceiver_attention").values() for e in section]
    assert not any(kernels.GLUON in entry["config"] for entry in entries)


@pytest.mark.parametrize(
    ("section", "where", "count"),
    [
        ("sm_90", {"kernel": "attend", "inputs": "half", "width": 512}, 1),
        ("sm_90", {"kernel": "attend", "inputs": "half", "width": 64}, 0),
        ("sm_90", {"kernel": "score_gradients", "inputs": "half"}, 0),
        ("sm_80", {"kernel": "attend", "inputs": "half", "width": 512}, 0),
        ("default", {"kernel": "attend", "inputs": "single", "width": 512}, 0),
    ],
)
def test_alternatives_are_for_the_tuner_on_sm_90(section, where, count):
    tiles = kernels.alternatives(section, where)
    assert len(tiles) == count and all(tile[kernels.GLUON] == 1 for tile in tiles)


def test_what_it_cannot_serve_runs_in_triton():
    """On a CPU, for one: a tile that selects Gluon computes the same as one that does not."""
    tensors = inputs(2, 5, 40, 16)
    with interpreted():
        found = kernels.perceiver_attention(*tensors, config=TILE, plan=(1, False))
    expected = reference.perceiver_attention(*tensors)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_triton_without_gluon(monkeypatch):
    package = sys.modules["csrc_triton.perceiver_attention"]
    monkeypatch.delattr(package, "gluon_attend")
    monkeypatch.delitem(sys.modules, gluon_attend.__name__)
    monkeypatch.setitem(sys.modules, "triton.experimental", None)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    where = {"kernel": "attend", "inputs": "half", "width": 512}
    assert kernels.gluon_form() is None and kernels.alternatives("sm_90", where) == []
    assert len(kernels.aot_cases()) > 0
    test_what_it_cannot_serve_runs_in_triton()

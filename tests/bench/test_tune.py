"""The tuner's candidates, rules and files; what it times needs a GPU."""

from __future__ import annotations

import functools
import importlib
import json
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.runs import tune
from csrc_triton import device as gpu
from csrc_triton import dispatch
from csrc_triton.lora_linear import op as linear
from csrc_triton.rank_projection import op as projection


def entries():
    return [(op, e) for op in tune.TUNED for section in gpu.table(op).values() for e in section]


def test_candidates_start_with_the_tile_and_stay_near():
    tile = {"BLOCK_P": 64, "BLOCK_S": 32, "VAR": 2, "num_warps": 8, "num_stages": 3}
    found = list(tune.candidates(tile))
    assert found[0] == tile
    assert len({json.dumps(c, sort_keys=True) for c in found}) == len(found)
    for candidate in found:
        assert set(candidate) == set(tile) and candidate["VAR"] == 2
        assert sum(candidate[key] != tile[key] for key in tile) <= 2
        assert all(candidate[k] in tune.CHOICES[k] for k in tile if k != "VAR")
    assert {**tile, "BLOCK_P": 128, "num_warps": 4} in found


def test_every_shipped_tile_has_candidates():
    for op, entry in entries():
        found = list(tune.candidates(entry["config"]))
        assert found[0] == entry["config"], op
        assert 1 < len(found) < 80, op


@pytest.mark.parametrize(
    ("won", "rules"),
    [
        ([], []),
        ([(1, False), (2, False)], []),
        ([(1, True), (2, True)], [{"n": [1, None]}]),
        (
            [(1, True), (2, False), (4, True), (8, True), (16, False)],
            [{"n": [1, 1]}, {"n": [4, 8]}],
        ),
        ([(1, False), (2, True)], [{"n": [2, None]}]),
    ],
)  # fmt: skip
def test_ranges(won, rules):
    assert tune.ranges("n", won) == rules


def test_an_entry_is_replaced_in_place_or_added():
    old = [{"where": {"rows": 16}, "config": {"M": 1}}, {"where": {"rows": 64}, "config": {"M": 2}}]
    new = tune.replaced(old, {"rows": 16}, {"M": 3})
    assert [e["config"]["M"] for e in new] == [3, 2]
    assert len(tune.replaced(old, {"rows": 32}, {"M": 3})) == 3
    assert old[0]["config"] == {"M": 1}


@pytest.mark.parametrize("op", tune.TUNED)
def test_a_file_is_written_as_it_is_read(op):
    assert json.loads(tune.dump(gpu.table(op))) == gpu.table(op)


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "FOLDER", tmp_path)
    tune.save("faster", "{}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["faster.json"]


def test_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        tune.main()


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """``make tune`` on a pretended H200 where 32 examples or slices and half the heads'
    tiles win; what runs afterwards reads what it wrote."""
    for name in (*tune.TUNED, "faster"):
        (tmp_path / gpu.file_of(name)).parent.mkdir(exist_ok=True)
        (tmp_path / gpu.file_of(name)).write_text(json.dumps(gpu.table(name)))
    table = functools.cache(lambda name: json.loads((tmp_path / gpu.file_of(name)).read_text()))

    def best(run, tile):
        return ({**tile, "num_warps": 8}, 0.5) if "BLOCK_M" in tile else (dict(tile), 1.0)

    def wins(function, make, needs):
        inputs = make()
        return inputs[0].shape[0] >= 32 and not (needs and function is tune.perceiver_attention)

    monkeypatch.setattr(gpu, "table", table)
    gpu.clear_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "FOLDER", tmp_path)
        patch.setattr(tune, "trial", lambda op, where: where.get("inputs") == "half" or None)
        patch.setattr(tune, "best", best)
        patch.setattr(tune, "_wins", wins)
        patch.setattr(tune, "_rand", lambda device, *shape: torch.zeros(()).expand(shape))
        patch.setattr(torch, "ones", lambda *shape, device: torch.zeros(()).expand(shape))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(sys, "argv", ["tune"])
        tune.main()
    yield json.loads((tmp_path / "faster.json").read_text())["sm_90"]
    gpu._nearest.cache_clear()


def test_what_is_written_is_what_runs(measured, monkeypatch):
    """From the tuner's files through the tables to each op's own choice, on tensors of no GPU."""
    monkeypatch.delenv("V2L_BACKEND", raising=False)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch.Op, "_failure", lambda op, tensor: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert set(measured) == set(tune.OPS) and measured["perceiver_attention"] == []
    assert all(rule["inputs"] == "half" for rules in measured.values() for rule in rules)
    gated = importlib.import_module("csrc_triton.gated_projection")

    def kernels_at(examples: int, tokens: int, dtype=torch.bfloat16, direction="forward") -> bool:
        x, a = (torch.empty(examples, n, 64, device="cuda", dtype=dtype) for n in (tokens, 8))
        index = torch.empty(examples, device="cuda", dtype=torch.long)
        return linear._implementation(direction, x, a, index).__name__.endswith("kernels")

    with FakeTensorMode():
        for direction in ("forward", "backward"):
            assert kernels_at(32, 1, direction=direction) and kernels_at(64, 1)
            assert not kernels_at(8, 1, direction=direction)
            assert kernels_at(32, 256, direction=direction) and kernels_at(64, 512)
            assert not kernels_at(1, 256, direction=direction)
            assert not kernels_at(32, 256, torch.float32, direction)
        many, few = (torch.empty(n, 16, 512, device="cuda", dtype=torch.bfloat16) for n in (64, 1))
        assert projection._implementation("forward", many).__name__.endswith("kernels")
        assert projection._implementation("backward", many).__name__.endswith("reference")
        assert projection._implementation("forward", few).__name__.endswith("reference")
        assert gated._fuses(torch.empty(9000, 4, device="cuda", dtype=torch.bfloat16))
        assert not gated._fuses(torch.empty(9, 4, device="cuda", dtype=torch.bfloat16))
    assert gpu.lookup("rank_projection", (9, 0), inputs="half", rows=16)["num_warps"] == 8

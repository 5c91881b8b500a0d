"""The tuner's candidates, rules and files; what it times needs a GPU."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import tune
from csrc_triton import configs


def entries():
    return [(op, e) for op in tune.OPS for section in configs.table(op).values() for e in section]


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


@pytest.mark.parametrize("op", tune.OPS)
def test_a_file_is_written_as_it_is_read(op):
    assert json.loads(tune.dump(configs.table(op))) == configs.table(op)


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "FOLDER", tmp_path)
    tune.save("faster", "{}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["faster.json"]


def test_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        tune.main()

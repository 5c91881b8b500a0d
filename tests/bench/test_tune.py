"""The tuner's candidates, rules and files; what it times needs a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import report
from bench.runs import tune
from csrc_triton import device as gpu
from csrc_triton import dispatch
from csrc_triton.aot import SECTIONS
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
def tuning(tmp_path, monkeypatch):
    """``make tune`` on a pretended H200 where 32 examples or slices and tiles with 8 warps win, by
    a stand-in for the timer; what runs afterwards reads what it wrote."""
    for name in (*tune.TUNED, "faster"):
        (tmp_path / gpu.file_of(name)).parent.mkdir(exist_ok=True)
        (tmp_path / gpu.file_of(name)).write_text(json.dumps(gpu.table(name)))
    table = functools.cache(lambda name: json.loads((tmp_path / gpu.file_of(name)).read_text()))

    def wins(function, make, needs):
        inputs = make()
        return inputs[0].shape[0] >= 32 and not (needs and function is tune.perceiver_attention)

    def run(tile):
        if tile.get("BLOCK_N") == 64:
            raise RuntimeError("out of resource: shared memory")
        return [torch.ones(3)]

    def stand_in(calls, device, **options):
        tiles = map(json.loads, calls)
        return {
            name: 4e-6 if tile["num_warps"] == 8 and "BLOCK_M" in tile else 8e-6
            for name, tile in zip(calls, tiles, strict=True)
        }

    def predict(op, section, where, tile, processors):
        assert (section, processors) == ("sm_90", 132)
        return None if where.get("kernel") == "expand" else 2e-6 * 4 / tile["num_warps"]

    @contextlib.contextmanager
    def pool(*_, **__):
        with ThreadPoolExecutor(1) as executor:
            yield executor

    monkeypatch.setattr(gpu, "table", table)
    gpu.clear_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "FOLDER", tmp_path)
        patch.setattr(tune, "trial", lambda op, where: run if where["inputs"] == "half" else None)
        patch.setattr(tune, "median_seconds", stand_in)
        patch.setattr(tune, "captured", lambda call: call)
        patch.setattr(tune, "predict", predict)
        patch.setattr(tune, "ProcessPoolExecutor", pool)
        patch.setattr(tune, "_wins", wins)
        patch.setattr(tune, "is_right", lambda where, tile: False)
        patch.setattr(tune, "_rand", lambda device, *shape: torch.zeros(()).expand(shape))
        patch.setattr(torch, "ones", lambda *shape, **_: torch.zeros(()).expand(shape))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        properties = SimpleNamespace(multi_processor_count=132)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)

        def start(*arguments: str) -> dict:
            patch.setattr(sys, "argv", ["tune", "--out", str(tmp_path / "tune.json"), *arguments])
            tune.main()
            return json.loads((tmp_path / "tune.json").read_text())

        yield start
    gpu._nearest.cache_clear()


@pytest.fixture
def measured(tuning, tmp_path):
    """The rules that one run writes."""
    tuning()
    return json.loads((tmp_path / "faster.json").read_text())["sm_90"]


def test_predictions_stand_beside_measurements(tuning, capsys):
    record = tuning("--op", "rank_projection", "--dry-run")
    for entry in record["entries"]:
        assert {(c["measured"], c["predicted"]) for c in entry["candidates"]} == {
            (4e-6, 1e-6), (8e-6, 2e-6)
        }  # fmt: skip
        assert {c["ratio"] for c in entry["candidates"]} == {4.0}
        assert entry["same_order"] == 1.0
    printed = capsys.readouterr().out
    assert "measured us  predicted us   ratio  tile" in printed
    assert "8.00          2.00    4.00  {" in printed
    assert "left out" in printed and "shared memory" in printed
    assert "| 4.00 | 1.00 | 4.00 | 100% |" in report.report([record])
    record = tuning("--op", "lora_linear", "--dry-run")
    unknown = [e for e in record["entries"] if e["where"].get("kernel") == "expand"]
    assert unknown and all(e["same_order"] is None for e in unknown)
    assert all(c["ratio"] is None for e in unknown for c in e["candidates"])


def test_a_further_run_continues(tuning, monkeypatch):
    """After the entries that a run that was cut short has measured."""
    trial, calls = tune.trial, []

    def interrupted(op, where):
        calls.append((op, where))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return trial(op, where)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "trial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuning("--op", "lora_linear")
    assert tuning("--op", "lora_linear", "--seconds", "0")["wins"] == {}
    first = len(tuning("--seconds", "0", "--op", "lora_linear")["entries"])
    record = tuning("--op", "lora_linear")
    names = [json.dumps([e["op"], e["where"]]) for e in record["entries"]]
    assert first == 2 < len(names) == len(set(names)) and set(record["wins"]) == {"lora_linear"}


def test_what_a_dry_run_measured_is_applied_without_measuring_again(tuning, monkeypatch):
    before = gpu.table("rank_projection")
    tuning("--op", "rank_projection", "--dry-run")
    assert gpu.table("rank_projection") == before
    monkeypatch.setattr(tune, "measured", None)
    for _ in range(2):
        tuning("--op", "rank_projection")
        shipped = gpu.table("rank_projection")["sm_90"]
        assert all(e["config"]["num_warps"] == 8 for e in shipped if e["where"]["inputs"] == "half")


def attend_tiles() -> dict[int, dict[str, int]]:
    """Width -> the tile of attend for sm_90, as the files say."""
    gpu.clear_cache()
    entries = gpu.table("perceiver_attention")["sm_90"]
    return {e["where"]["width"]: e["config"] for e in entries if e["where"]["kernel"] == "attend"}


def test_gluon_is_selected_by_its_gate_and_its_speed_alone(tuning, tmp_path, monkeypatch):
    before = attend_tiles()
    judged = []

    def gate(where, tile):
        judged.append((where["width"], tile))
        return where["width"] == 512

    def faster(calls, device, **options):
        return {name: 2e-6 if "GLUON" in name else 8e-6 for name in calls}

    def slower(calls, device, **options):
        return {name: 9e-6 if "GLUON" in name else 8e-6 for name in calls}

    def tuned(speed, passes=gate):
        (tmp_path / "tune.json").unlink(missing_ok=True)
        # Undone here, before the fixture undoes its own patches.
        with monkeypatch.context() as patch:
            patch.setattr(tune, "median_seconds", speed)
            patch.setattr(tune, "is_right", passes)
            tuning("--op", "perceiver_attention")
        return attend_tiles()

    assert tuned(faster, lambda where, tile: False) == before
    tiles = tuned(faster)
    assert tiles == {**before, 512: {**before[512], "GLUON": 1}}
    assert {width for width, _ in judged} == {512, 256, 128}
    assert all(tile["GLUON"] == 1 for _, tile in judged)
    # On another GPU it has to win again.
    assert tuned(slower) == before


def test_the_gate_runs_in_a_process_of_its_own(monkeypatch, capsys):
    """Without a GPU it fails; a process that hangs is ended."""
    where, tile = {"width": 512}, {"BLOCK_P": 64, "GLUON": 1}
    if not torch.cuda.is_available():
        assert not tune.is_right(where, tile)
        assert "left out" in capsys.readouterr().out
    for lines, reason in ((["ragged: NaN or infinite"], "ragged: NaN"), ([], None)):
        done = SimpleNamespace(stdout="\n".join(lines), stderr="", returncode=bool(lines))
        monkeypatch.setattr(tune.subprocess, "run", lambda *_, d=done, **__: d)
        assert tune.is_right(where, tile) is (reason is None)
        assert reason is None or reason in capsys.readouterr().out

    def hang(*_, timeout, **__):
        raise tune.subprocess.TimeoutExpired("gate", timeout)

    monkeypatch.setattr(tune.subprocess, "run", hang)
    assert not tune.is_right(where, tile) and "not through" in capsys.readouterr().out


@pytest.mark.parametrize("op", tune.TUNED)
def test_every_entry_has_a_number_of_programs(op):
    """The case's work times the programs is the work of the whole trial."""
    kernels = importlib.import_module(f"csrc_triton.{op}.kernels")
    for section, entries in gpu.table(op).items():
        for entry in entries:
            where, tile = entry["where"], dict(entry["config"])
            if where.get("inputs") != "half":
                continue
            case = kernels.aot_case(SECTIONS[section], where, tile)
            work = tune.programs(op, where, tile) * case.flops
            rank, kernel = where.get("rank", 32), where.get("kernel", "project")
            width, tokens = where.get("width", 512), where.get("tokens", 1)
            examples = where.get("examples", 32)
            expected = {
                "attend": 4 * 264 * 128 * 832 * width,
                "score_gradients": 4 * 264 * 128 * 832 * width,
                "project": 2 * where.get("rows", 0) * 3520 * 512,
                "shrink": 2 * examples * tokens * rank * 2560,
                "expand": 2 * examples * tokens * rank * 960,
                "reduce": 2 * examples * tokens * rank * 2560,
                "decode_shrink": 2 * examples * rank * 2560,
                "decode_expand": 2 * examples * rank * 960,
            }[kernel]
            # Tiles reach past the end.
            assert expected <= work <= 4 * expected, (section, where)


@pytest.mark.slow
def test_a_candidate_is_predicted_from_its_machine_code():
    where = {"inputs": "half", "rows": 1024}
    tile = gpu.lookup("rank_projection", (9, 0), **where)
    seconds = tune.predict("rank_projection", "sm_90", where, tile, 132)
    assert seconds is not None
    # 3.7 GFLOP: not faster than the peak of 946 TFLOP/s, and at least a tenth of it.
    assert 3.9e-6 < seconds < 3.9e-5
    assert tune.predict("rank_projection", "sm_90", where, {**tile, "BLOCK_N": 17}, 132) is None


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

    with FakeTensorMode(), monkeypatch.context() as hidden:
        # torch 2.11 would initialize the GPU that the tuner was shown. Undone here: the fixture
        # undoes what it showed before the test's own patches are undone.
        hidden.setattr(torch.cuda, "is_available", lambda: False)
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

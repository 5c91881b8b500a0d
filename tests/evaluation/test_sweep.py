"""The sweep: exact frame counts, what a cell holds, and going on after an interruption."""

from __future__ import annotations

import pytest

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation import sweep as module
from v2l_fast.evaluation.examples import EvalExample
from v2l_fast.evaluation.metrics import token_f1
from v2l_fast.evaluation.sweep import measure_cell, sweep
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.video import FrameSampling


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[EvalExample]:
    """A file of 32 frames with two questions, and one of 12 frames."""
    folder = tmp_path_factory.mktemp("clips")
    first, second = sample_scenes("test", 2, 0)
    long = write_clip(first, folder / "long.mp4", size=48)
    short = write_clip(second, folder / "short.mp4", size=48, seconds=3)
    return [
        EvalExample(long, "what happens?", ("red circle",)),
        EvalExample(short, "what happens?", ("blue square",)),
        EvalExample(long, "which color?", ("red",)),
    ]


def test_frames_asked_for_are_frames_encoded(model, files, monkeypatch):
    seen = []
    answer, answer_direct = type(model).answer, type(model).answer_direct

    def through_adapter(self, question, adapter, **options):
        if isinstance(adapter, Adapter):
            seen.append(len(adapter.provenance["source"]["frame_indices"]))
        return answer(self, question, adapter, **options)

    def direct(self, question, clip, *args, **options):
        (result,) = answer_direct(self, question, clip, *args, **options)
        seen.append(result.visual_tokens / self.backbone.tokens_per_view)
        return [result]

    monkeypatch.setattr(type(model), "answer", through_adapter)
    monkeypatch.setattr(type(model), "answer_direct", direct)
    for frames in (3, 12, 20, 32):
        seen.clear()
        cell = measure_cell(model, files, token_f1, frames, 32, max_new_tokens=2)
        assert set(seen) == {frames}
        assert cell["videos"] == (2 if frames <= 12 else 1)
        left_out = [] if frames <= 12 else ["short.mp4 (12 frames)"]
        assert cell["left_out"] == left_out
        assert cell["questions"] == (3 if frames <= 12 else 2)


def test_no_video_is_long_enough(model, files):
    cell = measure_cell(model, files, token_f1, 64, 32)
    assert cell["failed"] == "no video has 64 frames" and len(cell["left_out"]) == 2
    assert "score_change" not in cell


def test_a_cell(model, files):
    cell = measure_cell(model, files, token_f1, 4, 32, max_new_tokens=4)
    clips = [model.load_clip(e.video, FrameSampling(4, 32, exact_frames=True)) for e in files]
    texts = [e.prompt for e in files]
    direct = model.answer_direct(texts, clips, 32, max_new_tokens=4)
    adapter = model.answer(texts, model.internalize(clips, longest_edge=32), max_new_tokens=4)
    ratio = sum(a.prompt_tokens for a in direct) / sum(a.prompt_tokens for a in adapter)
    assert cell["token_reduction"] == pytest.approx(ratio)
    change = [
        e.score(a.text, token_f1) - e.score(d.text, token_f1)
        for e, a, d in zip(files, adapter, direct, strict=True)
    ]
    assert cell["score_change"]["estimate"] == pytest.approx(sum(change) / 3)
    assert cell["speedup"] == cell["first_token_direct"] / cell["first_token_adapter"] > 0
    assert set(cell["internalization"]) >= {"decode", "encode frames", "generate adapter"}
    assert all(seconds > 0 for seconds in cell["internalization"].values())
    for peak in ("peak_direct", "peak_internalization"):
        assert cell[peak] is None or cell[peak] > 10e6


def test_goes_on_where_it_was(model, files, tmp_path, monkeypatch):
    measure, calls = module.measure_cell, []

    def interrupted(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args[3:5])
        return measure(*args)

    monkeypatch.setattr(module, "measure_cell", interrupted)
    run = (model, files, token_f1, tmp_path / "cells", (2, 4), (32, 64), 2)
    with pytest.raises(KeyboardInterrupt):
        sweep(*run)
    assert len(list((tmp_path / "cells").glob("*x*.json"))) == 3
    calls.clear()
    rows = sweep(*run)["rows"]
    assert calls == [(4, 64)]
    assert [(r["frames"], r["longest_edge"]) for r in rows] == [(2, 32), (2, 64), (4, 32), (4, 64)]
    calls.clear()
    assert sweep(*run)["rows"] == rows and not calls
    with pytest.raises(ConfigError, match="made with questions="):
        sweep(model, files[:2], *run[2:])


def test_out_of_memory_is_a_result(model, files, monkeypatch):
    def fail(*args, **kwargs):
        raise module.torch.OutOfMemoryError("too large")

    monkeypatch.setattr(type(model), "answer_direct", fail)
    cell = measure_cell(model, files, token_f1, 4, 32)
    assert cell == {"frames": 4, "longest_edge": 32, "failed": "out of memory"}

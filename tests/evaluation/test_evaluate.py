"""Evaluations end to end on a tiny random pair: same answers as asking alone, resumed exactly."""

import dataclasses
import json

import pytest
import torch

from tests import tiny
from tests.evaluation.judge_stub import StubJudge, scored
from v2l_fast.data.manifest import Example, group_by_video
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.evaluation.answers import (
    BASELINE,
    BIAS,
    BLANK,
    CONDITIONS,
    NONE,
    OTHER,
    SYSTEM,
    AnswerSettings,
    VideoCache,
    blank,
)
from v2l_fast.evaluation.evaluate import evaluate
from v2l_fast.evaluation.judge import Judge, JudgeSettings
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.model import Video2LoRA

SETTINGS = AnswerSettings(max_new_tokens=6)
QUESTIONS = ("what happens", "which color is it", "how many first")


@pytest.fixture
def examples():
    """Four videos, three questions each, in an order that mixes the videos."""
    return [
        Example(f"{v}-{q}", f"{v}.mp4", f"{v}.mp4", "qa" if q else "caption", text, "red circle",
                "B" if v > 1 else "A", "test")
        for q, text in enumerate(QUESTIONS)
        for v in range(4)
    ]  # fmt: skip


CLIPS = {f"{v}.mp4": tiny.clip(2 + v % 2, seed=10 + v) for v in range(4)}


class Counted:
    """A model that counts its calls."""

    def __init__(self, model, stop_after=None):
        self.model, self.stop_after = model, stop_after
        self.questions: list[tuple[str, str]] = []
        self.internalized = 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def answer(self, questions, *args, **options):
        return self._do("adapter", questions, self.model.answer, args, options)

    def answer_direct(self, questions, *args, **options):
        return self._do("direct", questions, self.model.answer_direct, args, options)

    def _do(self, kind, questions, call, args, options):
        if self.stop_after is not None and len(self.questions) >= self.stop_after:
            raise KeyboardInterrupt
        self.questions += [(kind, question) for question in questions]
        return call(questions, *args, **options)

    def internalize(self, *args, **options):
        self.internalized += 1
        return self.model.internalize(*args, **options)


def load(video):
    return CLIPS[video.path]


def test_every_condition_answers_as_when_asked_alone(model, examples):
    result = evaluate(model, examples, SETTINGS, load, batch=5)
    assert tuple(result.answers) == CONDITIONS
    for example in examples[:6]:
        clip = CLIPS[example.path]
        own = model.internalize(clip)
        following = CLIPS[f"{(int(example.path[0]) + 1) % 4}.mp4"]
        expected = {
            BASELINE: model.answer_direct(example.prompt, clip, max_new_tokens=6)[0].text,
            SYSTEM: model.ask(example.prompt, own, max_new_tokens=6),
            OTHER: model.ask(example.prompt, model.internalize(following), max_new_tokens=6),
            BLANK: model.ask(example.prompt, model.internalize(blank(clip)), max_new_tokens=6),
            BIAS: model.ask(example.prompt, own.prune(0), max_new_tokens=6),
            NONE: model.ask(example.prompt, None, max_new_tokens=6),
        }
        assert {name: texts[example.id] for name, texts in result.answers.items()} == expected


def test_the_record_is_complete(model, examples, tmp_path):
    folder = tmp_path / "out"
    stages = []
    outcome = evaluate(
        model, examples, SETTINGS, load, folder,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )  # fmt: skip
    record = json.loads((folder / "result.json").read_text())
    assert record == json.loads(json.dumps(outcome.record))
    assert record["examples"] == 12 and record["videos"] == 4 and record["unreadable"] == {}
    assert record["settings"] == SETTINGS.to_dict()
    tokens = record["prompt_tokens"]
    assert tokens[BASELINE] > tokens[SYSTEM] == tokens[NONE]
    assert {row["benchmark"] for row in record["metrics"]["token_f1"]["rows"]} == {
        "A",
        "B",
        "Average",
        "Pooled",
    }
    assert (folder / "table.md").read_text() == outcome.table
    assert {p.name for p in outcome.files} == {
        "table.md",
        "result.json",
        "token_f1.png",
        "exact_match.png",
    }
    assert stages[-1][1:] == (72, 72)
    assert [done for _, done, _ in stages] == sorted(done for _, done, _ in stages)


@pytest.mark.parametrize("stop_after", [17, 40])
def test_an_interrupted_evaluation_repeats_no_work(model, examples, tmp_path, stop_after):
    whole = evaluate(model, examples, SETTINGS, load, batch=4)
    folder = tmp_path / "out"
    first = Counted(model, stop_after)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, examples, SETTINGS, load, folder, batch=4)
    second = Counted(model)
    result = evaluate(second, examples, SETTINGS, load, folder, batch=4)
    assert result.answers == whole.answers
    assert result.record == whole.record
    # 12 examples under 6 conditions, each answered once in one of the two runs.
    assert len(first.questions) + len(second.questions) == 72
    # 4 videos and 2 kinds of blank clip.
    assert first.internalized + second.internalized == 6

    third = Counted(model)
    again = evaluate(third, examples, SETTINGS, load, folder, batch=4)
    assert third.questions == [] and third.internalized == 0
    assert again.record == whole.record and again.table == whole.table


def test_a_folder_of_another_evaluation_is_refused(model, examples, tmp_path):
    folder = tmp_path / "out"
    evaluate(model, examples, SETTINGS, load, folder)
    with pytest.raises(ConfigError, match="made with settings.max_new_tokens=.* repeat that run"):
        evaluate(model, examples, AnswerSettings(max_new_tokens=7), load, folder)
    with pytest.raises(ConfigError, match="made with questions="):
        evaluate(model, examples[1:], SETTINGS, load, folder)
    other = Video2LoRA(model.backbone, tiny.hypernetwork(seed=9))
    with pytest.raises(ConfigError, match="made with model.hypernetwork="):
        evaluate(other, examples, SETTINGS, load, folder)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and holds no earlier run"):
        evaluate(model, examples, SETTINGS, load, foreign)
    (folder / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        evaluate(model, examples, SETTINGS, load, folder)


def test_other_references_score_the_same_answers_anew(model, examples, tmp_path):
    folder = tmp_path / "out"
    first = evaluate(model, examples, SETTINGS, load, folder)
    texts = first.answers[SYSTEM]
    changed = [dataclasses.replace(e, target_text=texts[e.id] or "x") for e in examples]
    counted = Counted(model)
    second = evaluate(counted, changed, SETTINGS, load, folder)
    assert counted.questions == [] and second.answers == first.answers
    assert second.scores["token_f1"] != first.scores["token_f1"]


def test_an_unreadable_video_is_left_out_everywhere_and_tried_again(model, examples, tmp_path):
    broken = True

    def careful(video):
        if broken and video.path == "1.mp4":
            raise VideoError("1.mp4: truncated")
        return CLIPS[video.path]

    folder = tmp_path / "out"
    result = evaluate(model, examples, SETTINGS, careful, folder, batch=4)
    assert result.record["unreadable"] == {"1.mp4": "1.mp4: truncated"}
    assert "1 videos cannot be read" in result.table
    assert all(not any(id_.startswith("1-") for id_ in a) for a in result.answers.values())
    assert all(len(texts) == 9 for texts in result.answers.values())

    broken = False
    counted = Counted(model)
    result = evaluate(counted, examples, SETTINGS, careful, folder, batch=4)
    assert result.record["unreadable"] == {}
    assert all(len(texts) == 12 for texts in result.answers.values())
    assert len(counted.questions) == 18


def test_nothing_readable_is_an_error(model, examples):
    def fail(video):
        raise VideoError(f"{video.path}: gone")

    with pytest.raises(ConfigError, match=r"no video of the manifest can be read: 0\.mp4: gone"):
        evaluate(model, examples, SETTINGS, fail)


def test_one_video_has_no_other(model, examples):
    result = evaluate(model, [e for e in examples if e.path == "0.mp4"], SETTINGS, load)
    assert OTHER not in result.answers and len(result.answers) == 5


def test_a_hypernetwork_without_bias_has_no_bias_condition(backbone, examples):
    config = dataclasses.replace(tiny.CONFIG, bias_adapter=False)
    model = Video2LoRA(backbone, HyperNetwork(config))
    result = evaluate(model, examples, SETTINGS, load)
    assert BIAS not in result.answers and OTHER in result.answers


def test_cached_adapters_are_the_computed_ones(model, examples, tmp_path):
    (video, *_) = group_by_video(examples)
    fresh = VideoCache(model, SETTINGS, load, tmp_path / "adapters")
    computed = fresh.adapter(video)
    cached = VideoCache(model, SETTINGS, load, tmp_path / "adapters").adapter(video)
    for module in computed.A:
        assert torch.equal(computed.A[module], cached.A[module])
        assert torch.equal(computed.B[module], cached.B[module])
    assert cached.provenance == computed.provenance


def test_few_clips_are_cached(model, examples):
    loads = []

    def counting(video):
        loads.append(video.path)
        return CLIPS[video.path]

    cache = VideoCache(model, SETTINGS, counting, clips=2)
    videos = group_by_video(examples)
    for video in (videos[0], videos[1], videos[0], videos[2], videos[0], videos[1]):
        cache.clip(video)
    assert loads == ["0.mp4", "1.mp4", "2.mp4", "1.mp4"]


def test_a_judge_scores_every_condition_and_resumes(model, examples, tmp_path):
    stub = StubJudge(lambda request, attempt: scored(4))
    try:
        settings = JudgeSettings(stub.url, "stub", workers=2)
        folder = tmp_path / "out"
        judge = Judge(settings, folder / "judgments.jsonl")
        result = evaluate(model, examples[:4], SETTINGS, load, folder, judge)
        assert {name: len(s) for name, s in result.scores["judge"].items()} == {
            name: 4 for name in CONDITIONS
        }
        row = result.record["metrics"]["judge"]["rows"][0]
        assert row["baseline"] == row["system"] == 0.75 and not row["enough"]
        assert result.record["judge"]["failures"] == {}
        assert "Judge stub:" in result.table and "failed and left out: none" in result.table
        requests = len(stub.requests)
        evaluate(
            model, examples[:4], SETTINGS, load, folder, Judge(settings, folder / "judgments.jsonl")
        )
        assert len(stub.requests) == requests
    finally:
        stub.close()


def test_pairs_are_counted(model, examples):
    reply = scored(3, score_a=5, score_b=1, preferred="A")
    stub = StubJudge(lambda request, attempt: reply)
    try:
        judge = Judge(JudgeSettings(stub.url, "stub", workers=2))
        result = evaluate(model, examples, SETTINGS, load, judge=judge, pairs=True)
    finally:
        stub.close()
    pairs = result.record["judge"]["pairs"]
    assert pairs["pairs"] == 12 and pairs["failed"] == pairs["ties"] == 0
    assert pairs["system_preferred"] + pairs["baseline_preferred"] == 12
    share = pairs["system_preferred"] / 12
    assert pairs["system"] == pytest.approx(share) and pairs["baseline"] == pytest.approx(1 - share)

"""The shapes world as a data source: what it gives is what users' calls compute."""

import pickle
import random
from functools import partial

import pytest
import torch

from v2l_fast.errors import ConfigError
from v2l_fast.generation import SamplingParams, answer_prompts
from v2l_fast.hypernet.config import INSTRUCTION
from v2l_fast.pipeline import context_batches, visual_features
from v2l_fast.shapes import source as module
from v2l_fast.shapes.evaluate import rendered_clips
from v2l_fast.shapes.probes import recorded_clips
from v2l_fast.shapes.render import SAMPLED_INDICES
from v2l_fast.shapes.source import clip_chunks, prepare_base, recorded_sources, shapes_sources
from v2l_fast.shapes.widen import varied_videos
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.training.config import load_config
from v2l_fast.training.step import TrainStep
from v2l_fast.training.trainer import make_hypernet, step_options, train
from v2l_fast.vlm import VideoChunk


@pytest.fixture
def config(tmp_path):
    def make(*overrides):
        small = ("data.videos=8", "data.val_videos=4", "run.trackers=[]", "run.sample_every=0")
        return load_config("shapes", [f'run.folder="{tmp_path}"', *small, *overrides])

    return make


def test_samples_are_seeded_and_differ_by_step(config, base):
    training, unseen = shapes_sources(config(), base)
    assert len(training) == 8 and len(unseen) == 4
    first, again, later = training.load(3, 5), training.load(3, 5), training.load(3, 6)
    assert first.qa_pairs == again.qa_pairs != later.qa_pairs
    assert torch.equal(first.chunks[0].features, later.chunks[0].features)
    assert len(first.qa_pairs) == 4 and first.frames == 8
    assert first.task_types == ("caption", "question", "question", "question")
    assert training.load(2, 5).qa_pairs != first.qa_pairs
    assert pickle.loads(pickle.dumps(training)).load(3, 5).qa_pairs == first.qa_pairs


def test_contexts_are_those_of_internalizing(config, base):
    _, unseen = shapes_sources(config(), base)
    chunks = [chunk for i in range(4) for chunk in unseen.load(i, 0).chunks]
    (group,) = context_batches(base, chunks, visual_features(base, chunks), 0.0, 65536)
    for clip, result in zip(
        rendered_clips(sample_scenes("val", 4, 0)), group.embeddings, strict=True
    ):
        expected = base.video_prompt(
            base.encode(clip, 48), INSTRUCTION, answer_follows=False
        ).embeddings
        assert torch.allclose(result, expected, rtol=1e-2, atol=1e-2)


def test_recorded_contexts_are_those_of_internalizing(config, base):
    _, unseen = recorded_sources(
        config("data.source=shapes-varied", "data.prompts_per_video=6"), base
    )
    scenes, recordings = varied_videos("val", 4, 0)
    assert len({len(recording.indices) for recording in recordings}) > 1
    for index, clip in enumerate(recorded_clips(scenes, recordings)):
        chunk = unseen.load(index, 0).chunks[0]
        (group,) = context_batches(base, [chunk], visual_features(base, [chunk]), 0.0, 65536)
        expected = base.video_prompt(
            base.encode(clip, 48), INSTRUCTION, answer_follows=False
        ).embeddings
        assert torch.allclose(group.embeddings[0], expected, rtol=1e-2, atol=1e-2)


def test_recorded_samples_have_questions_by_name_and_about_absent_objects(config, base):
    source = "data.source=shapes-varied"
    training, _ = recorded_sources(config(source, "data.prompts_per_video=6"), base)
    assert {len(scene.objects) for scene in training.scenes} == {1, 2, 3}
    samples = [training.qa_pairs(i, random.Random(i)) for i in range(8)]
    for index, pairs in enumerate(samples):
        kinds = [pair.kind for pair in pairs]
        assert len(kinds) == 6
        assert kinds.count("caption") == kinds.count("absent") == kinds.count("details") == 1
        assert kinds[-2] in ("start", "end", "last", "background")
        assert training.load(index, 0).task_types.count("caption") == 2
    assert sum(pair.kind == "binding" for pairs in samples for pair in pairs) >= 4
    assert training.load(3, 5).qa_pairs == training.load(3, 5).qa_pairs
    more, _ = recorded_sources(config(source, "data.prompts_per_video=8"), base)
    for index in range(8):
        chosen = [pair.kind for pair in more.qa_pairs(index, random.Random(index))]
        assert len(chosen) == 8 and chosen.count("binding") in (0, 3, 4)
    colors, _ = recorded_sources(
        config(source, "data.prompts_per_video=6", "data.question_weights.color=1e9"), base
    )
    assert any(pairs != colors.qa_pairs(i, random.Random(i)) for i, pairs in enumerate(samples))
    with pytest.raises(ConfigError, match="prompts_per_video must be at least 6"):
        recorded_sources(config(source, "data.prompts_per_video=5"), base)


@pytest.mark.parametrize("name", ["shapes", "shapes-varied"])
def test_questions_may_be_second_turns(config, base, name):
    """Their ids are those of the conversation that a user would send."""
    find = shapes_sources if name == "shapes" else recorded_sources
    options = (f"data.source={name}", "data.prompts_per_video=6")
    (single, _), (double, _) = (
        find(config(*options, f"data.second_turn_share={share}"), base) for share in (0.0, 1.0)
    )
    rng = random.Random("0/5/3")
    pairs = double.qa_pairs(3, rng)
    questions = {pair.question: pair.answer for pair in pairs}
    sample, alone = double.load(3, 5), single.load(3, 5)
    for pair, (ids, answer), (short, same) in zip(
        pairs, sample.qa_pairs, alone.qa_pairs, strict=True
    ):
        assert answer == same and ids[-len(short) :] == short
        asked = [
            base.prompt_builder.question(
                [
                    {"role": "user", "content": first},
                    {"role": "assistant", "content": reply},
                    {"role": "user", "content": pair.question},
                ]
            )
            for first, reply in questions.items()
        ]
        assert sample.prompt_prefix + ids in asked


def test_targets_can_be_the_models_own_captions(config, base, tmp_path, monkeypatch):
    wanted = config("data.source=shapes-captions", "data.prompts_per_video=3")
    training, _ = recorded_sources(wanted, base)
    caption, *details = training.qa_pairs(2, random.Random(0))
    assert caption.kind == "caption" and [pair.kind for pair in details] == ["details"] * 2
    seen = module._is_seen_in_captions
    assert all(map(seen, training.scenes))
    recording = varied_videos("train", 8, 0, seen)[1][2]
    chunk = VideoChunk(training.features[2], recording.timestamps, recording.duration, 0, 0)
    builder = partial(base.video_prompt, chunk, caption.question)
    (answer,) = answer_prompts(base, [builder], [None], SamplingParams(max_new_tokens=64))
    assert [caption.question, caption.answer] == training.captions[2][0]
    assert caption.answer == answer.text
    assert all([pair.question, pair.answer] in training.captions[2][1:] for pair in details)
    drawn = [text for texts in training.captions for _, text in texts[1:]]
    assert len(set(drawn)) > len(drawn) / 2
    monkeypatch.setattr(module, "answer_prompts", None)
    again, _ = recorded_sources(wanted, base)
    assert again.captions == training.captions
    with pytest.raises(ConfigError, match="prompts_per_video must be 1 to 5"):
        recorded_sources(config("data.source=shapes-captions", "data.prompts_per_video=6"), base)


def test_parts_are_sampled_as_files_of_their_own(base):
    (whole,) = clip_chunks(base, 1, INSTRUCTION)
    assert whole.frames == SAMPLED_INDICES and whole.chunk_span == (0.0, 1.0)
    halves = clip_chunks(base, 2, INSTRUCTION)
    assert [part.chunk_span for part in halves] == [(0.0, 0.5), (0.5, 1.0)]
    assert [len(part.frames) for part in halves] == [4, 4]
    assert max(halves[0].frames) < 16 <= min(halves[1].frames)
    assert torch.equal(halves[0].ids, halves[1].ids)
    text = base.tokenizer.decode(halves[1].ids)
    assert "four frames" in text and "0:00:04" in text and "00:00" in text


def test_chunks_are_drawn_by_step(config, base):
    wanted = config("data.chunks=[1, 2, 4, 8]", "model.hypernet.chunk_position=true")
    training, _ = shapes_sources(wanted, base)
    samples = [training.load(1, step) for step in range(24)]
    assert {len(sample.chunks) for sample in samples} == {1, 2, 4, 8}
    for sample in samples:
        assert sum(len(chunk.features) for chunk in sample.chunks) == sample.frames == 8
        assert sample.chunks[0].chunk_span[0] == 0.0 and sample.chunks[-1].chunk_span[1] == 1.0
    network = make_hypernet(wanted, base)
    result = TrainStep(network, base, step_options(wanted))(samples[:3])
    result.loss.backward()
    assert network.scaler_B["down_proj"].grad.abs().sum() > 0


def test_a_caption_weighs_as_much_as_all_questions(config, base):
    wanted = config()
    training, _ = shapes_sources(wanted, base)
    samples = [training.load(i, 0) for i in range(3)]
    result = TrainStep(make_hypernet(wanted, base), base, step_options(wanted))(samples)
    caption, question = (
        (sum / number).item() for sum, number in (result.parts[k] for k in ("caption", "question"))
    )
    assert result.loss.item() == pytest.approx(0.5 * caption + 0.5 * question, rel=1e-5)


def test_visual_tokens_are_kept_on_disk(config, base, monkeypatch):
    first, _ = shapes_sources(config("data.val_videos=0"), base)
    monkeypatch.setattr(module, "cache_visual_tokens", None)
    again, unseen = shapes_sources(config("data.val_videos=0"), base)
    assert unseen is None and torch.equal(first.features, again.features)
    with pytest.raises(TypeError):
        shapes_sources(config("data.val_videos=0", "run.seed=1"), base)


@pytest.mark.parametrize(
    "override", ["data.max_frames=4", "data.chunks=[3]", "data.prompts_per_video=1"]
)
def test_what_this_world_lacks_is_refused(config, base, override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        shapes_sources(config(override), base)


def test_the_base_is_trained_where_it_is_missing(config, monkeypatch, tmp_path):
    trained = []

    def train_vlm(folder, record, seed, threads):
        trained.append((folder, record, seed, threads))
        (folder / "base").mkdir()
        (folder / "base" / "preprocessor_config.json").touch()

    monkeypatch.setattr("v2l_fast.shapes.train.train_vlm", train_vlm)
    for _ in range(2):
        assert prepare_base(config("run.seed=3")) == tmp_path / "base"
    assert trained == [(tmp_path, tmp_path / "vlm.json", 3, 1)]


def test_the_preset_trains(config, base, tmp_path):
    wanted = config(
        "optim.steps=6", "optim.batch_size=4", "optim.micro_batch_size=4", "optim.warmup_steps=1",
        "optim.lr=3e-3", "run.log_every=1", "run.val_every=6",
    )  # fmt: skip
    summary = train(wanted, backbone=base, sources=shapes_sources(wanted, base))
    assert summary["hypernetwork"]["base_model_name_or_path"] == "shapes"
    assert summary["parameters"] == 1_188_160
    assert summary["validation"].keys() == {"val_caption", "val_question", "val_loss", "val_ce"}
    lines = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if "lr" in line]
    assert len(lines) == 6

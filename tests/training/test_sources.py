"""What a trainer reads from a manifest: the ids and pixels that asking and internalizing use."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.training.broken import REASONS, write_folder
from tests.video.clips import encode, shown_index
from v2l_fast.data.manifest import (
    Example,
    ManifestError,
    VideoExamples,
    group_by_video,
    load_manifest,
)
from v2l_fast.data.readers import ClipReader, Failure, Sample, read_ahead
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.pipeline import visual_features
from v2l_fast.training.config import DataConfig, LossConfig, TrainConfig
from v2l_fast.training.sources import (
    ManifestSource,
    length_class,
    manifest_sources,
    open_sources,
    with_length,
)
from v2l_fast.training.step import StepOptions, TrainStep
from v2l_fast.video import FrameSampling, load_video
from v2l_fast.video.reader import load_spans
from v2l_fast.vlm.smolvlm import SmolVLMPromptBuilder

READER = ClipReader(FrameSampling(4, 32))

SAMPLING = {"max_frames": 4, "longest_edge": 32, "target_fps": 1.0}


def example(number: int, path: str, task: str = "qa", **changes) -> Example:
    fields = {
        "id": str(number), "prompt": f"what is {number} ?", "target_text": f"it is {number} .",
    }  # fmt: skip
    return Example(video_path=path, path=path, task_type=task, **(fields | changes))


def source(backbone, examples, **options) -> ManifestSource:
    options = {"reader": READER} | options
    return ManifestSource(
        group_by_video(examples),
        backbone.prompt_builder,
        instruction=tiny.CONFIG.instruction,
        **options,
    )


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    """60 frames at 10 a second; each shows its index."""
    return str(encode(tmp_path_factory.mktemp("clips") / "a.mp4", 60, options={"g": "12"}))


# --- equal to asking and internalizing ------------------------------------------------------------


@torch.no_grad()
def test_ids_and_pixels_are_what_the_model_builds(backbone, model, video):
    sample = source(backbone, [example(1, video), example(2, video)]).load(0, 0)
    (chunk,) = sample.chunks
    clip = model.load_clip(video, FrameSampling(4, 32))
    prompt = backbone.video_prompt(
        backbone.encode(clip, 32), tiny.CONFIG.instruction, answer_follows=False
    )
    built = backbone.embed(chunk.ids, [backbone.encode_views(chunk.pixels)])
    assert torch.equal(built, prompt.embeddings)
    assert chunk.chunk_span == (0.0, 1.0) and sample.frames == len(clip.frames) == 4
    for (question, answer), words in zip(sample.qa_pairs, ("1", "2"), strict=True):
        asked = backbone.question(f"what is {words} ?")
        assert torch.equal(
            backbone.decoder.embed(torch.tensor(sample.prompt_prefix + question)), asked.embeddings
        )
        assert answer[-1] in backbone.stop_ids
        assert backbone.decode(answer[:-1]) == f"it is {words} ."


def test_special_tokens_in_prompts_and_targets_are_text(backbone, video):
    forged = "1 <image> ? <end_of_utterance> <|im_start|>"
    sample = source(backbone, [example(1, video, prompt=forged, target_text=forged)]).load(0, 0)
    plain = source(backbone, [example(1, video)]).load(0, 0)
    special = set(backbone.tokenizer.all_special_ids) - {backbone.tokenizer.unk_token_id}
    for actual, expected in (
        (sample.prompt_prefix + sample.qa_pairs[0][0], plain.prompt_prefix + plain.qa_pairs[0][0]),
        (sample.qa_pairs[0][1], plain.qa_pairs[0][1]),
    ):
        assert [i for i in actual if i in special] == [i for i in expected if i in special]


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 2])
def test_adapters_in_training_are_those_of_internalizing(backbone, hypernet, model, video, chunks):
    sample = source(backbone, [example(1, video)], chunks=(chunks,)).load(0, 0)
    step = TrainStep(hypernet, backbone)
    layers = step.adapters([sample], visual_features(backbone, sample.chunks))
    adapter = model.internalize(video, max_frames=4, longest_edge=32, chunks=chunks)
    rank = adapter.rank
    assert rank == chunks * hypernet.config.rank
    for side in ("A", "B"):
        actual = torch.stack([getattr(layer, side)["down_proj"][0, :rank] for layer in layers])
        torch.testing.assert_close(actual, getattr(adapter, side)["down_proj"])


@torch.no_grad()
def test_a_teacher_that_sees_the_video_can_be_learned_from(backbone, hypernet, video):
    examples = [example(i, video) for i in range(3)]
    sample = source(backbone, examples, teacher=True).load(0, 0)
    actual = TrainStep(hypernet, backbone, StepOptions(kl_weight=1.0))([sample])
    assert actual.parts["kl"][0] > 0 and actual.loss.isfinite()
    in_parts = source(backbone, examples, teacher=True, chunks=(2,)).load(0, 0)
    assert in_parts.teacher_prefix is None


def byte_pair_inputs() -> SmolVLMPromptBuilder:
    """As SmolVLM2's own: byte-level pairs that join spaces with the words after them."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    text = ["User: What is the color?\nAssistant: The color is red.", "User: Describe it.\n\n The"]
    core.train_from_iterator(
        text * 4,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(tiny.SPECIAL), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end_of_utterance>", pad_token="<pad>"
    )
    return SmolVLMPromptBuilder(words, 32, 4)


@pytest.mark.parametrize("make", [byte_pair_inputs, lambda: tiny.backbone().prompt_builder])
def test_prefix_question_and_answer_are_the_whole_text_cut(video, make):
    inputs = make()
    prompts = ["What is the color?", "What is it?", "Describe it."]
    examples = [
        example(i, video, prompt=p, target_text="The color is red.") for i, p in enumerate(prompts)
    ]
    reads = ManifestSource(group_by_video(examples), inputs, READER, "", teacher=True)
    sample = reads.load(0, 0)
    actual = set()
    for question, answer in sample.qa_pairs:
        assert question
        whole = sample.prompt_prefix + question + answer
        actual.update(
            p for p in prompts
            if whole == inputs.ids(
                f"<|im_start|>User: {p}<end_of_utterance>\nAssistant: The color is red."
                "<end_of_utterance>"
            )
        )  # fmt: skip
    assert actual == set(prompts)
    # A teacher that sees the video has the same turns behind its own opening.
    shown = inputs.tokenizer.decode(sample.teacher_prefix + sample.qa_pairs[0][0])
    assert (
        inputs.tokenizer.decode(sample.prompt_prefix + sample.qa_pairs[0][0])[-20:] == shown[-20:]
    )
    assert sample.teacher_prefix.count(inputs.ids("<image>")[0]) == 4 * 4


def test_one_turn_and_equal_prompts_keep_a_token_to_predict_from(backbone, video):
    for examples in ([example(1, video)], [example(1, video), example(1, video, id="2")]):
        sample = source(backbone, examples).load(0, 0)
        for question, _ in sample.qa_pairs:
            assert len(question) == 1
            assert sample.prompt_prefix + question == backbone.prompt_builder.question(
                "what is 1 ?"
            )


def test_a_target_cut_short_has_no_stop_token(backbone, video):
    whole = source(backbone, [example(1, video)]).load(0, 0).qa_pairs[0][1]
    cut = example(1, video, metadata={"truncated": True})
    assert source(backbone, [cut]).load(0, 0).qa_pairs[0][1] == whole[:-1]


def test_a_share_of_the_questions_are_second_turns(backbone, video):
    """They follow another question of the video; without the option nothing is drawn."""
    examples = [example(i, video) for i in range(3)]
    by_prompt = {e.prompt: e for e in examples}
    inputs, whole = backbone.prompt_builder, {}
    for last in examples:
        whole[tuple(inputs.question(last.prompt))] = (last, False)
        for before in by_prompt.values():
            messages = [
                {"role": "user", "content": before.prompt},
                {"role": "assistant", "content": before.target_text.strip()},
                {"role": "user", "content": last.prompt},
            ]
            if before is not last:
                whole[tuple(inputs.question(messages))] = (last, True)
    kinds = []
    for share in (0.0, 0.5, 1.0):
        reads = source(backbone, examples, second_turn_share=share, prompts_per_video=3)
        for step in range(20):
            sample = reads.load(0, step)
            for question, answer in sample.qa_pairs:
                last, second = whole[tuple([*sample.prompt_prefix, *question])]
                assert answer == inputs.answer(last.target_text.strip())
                kinds.append((share, second))
    counts = [kinds.count((share, True)) / 60 for share in (0.0, 0.5, 1.0)]
    assert counts[0] == 0 and 0.3 < counts[1] < 0.7 and counts[2] == 1
    alone = source(backbone, examples[:1], second_turn_share=1.0).load(0, 0)
    assert len(alone.prompt_prefix + alone.qa_pairs[0][0]) == len(inputs.question("what is 0 ?"))


# --- which turns ----------------------------------------------------------------------------------


def kinds_of(backbone, video, captions: int, questions: int, steps: int, **options) -> list[tuple]:
    examples = [
        example(i, video, "caption" if i < captions else "qa") for i in range(captions + questions)
    ]
    reads = source(backbone, examples, **options)
    return [reads.load(0, step).task_types for step in range(steps)]


def test_captions_and_questions_are_mixed_in_the_configured_ratio(backbone, video):
    drawn = kinds_of(backbone, video, 5, 20, 32, prompts_per_video=4, caption_share=0.375)
    assert all(len(kinds) == 4 and kinds.count("caption") in (1, 2) for kinds in drawn)
    assert sum(k.count("caption") for k in drawn) / 128 == pytest.approx(0.375, abs=0.07)


@pytest.mark.parametrize(("captions", "questions", "expected"), [(1, 9, 1), (9, 0, 4), (9, 1, 3)])
def test_where_one_kind_runs_out_the_other_fills(backbone, video, captions, questions, expected):
    for kinds in kinds_of(backbone, video, captions, questions, 3, prompts_per_video=4):
        assert len(kinds) == 4
        assert kinds.count("caption") == expected


def test_choices_depend_on_seed_step_and_video_alone(backbone, video):
    examples = [example(i, video) for i in range(9)]
    reads = source(backbone, examples, chunks=(1, 2), seed=3)
    again = pickle.loads(pickle.dumps(reads))
    drawn = [reads.load(0, step) for step in range(5)]
    assert [again.load(0, step).qa_pairs for step in (3, 1)] == [
        drawn[3].qa_pairs,
        drawn[1].qa_pairs,
    ]
    assert len({s.qa_pairs for s in map(_hashable, drawn)}) == 5
    assert {len(s.chunks) for s in drawn} == {1, 2}
    other = [replace(reads, seed=4).load(0, step).qa_pairs for step in range(5)]
    assert other != [s.qa_pairs for s in drawn]


def _hashable(sample: Sample) -> Sample:
    return replace(sample, qa_pairs=tuple((tuple(q), tuple(a)) for q, a in sample.qa_pairs))


# --- answer lengths -------------------------------------------------------------------------------


def test_length_tags_name_the_class_of_the_answer(backbone, video):
    examples = [example(i, video, target_text="it " * (4 if i % 2 else 40)) for i in range(8)]
    reads = source(backbone, examples, answer_length_tags=True, prompts_per_video=8)
    tagged = 0
    for step in range(8):
        sample = reads.load(0, step)
        for question, answer in sample.qa_pairs:
            long = len(answer) > 20
            asked = sample.prompt_prefix + question
            for number in range(8):
                prompt = f"what is {number} ?"
                if asked == backbone.prompt_builder.question(
                    with_length(prompt, "medium" if long else "short")
                ):
                    tagged += 1
                    break
                if asked == backbone.prompt_builder.question(prompt):
                    break
            else:
                pytest.fail("a prompt that is neither plain nor tagged")
    assert 16 <= tagged <= 48
    assert [length_class(n) for n in (0, 16, 17, 64, 65, 999)] == [
        "short", "short", "medium", "medium", "long", "long"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="brief"):
        with_length("what", "brief")


# --- spans and chunks -----------------------------------------------------------------------------


def shown(pixels: torch.Tensor) -> list[int]:
    return [shown_index(frame.movedim(0, -1).numpy()) for frame in pixels]


def test_a_span_reads_as_a_clip_cut_there(backbone, tmp_path, video):
    spanned = example(1, video, metadata={"span": [1.5, 4.5]})
    reads = source(backbone, [spanned], reader=ClipReader(FrameSampling(30, 64, exact_frames=True)))
    (chunk,) = reads.load(0, 0).chunks
    (clip,) = load_spans(video, FrameSampling(30, 4096, exact_frames=True), (1.5, 4.5), 1)
    assert clip.indices.tolist() == list(range(15, 45))
    assert shown(clip.frames) == list(range(15, 45))
    assert clip.timestamps[0] == 0 and clip.duration == pytest.approx(3) and clip.num_frames == 30
    cut = encode(tmp_path / "cut.mp4", 30)
    (whole,) = source(backbone, [example(1, str(cut))], reader=reads.reader).load(0, 0).chunks
    assert torch.equal(chunk.ids, whole.ids)


def test_a_whole_file_in_one_part_is_load_video(video):
    (part,) = load_spans(video, FrameSampling(4, 32))
    clip = load_video(video, 4, longest_edge=32)
    assert torch.equal(part.frames, clip.frames)
    assert part.timestamps == clip.timestamps and part.sha256 == clip.sha256
    assert (part.duration, part.num_frames, part.fps) == (clip.duration, clip.num_frames, clip.fps)
    assert part.presentation_times == clip.presentation_times


def test_chunks_cover_the_span_in_order(backbone, video):
    spanned = example(1, video, metadata={"span": [1, 5.999]})
    sample = source(backbone, [spanned], chunks=(3,)).load(0, 0)
    assert [c.chunk_span for c in sample.chunks] == [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]
    assert sample.frames == sum(len(c.pixels) for c in sample.chunks)
    parts = load_spans(video, FrameSampling(100, 4096, exact_frames=True), (1, 5.999), 3)
    assert [i for p in parts for i in p.indices.tolist()] == list(range(10, 60))
    assert [shown(p.frames) for p in parts] == [p.indices.tolist() for p in parts]
    assert max(p.num_frames for p in parts) - min(p.num_frames for p in parts) <= 1


def test_the_ends_of_spans(video):
    assert (
        load_spans(video, FrameSampling(9, 4096, exact_frames=True), (5.5, 999.0), 1)[0].indices[-1]
        == 59
    )
    assert load_spans(video, FrameSampling(9, 4096, exact_frames=True), (0.1, 0.3), 1)[
        0
    ].indices.tolist() == [1, 2]
    assert [p.num_frames for p in load_spans(video, FrameSampling(9, 4096), (0.0, 0.3), 5)] == [
        1,
        1,
        1,
    ]
    with pytest.raises(VideoError, match="no frame is shown between 7 and 9 s; it has 60 frames"):
        load_spans(video, FrameSampling(9, 4096), (7, 9), 1)


def test_a_truncated_file_gives_its_spans_over_what_decodes(tmp_path):
    front = {"movflags": "faststart"}
    path = encode(tmp_path / "a.mp4", 60, options={"g": "10"}, mux_options=front)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    parts = load_spans(path, FrameSampling(100, 4096, exact_frames=True), chunks=2)
    counted = [i for p in parts for i in p.indices.tolist()]
    assert counted == list(range(len(counted))) and 10 < len(counted) < 60


# --- failures -------------------------------------------------------------------------------------


def test_broken_videos_are_failures_with_their_reason(backbone, tmp_path):
    manifest, broken = write_folder(tmp_path, 8, tuple(REASONS))
    reads = source(backbone, load_manifest(manifest))
    loaded = [reads.load(index, 0) for index in range(len(reads))]
    for video, actual in zip(reads.videos, loaded, strict=True):
        if video.name in broken:
            assert isinstance(actual, Failure) and actual.video == video.name
            assert REASONS[broken[video.name]] in actual.reason and "\n" not in actual.reason
        else:
            assert isinstance(actual, Sample) and actual.decode_seconds > 0


def test_a_file_that_takes_too_long_is_a_failure(backbone, video):
    actual = source(backbone, [example(1, video)], reader=replace(READER, seconds=0.0)).load(0, 0)
    assert isinstance(actual, Failure) and "took more than 0 s" in actual.reason


def test_a_file_that_vanished_is_a_failure(backbone, tmp_path):
    actual = source(backbone, [example(1, str(tmp_path / "gone.mp4"))]).load(0, 0)
    assert isinstance(actual, Failure) and "no such file" in actual.reason


# --- manifests to sources -------------------------------------------------------------------------


def test_sources_of_a_config_share_no_video(backbone, tmp_path):
    manifest, _ = write_folder(tmp_path, 20)
    data = DataConfig(manifests=(str(manifest),), val_share=0.3, **SAMPLING)
    train, val = manifest_sources(data, backbone, seed=1)
    names = [{video.name for video in part.videos} for part in (train, val)]
    assert len(names[0] | names[1]) == len(train) + len(val) == 20 and len(val) > 0
    assert not names[0] & names[1]
    assert isinstance(train.load(0, 0), Sample)
    few, fewer = manifest_sources(replace(data, videos=3, val_videos=2), backbone, seed=1)
    assert (len(few), len(fewer)) == (3, 2)
    assert {v.name for v in few.videos} < names[0] and {v.name for v in fewer.videos} < names[1]
    assert manifest_sources(replace(data, val_share=0.0), backbone, seed=1)[1] is None


def test_a_video_must_not_be_in_both_manifests(backbone, tmp_path):
    manifest, _ = write_folder(tmp_path, 4)
    data = DataConfig(manifests=(str(manifest),), val_manifests=(str(manifest),))
    with pytest.raises(ManifestError, match="4 of its videos are trained on"):
        manifest_sources(data, backbone, seed=0)


def test_videos_of_several_manifests_are_identified_by_their_file(backbone, tmp_path):
    """Written in two ways, from two folders; and two files of one name."""
    manifest, _ = write_folder(tmp_path / "videos", 4)
    other, _ = write_folder(tmp_path / "others", 4)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    outside = tmp_path / "val.jsonl"

    def sources(split: str | None, **more):
        rows = [r | {"split": split, "video_path": f"videos/{r['video_path']}"} for r in lines]
        outside.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return manifest_sources(DataConfig(**more, **SAMPLING), backbone, seed=0)

    with pytest.raises(ManifestError, match="val.jsonl: 4 of its videos are trained on"):
        sources(None, manifests=(str(manifest),), val_manifests=(str(outside),))
    with pytest.raises(ManifestError, match="4 of its videos are trained on"):
        sources("val", manifests=(str(manifest), str(outside)))
    train, val = sources(None, manifests=(str(manifest),), val_manifests=(str(other),))
    assert len(train) == len(val) == 4
    # A hash decides, once for each file.
    both = sources(None, manifests=(str(manifest), str(outside)), val_share=0.5)
    assert sum(len(part) for part in both if part) == 4


def test_a_task_type_without_a_weight_is_refused_before_the_first_step(backbone, tmp_path):
    manifest, _ = write_folder(tmp_path, 2)
    data = DataConfig(manifests=(str(manifest),), val_share=0.0, **SAMPLING)
    config = TrainConfig(data=data, loss=LossConfig(kind_weights={"caption": 1.0}))
    with pytest.raises(ConfigError, match="no weight for task_type qa .*loss.kind_weights.qa=1"):
        open_sources(config, backbone)
    loss = LossConfig(kind_weights={"caption": 1.0, "qa": 0.0})
    assert len(open_sources(replace(config, loss=loss), backbone)[0]) == 2


def test_read_ahead_keeps_order_and_raises_in_turn():
    def slow(number: int) -> int:
        time.sleep(0.002 * (5 - number % 5))
        if number == 17:
            raise VideoError("seventeen")
        return number

    actual = []
    with pytest.raises(VideoError, match="seventeen"):
        for value in read_ahead(slow, range(30), 3):
            actual.append(value)
    assert actual == list(range(17))


def test_names_contain_the_span():
    cut = example(1, "/x/a.mp4", metadata={"span": [1, 2.5]})
    assert VideoExamples("/x/a.mp4", cut.span, (cut,)).name == "/x/a.mp4#1-2.5"

"""Internalizing in batches gives the same adapters as one by one, and failures stay isolated."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from tests import tiny
from tests.golden import relative
from tests.video.clips import encode
from v2l_fast import model as model_module
from v2l_fast import work_units as steps
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.hypernet import perceiver
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.model import Video2LoRA
from v2l_fast.pipeline import length_buckets, pad_right
from v2l_fast.video import Clip, FrameSampling, preprocess
from v2l_fast.work_units import run_to_completion

M = "down_proj"


@pytest.fixture(scope="module")
def chunk_aware(backbone) -> Video2LoRA:
    """Its network takes each chunk's span as input."""
    return Video2LoRA(backbone, tiny.hypernetwork(replace(tiny.CONFIG, chunk_position=True)))


@pytest.fixture(scope="module")
def mixed() -> list[Clip]:
    """An odd number of clips of 1 to 5 frames and several sizes: contexts of 58 to 122 tokens."""
    shapes = [(3, 24), (1, 24), (4, 32), (5, 20), (3, 16), (4, 24), (5, 24)]
    return [tiny.clip(frames, seed, height) for seed, (frames, height) in enumerate(shapes)]


def alone(model: Video2LoRA, video: object, **options) -> Adapter:
    """Internalize work unit by work unit, each chunk by itself."""
    return run_to_completion(model.iter_internalize(video, **options))


def assert_near(actual: Adapter, expected: Adapter) -> None:
    """Equal provenance, and factors equal up to float32 rounding."""
    for one, other in ((actual.A, expected.A), (actual.B, expected.B)):
        assert relative(one[M], other[M]) <= 1e-5
    assert json.dumps(dict(actual.provenance)) == json.dumps(dict(expected.provenance))
    assert actual.bias is expected.bias


@contextmanager
def watched() -> Iterator[list[tuple[int, int, bool]]]:
    """Record each batch of layer 0 of a hypernetwork: contexts, length, whether it is masked."""
    seen = []
    group = HyperNetwork.group

    def call(self, first, hiddens, mask=None, *arguments):
        if first == 0:
            seen.append((*hiddens[0].shape[:2], mask is not None))
        return group(self, first, hiddens, mask, *arguments)

    with patch.object(HyperNetwork, "group", call):
        yield seen


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_videos_do_not_depend_on_their_neighbors(model, mixed, batch_size):
    with watched() as seen:
        actual = model.internalize(mixed, batch_size=batch_size)
    assert sum(count for count, _, _ in seen) == len(mixed) == len(actual)
    if batch_size >= 7:
        assert seen == [(1, 58, False), (2, 90, False), (4, 122, True)]
    for adapter, clip in zip(actual, mixed, strict=True):
        assert_near(adapter, alone(model, clip))
    assert relative(actual[0].A[M], actual[4].A[M]) > 1e-2


def test_chunks_share_batches_with_other_videos(chunk_aware, mixed):
    with watched() as seen:
        actual = chunk_aware.internalize(mixed, chunks=3)
    assert sum(count for count, _, _ in seen) == 19 and len(seen) < 4
    for adapter, clip in zip(actual, mixed, strict=True):
        assert_near(adapter, alone(chunk_aware, clip, chunks=3))
        assert adapter.rank == min(3, len(clip.frames)) * tiny.CONFIG.rank


def test_chunks_of_one_file_share_a_batch(chunk_aware, tmp_path):
    path = encode(tmp_path / "clip.mp4", 8, fps=2)
    with watched() as seen:
        actual = chunk_aware.internalize(path, chunks=4, max_frames=2)
    assert [count for count, _, _ in seen] == [4]
    assert_near(actual, alone(chunk_aware, path, chunks=4, sampling=FrameSampling(2, 32)))


@pytest.mark.parametrize(
    ("tokens", "batches"),
    [
        (250, [(1, 58), (2, 90), (2, 106), (2, 122)]),
        # No more are held ready than have 30 visual tokens, and none fit together.
        (30, [(1, length) for length in (58, 90, 106, 90, 122, 106, 122)]),
    ],
)
def test_tokens_limit_a_batch(tokens, batches, model, mixed, monkeypatch):
    expected = model.internalize(mixed)
    monkeypatch.setattr(model_module, "BATCH_TOKENS", tokens)
    with watched() as seen:
        actual = model.internalize(mixed)
    assert seen == [(*batch, False) for batch in batches]
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other)


def test_units_of_one_video(model, mixed):
    units = model.iter_internalize(mixed[3], chunks=2)
    layers = [("generate adapter", done, 3) for done in range(4)]
    with watched() as seen:
        actual = list(units)
    assert actual == [
        ("decode", 0, 1), ("encode frames", 0, 3), *layers, ("encode frames", 0, 2), *layers
    ]  # fmt: skip
    assert [count for count, _, _ in seen] == [1, 1]


def test_one_video_is_bitwise_equal_either_way(model, mixed):
    for clip in mixed[:3]:
        actual, expected = model.internalize(clip), alone(model, clip)
        assert torch.equal(actual.A[M], expected.A[M])
        assert torch.equal(actual.B[M], expected.B[M])


def test_a_failing_video_does_not_affect_the_others(model, mixed, tmp_path, monkeypatch):
    encode_views = model.backbone.encode_views

    def overflowing(views):
        features = encode_views(views)
        features[(views == 255).flatten(1).all(1)] = float("nan")
        return features

    monkeypatch.setattr(model.backbone, "encode_views", overflowing)
    broken = tmp_path / "broken.mp4"
    broken.write_text("a letter")
    white = Clip.from_frames(torch.full((3, 3, 24, 32), 255, dtype=torch.uint8), fps=1.0)
    unread = VideoError("gone.mp4: no such file")
    good = mixed[0]
    videos = [good, broken, replace(white, path="white.mp4"), unread, white, good]
    with watched() as seen:
        actual = list(model.internalize_each(iter(videos)))
    assert [count for count, _, _ in seen] == [4]
    names = ("broken.mp4", "white.mp4: the context gives NaN", "gone.mp4", "frames in memory: the")
    for name, error in zip(names, actual[1:5], strict=True):
        assert isinstance(error, VideoError) and name in str(error) and "\n" not in str(error)
    for adapter in (actual[0], actual[5]):
        assert_near(adapter, alone(model, good))
    # A video of which one part fails has failed.
    half = torch.cat([good.frames, white.frames])
    for chunks in (2, 1):
        with pytest.raises(VideoError, match="NaN or infinite"):
            model.internalize([good, Clip.from_frames(half, 1.0)], chunks=chunks)


def test_videos_are_consumed_batch_by_batch(model, mixed):
    taken = []

    def reading():
        for number, clip in enumerate(mixed):
            taken.append(number)
            yield clip

    outcomes = model.internalize_each(reading(), batch_size=3)
    assert taken == []
    next(outcomes)
    assert taken == [0, 1, 2]
    assert len(list(outcomes)) == 6 and len(taken) == 7
    assert model.internalize([]) == []


def test_batch_size_must_be_positive(model, mixed):
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        model.internalize(mixed, batch_size=0)


def test_the_decoder_option(model, tmp_path):
    path = encode(tmp_path / "clip.mp4", 12)
    assert_near(model.internalize(path, decoder="pyav"), model.internalize(path))
    for call in (
        lambda: model.internalize(path, decoder="vlc"),
        lambda: model.internalize(path, decoder="vlc", chunks=2),
        lambda: model.load_clip(path, decoder="vlc"),
    ):
        with pytest.raises(
            VideoError, match="clip.mp4: backend must be one of auto, .*, got 'vlc'"
        ):
            call()


# --- long contexts --------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 7, 16, 50])
def test_token_chunks_change_only_rounding(unit, chunk_aware, mixed, monkeypatch):
    expected = [alone(chunk_aware, clip, chunks=2) for clip in mixed]
    monkeypatch.setitem(steps.TOKENS_PER_UNIT, "cpu", unit)
    actual = [alone(chunk_aware, clip, chunks=2) for clip in mixed]
    # Padded and masked, too.
    together = chunk_aware.internalize(mixed, chunks=2)
    for one, other, wanted in zip(actual, together, expected, strict=True):
        assert_near(one, wanted)
        assert_near(other, wanted)


def test_units_do_not_grow_with_the_context(model, monkeypatch):
    """Tokens per unit, and tokens times attended tokens, are bounded for any video."""
    unit, seen, decoder = 24, [], model.backbone.decoder
    monkeypatch.setitem(steps.TOKENS_PER_UNIT, "cpu", unit)
    run_layer = decoder._run_layer

    def watched_layer(self, layer, index, hidden, span, cache, adapters):
        keys = span.mask.shape[-1] if cache is not None else hidden.shape[1]
        seen.append((hidden.shape[1], keys))
        return run_layer(self, layer, index, hidden, span, cache, adapters)

    monkeypatch.setattr(decoder, "_run_layer", watched_layer)
    attention = perceiver.perceiver_attention
    contexts = []

    def watched_attention(query, context, inv_rms, bounds=None):
        contexts.append(context.shape[1])
        return attention(query, context, inv_rms, bounds)

    monkeypatch.setattr(perceiver, "perceiver_attention", watched_attention)
    work = model.iter_internalize(tiny.clip(12, 0, 32))
    passes = []
    for _ in work:
        passes.append((len(seen), len(contexts)))
    assert max(tokens for tokens, _ in seen) <= unit
    assert all(tokens * keys <= unit * unit for tokens, keys in seen)
    assert max(contexts) <= max(unit, tiny.CONFIG.num_latents)
    for before, after in itertools.pairwise(passes):
        assert after[0] - before[0] <= 1
        assert after[1] - before[1] <= 3
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("tokens", "size"),
    [
        (0, 32),
        (1, 32),
        (64, 32),
        (65, 16),
        (127, 16),
        (292, 7),
        (293, 6),
        (832, 2),
        (2048, 1),
        (9000, 1),
    ],
)
def test_layers_per_group(tokens, size):
    assert steps.layers_per_group(tokens, 32, 2048) == size


def test_groups_are_larger_without_gradients_on_a_cpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert steps.tokens_per_group(cpu, gradients=True) == steps.tokens_per_unit(cpu)
    assert steps.tokens_per_group(cpu, gradients=False) == 2 * steps.tokens_per_unit(cpu)
    assert steps.tokens_per_group(cpu, False, torch.bfloat16) == 3 * steps.tokens_per_unit(cpu)
    assert steps.tokens_per_group(cuda, gradients=False) == steps.tokens_per_unit(cuda)


@pytest.mark.parametrize("unit", [130, 10**6])
def test_groups_of_layers_change_only_rounding(unit, chunk_aware, mixed, monkeypatch):
    """A group never has more tokens than two work units."""
    clip = mixed[3]
    expected = alone(chunk_aware, clip)
    sizes = []
    group = HyperNetwork.group

    def watched_group(self, first, hiddens, *arguments):
        sizes.append(len(hiddens))
        assert len(hiddens) == 1 or sum(h[..., 0].numel() for h in hiddens) <= 2 * unit
        return group(self, first, hiddens, *arguments)

    monkeypatch.setattr(HyperNetwork, "group", watched_group)
    monkeypatch.setitem(steps.TOKENS_PER_UNIT, "cpu", unit)
    assert_near(alone(chunk_aware, clip), expected)
    assert sizes == {130: [2, 1], 10**6: [3]}[unit]


@pytest.mark.parametrize(("length", "unit"), [(1, 4), (4, 4), (5, 4), (1000, 30), (37, 1)])
def test_causal_chunks_cover_everything_once(length, unit):
    parts = list(steps.causal_token_chunks(length, unit))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(length))
    assert all(
        part.stop - part.start == 1 or (part.stop - part.start) * part.stop <= unit * unit
        for part in parts
    )
    assert len(parts) == 1 or length > unit


def test_large_frames_are_resized_in_groups(model, monkeypatch):
    clip = tiny.clip(5, 0, 32)
    expected = alone(model, clip)
    monkeypatch.setattr(preprocess, "GROUP_PIXELS", 2 * clip.frames[0, 0].numel())
    actual = model.iter_internalize(clip)
    names = [next(actual) for _ in range(3)]
    assert names == [("decode", 0, 1), ("decode", 2, 5), ("decode", 4, 5)]
    assert_near(run_to_completion(actual), expected)


def test_length_buckets():
    lengths = [10, 100, 9, 95, 10, 50]
    assert length_buckets(lengths, 0.0, 10**6) == [[2], [0, 4], [5], [3], [1]]
    assert length_buckets(lengths, 0.1, 10**6) == [[2, 0, 4], [5], [3, 1]]
    assert length_buckets(lengths, 0.1, 20) == [[2, 0], [4], [5], [3], [1]]
    assert length_buckets([], 0.1, 20) == []


def test_padding_is_on_the_right_and_masked():
    padded, mask = pad_right([torch.tensor([1, 2, 3]), torch.tensor([4])], 9)
    assert padded.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    rows = [torch.ones(2, 3), torch.zeros(2, 3)]
    padded, mask = pad_right(rows)
    assert torch.equal(padded, torch.stack(rows)) and mask is None

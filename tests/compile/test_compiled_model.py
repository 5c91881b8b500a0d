"""Video2LoRA.compile: same answers and adapters, and no new graph for a new length."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny
from tests.golden import relative
from tests.serving.engine_parts import WAIT, MemoryStore, request
from tests.waiting import wait_until
from v2l_fast import Video2LoRA
from v2l_fast.device import compiled
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.serving.engine import Engine
from v2l_fast.vlm.smolvlm import SmolVLM

M = "down_proj"
QUESTIONS = ["what happens?", "which color is it?", "how many circle?"]
LONGER = ["what happens first, and which color is the small square after it?", "one?"]


def fresh(backend: str | None = None) -> Video2LoRA:
    """Of one perceiver block: further ones are compiled as the first."""
    hypernet = tiny.hypernetwork(replace(tiny.CONFIG, num_blocks=1))
    model = Video2LoRA(tiny.backbone(), hypernet)
    if backend is not None:
        torch._dynamo.reset()
        counters.clear()
        model.compile(backend)
    return model


def graphs() -> int:
    """Compiled since the last :func:`fresh`."""
    return counters["stats"]["unique_graphs"]


def assert_near(actual: Adapter, expected: Adapter) -> None:
    for one, other in ((actual.A, expected.A), (actual.B, expected.B)):
        assert relative(one[M], other[M]) <= 1e-5


def test_a_graph_for_each_kind_of_call_and_none_for_a_length():
    eager, compiled = fresh(), fresh("aot_eager")
    clips = [tiny.clip(2, 0), tiny.clip(4, 1, height=20), tiny.clip(3, 2)]
    expected = [eager.internalize(clip) for clip in clips]
    assert_near(compiled.internalize(clips[0]), expected[0])
    assert graphs() == 3  # vision, decoder layer, hypernetwork layer
    first = [expected[0], Adapter.compose(expected[:2]), None]
    assert compiled.ask(QUESTIONS, first, max_new_tokens=5) == eager.ask(
        QUESTIONS, first, max_new_tokens=5
    )
    assert graphs() == 5  # prefill, decoding
    with torch._dynamo.config.patch(error_on_recompile=True):
        for clip, wanted in zip(clips, expected, strict=True):
            assert_near(compiled.internalize(clip), wanted)
        later = [Adapter.compose(expected), expected[1]]
        for limit in (3, 9):
            actual = compiled.ask(LONGER, later, max_new_tokens=limit)
            assert actual == eager.ask(LONGER, later, max_new_tokens=limit)


@pytest.fixture(scope="module")
def pair_of_models() -> tuple[Video2LoRA, Video2LoRA]:
    """The same weights without and with compilation; graphs are kept from test to test."""
    return fresh(), fresh("eager")


def test_every_kind_of_question(pair_of_models):
    """More kinds than the compiler's own limit of graphs; it would end the process."""
    eager, compiled = pair_of_models
    adapter = eager.internalize(tiny.clip(2, 0))
    composed = Adapter.compose([adapter, adapter])
    for questions in (QUESTIONS[0], QUESTIONS):
        for adapters in (None, adapter):
            actual = compiled.ask(questions, adapters, max_new_tokens=4)
            assert actual == eager.ask(questions, adapters, max_new_tokens=4)
    ragged = [adapter, composed, None]
    actual = compiled.ask(QUESTIONS, ragged, max_new_tokens=4)
    assert actual == eager.ask(QUESTIONS, ragged, max_new_tokens=4)
    assert graphs() > 8


def test_batches_of_videos_share_graphs(pair_of_models):
    eager, compiled = pair_of_models

    def check(*frames: int) -> None:
        clips = [tiny.clip(count, seed) for seed, count in enumerate(frames)]
        expected = [eager.internalize(clip) for clip in clips]
        for actual, wanted in zip(compiled.internalize(clips), expected, strict=True):
            assert_near(actual, wanted)

    check(2, 2)
    check(3, 4)  # padded
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(4, 4, 4)
        check(3, 2, 4, 5, 5)


def test_threads_share_compiled_graphs(pair_of_models):
    eager, compiled = pair_of_models
    clip = tiny.clip(2, 0)
    adapter = eager.internalize(clip)
    expected = eager.ask(QUESTIONS[:2], adapter, max_new_tokens=6)

    def work(place: int) -> object:
        if place % 2:
            return compiled.internalize(clip)
        return compiled.ask(QUESTIONS[:2], adapter, max_new_tokens=6)

    with ThreadPoolExecutor(2) as pool:
        for place, actual in enumerate(pool.map(work, range(8))):
            if place % 2:
                assert_near(actual, adapter)
            else:
                assert actual == expected


def test_a_copy_runs_on_its_own_weights(pair_of_models):
    _, compiled = pair_of_models
    clip = tiny.clip(2, 0)
    before = compiled.internalize(clip)
    twin = copy.deepcopy(compiled.hypernet)
    with torch.no_grad():
        twin.scaler_A[M].mul_(2)
    hidden = torch.randn(1, 5, tiny.CONFIG.hidden_size)
    with torch.no_grad():
        a, _ = compiled.hypernet.layer(1, hidden)
        doubled, _ = twin.layer(1, hidden)
    torch.testing.assert_close(doubled[M], 2 * a[M])
    assert_near(compiled.internalize(clip), before)


def test_the_engine_compiles_before_the_first_request():
    eager, compiled = fresh(), fresh("eager")
    adapter = eager.internalize(tiny.clip(2, 0))
    store = MemoryStore([adapter, Adapter.compose([adapter, adapter])])
    with Engine(compiled, store, max_batch=4, max_context=100) as engine:
        engine.submit(request(QUESTIONS[0])).result(WAIT)
        known = graphs()
        asked = [
            request(text, *ids, max_new_tokens=limit)
            for limit, text in enumerate([*QUESTIONS, *LONGER], 3)
            for ids in ((), ("a0",), ("a1",))
        ]
        for one, generation in [(one, engine.submit(one)) for one in asked]:
            adapter = store.adapters[one.adapters[0]] if one.adapters else None
            limit = one.sampling.max_new_tokens
            wanted = eager.ask(one.question, adapter, max_new_tokens=limit)
            assert generation.result(WAIT)[0] == wanted
    assert graphs() == known > 0


@pytest.mark.parametrize(("wanted", "expected"), [(None, []), (False, []), (True, ["inductor"])])
def test_loading_compiles_on_a_gpu_or_on_request(wanted, expected, pair, monkeypatch):
    vision, layers = [], []
    monkeypatch.setattr(SmolVLM, "compile", lambda self, kind: vision.append(kind))
    monkeypatch.setattr(HyperNetwork, "compile_layers", lambda self, kind: layers.append(kind))
    Video2LoRA.from_pretrained(pair, device="cpu", compile=wanted)
    assert vision == layers == expected


def test_compiling_leaves_graphs_whole_under_ddp():
    """DDP would split the graph of a layer where it reduces gradients."""

    def settings(_: int) -> bool:
        assert compiled(torch.neg, "eager")(torch.ones(2)).sum() == -2
        return torch._dynamo.config.optimize_ddp

    # The compiler's settings are per thread.
    with ThreadPoolExecutor(1) as pool:
        assert list(pool.map(settings, range(2))) == [False, False]


@pytest.mark.slow
def test_the_first_video_compiles_nothing_after_warm_up(tmp_path):
    """It would compile on the engine's thread, while all answers wait."""
    model, clip = fresh("eager"), tiny.clip(3, 5, height=20)
    options = {"max_batch": 1, "max_context": 100, "prefix_cache_bytes": 0}
    (tmp_path / "clip.mp4").write_bytes(b"frames in memory")
    with Engine(model, MemoryStore(), load_clip=lambda *_: clip, **options) as engine:
        wait_until(lambda: engine.ready)
        known = graphs()
        id = engine.internalize(tmp_path / "clip.mp4").wait(WAIT)
        assert engine.submit(request("what happens?", id)).result(WAIT)[1] in ("stop", "length")
    assert graphs() == known > 0

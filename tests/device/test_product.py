"""The whole product on a pretend CUDA device in bfloat16: no problem, no wait on a hot path.

Every test here fails on a mixed device, on a wait inside of a graph capture, and on memory that a
replayed graph reads after it was freed (see :mod:`tests.device.pretend` and the ``device``
fixture). Hot paths are also held to their waits: a decode step and a prefill wait once, for their
tokens; a video once, for the check that its factors are finite; a training step never.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch

from tests import tiny
from tests.data.test_feature_cache import cache_of, source
from tests.device.pretend import CUDA
from tests.rounding import RoundingCheck
from tests.serving.engine_parts import QUESTIONS, WAIT, MemoryStore, copies, request
from tests.training import plain
from tests.training.broken import write_folder
from v2l_fast.data.feature_cache import fill_cache
from v2l_fast.data.manifest import Example, group_by_video, load_manifest
from v2l_fast.evaluation import ablations, efficiency
from v2l_fast.evaluation.answers import AnswerSettings
from v2l_fast.evaluation.evaluate import evaluate
from v2l_fast.evaluation.examples import EvalExample, internalize_each, token_f1
from v2l_fast.evaluation.methods import METHODS, FrameFusion, MethodSettings
from v2l_fast.generation import ModelRunner, SamplingParams, answers, generate
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.pipeline import visual_features
from v2l_fast.serving import graphs
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.graphs import CudaGraphRunner
from v2l_fast.training.config import OptimConfig
from v2l_fast.training.step import StepOptions, TrainStep, make_optimizer

QUESTION = "what happens?"


@pytest.fixture
def checked(device, gpu_model):
    """The model after its first video and answer, which run the kernels' self-checks and hash the
    bias adapter."""
    adapter = gpu_model.internalize(tiny.clip(2, 9), chunks=2)
    gpu_model.ask(QUESTION, adapter, max_new_tokens=2)
    return gpu_model


@pytest.fixture
def steps(monkeypatch, device) -> dict[str, list[list[str]]]:
    """The waits of every prefill and decode step of every runner."""
    waits: dict[str, list[list[str]]] = {"prefill": [], "decode": []}

    def watched(name, method):
        def call(*args, **kwargs):
            with device.watch() as inside:
                method(*args, **kwargs)
            waits[name].append([kind for kind, _ in inside])

        return call

    for name in waits:
        monkeypatch.setattr(ModelRunner, name, watched(name, getattr(ModelRunner, name)))
    return waits


# --- videos to adapters ---------------------------------------------------------------------------


def test_internalizing_waits_once(device, checked, clips):
    for videos, chunks in ((clips[0], 1), (clips, 1), (tiny.clip(6, 4), 3)):
        with device.watch() as waits:
            result = checked.internalize(videos, chunks=chunks)
        assert [kind for kind, _ in waits] == ["tolist"]
        for adapter in result if isinstance(result, list) else [result]:
            assert adapter.A["down_proj"].device == CUDA and adapter.rank == 4 * chunks
    assert device.kernels["rank_projection"] > 0


def test_adapters_on_both_devices(device, checked, clips, tmp_path):
    """Saved, loaded, composed with generated ones, pruned; equal wherever they are."""
    own = checked.internalize(clips[0])
    own.save(tmp_path / "a.safetensors")
    loaded = checked.load_adapter(tmp_path / "a.safetensors")
    assert loaded == own and loaded.A["down_proj"].device.type == "cpu"
    both = Adapter.compose([loaded, checked.internalize(clips[1])])
    assert both.A["down_proj"].device == CUDA
    for adapter in (loaded, both, both.prune(3), both.prune(2, by="random"),
                    own.without_layers([1], include_bias=True)):  # fmt: skip
        assert checked.ask(QUESTION, adapter, max_new_tokens=3)
    assert both.norms()["rank"]["down_proj"].shape == (3, 8)
    ablations.mean_layer_norms([loaded, both])


# --- questions to answers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 3}]
)
def test_a_step_waits_for_its_tokens_alone(checked, clips, steps, sampling):
    adapters = [*checked.internalize(clips[:2]), None]
    both = Adapter.compose(adapters[:2])
    questions = [QUESTION, QUESTIONS[2], "which color?", "how many?"]
    replies = checked.ask(questions, [*adapters, both], max_new_tokens=6, **sampling)
    assert len(replies) == 4
    assert steps["prefill"] and len(steps["decode"]) >= 4
    assert {tuple(waits) for each in steps.values() for waits in each} == {("tolist",)}


def test_the_video_in_context_and_the_effect(checked, clips, monkeypatch):
    monkeypatch.setattr(answers, "SamplingParams", lambda: SamplingParams(max_new_tokens=3))
    assert checked.ask_direct(QUESTION, clips[0], max_new_tokens=3)
    effect = checked.effect(checked.internalize(clips[0]), QUESTION)
    assert np.isfinite(effect.logit_shift)


# --- serving --------------------------------------------------------------------------------------


@pytest.fixture
def small_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "MIN_REACH", 16)


def serve(model, store, requests, check=lambda engine: None, **options) -> list[str]:
    options = {"max_batch": 6, "max_context": 100, "adapter_slots": 3, **options}
    with Engine(model, store, **options) as engine:
        assert isinstance(engine._scheduler.runner, CudaGraphRunner)
        replies = [engine.submit(one).result(WAIT)[0] for one in copies(requests)]
        many = [engine.submit(one) for one in copies(requests, 2)]
        replies += [one.result(WAIT)[0] for one in many]
        check(engine)
    return replies


def mixed_requests(**sampling) -> list:
    """Plain, with one adapter, and with two composed ones, which need a wider bank."""
    return [
        request(question, *ids, max_new_tokens=5, **sampling)
        for question, ids in zip(QUESTIONS, ((), ("a0",), ("a1", "a2")), strict=True)
    ]


@pytest.mark.parametrize("warm_up", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_answer_as_asking_does_in_float32(
    device, on_device, adapters, small_graphs, steps, warm_up
):
    model = on_device(torch.float32)
    store = MemoryStore(adapters)
    expected = [
        model.ask(
            question,
            Adapter.compose([store.adapters[id] for id in one.adapters]) if one.adapters else None,
            max_new_tokens=5,
        )
        for question, one in zip(QUESTIONS, mixed_requests(), strict=True)
    ]
    steps["decode"].clear()
    replies = serve(model, store, mixed_requests(), warm_up=warm_up)
    assert replies == expected * 3
    assert device.captures > 0 and device.replays > device.captures
    assert {tuple(waits) for waits in steps["decode"]} == {("tolist",)}


def test_graphs_answer_as_asking_does_up_to_rounding_in_bfloat16(
    device, on_device, backbone, adapters, small_graphs
):
    """Alone and together, captured and not; the promise of docs/serving.md."""
    model, check = on_device(torch.bfloat16), RoundingCheck(backbone)
    model.backbone.stop_ids = ()
    store = MemoryStore(adapters)
    sets = ((), ("a0",), ("a1", "a2"))
    requests = [request(text, *ids, max_new_tokens=5) for text in QUESTIONS for ids in sets]
    options = {"max_batch": 8, "max_context": 100, "adapter_slots": 3, "warm_up": False}
    with Engine(model, store, **options) as engine:
        together, alone = copies(requests), copies(requests[:3])
        for one in [engine.submit(one) for one in together]:
            one.result(WAIT)
        for one in alone:
            engine.submit(one).result(WAIT)
    assert device.replays > 0
    decoder = model.backbone.decoder
    for one, *replies in itertools.zip_longest(requests, together, alone):
        parts = [store.get(id) for id in one.adapters]
        adapter = Adapter.compose(parts) if parts else None
        prompt = backbone.prompt_builder.question(one.question)
        embedded = decoder.embed(torch.tensor(prompt, device=CUDA))
        bank = AdapterBank.pack([adapter], CUDA, torch.bfloat16)
        expected = generate(decoder, [embedded], (), one.sampling, bank).tokens[0]
        for reply in filter(None, replies):
            check.same(prompt, adapter, expected, reply.tokens)


def test_serving_in_bfloat16(device, gpu_model, clips, small_graphs, tmp_path):
    """A video, then greedy and sampled questions about it; the queue's copies are from pinned
    memory."""
    store = MemoryStore(gpu_model.internalize(clips))

    def internalize(engine: Engine) -> None:
        (tmp_path / "clip.mp4").write_bytes(b"frames in memory")
        job = engine.internalize(tmp_path / "clip.mp4")
        assert engine.submit(request(QUESTION, job.wait(WAIT))).result(WAIT)[1] in (
            "stop",
            "length",
        )

    requests = [*mixed_requests()[1:], *mixed_requests(temperature=0.8, seed=1)[:2]]
    replies = serve(
        gpu_model, store, requests, internalize, warm_up=False,
        load_clip=lambda *_: clips[1],
    )  # fmt: skip
    assert len(replies) == 3 * len(requests) and device.replays > 0


def test_the_engine_thread_works_on_the_device_of_its_model(device, gpu_model, monkeypatch):
    """Graphs and streams belong to a thread's current device, which is cuda:0 in a new thread."""
    chosen = []
    monkeypatch.setattr(
        torch.cuda, "set_device",
        lambda which: chosen.append((threading.current_thread().name, torch.device(which))),
    )  # fmt: skip
    with Engine(gpu_model, MemoryStore(), max_batch=1, max_context=64, warm_up=False):
        pass
    assert chosen == [("v2l-engine", CUDA)]


def test_a_pass_that_cannot_be_captured_runs_without_a_graph(
    on_device, adapters, small_graphs, monkeypatch, device
):
    model = on_device(torch.float32)
    expected = model.ask(QUESTION, adapters[0], max_new_tokens=5)

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CudaGraphRunner, "_capture", refuse)
    store = MemoryStore(adapters)
    replies = serve(model, store, [request(QUESTION, "a0", max_new_tokens=5)], warm_up=False)
    assert set(replies) == {expected} and device.captures == 0


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_a_training_step_waits_for_nothing(device, on_device, gpu_model, kl_weight):
    """With chunks, several questions a video, and the divergence to a teacher that sees it."""
    backbone = gpu_model.backbone
    network = on_device(torch.float32).hypernet.train()
    samples = [
        dataclasses.replace(one, teacher_prefix=[*one.chunks[0].ids.tolist(), *one.prompt_prefix])
        for one in plain.batch(backbone)[1:3]
        if kl_weight == 0.0 or len(one.chunks) == 1
    ]
    step = TrainStep(network, backbone, StepOptions(kl_weight=kl_weight))
    optimizer = make_optimizer(network, OptimConfig())
    for number in range(2):
        with device.watch() as waits:
            result = step(samples)
            result.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # The first one runs the kernels' self-checks.
        assert number == 0 or waits == []
    assert np.isfinite(result.loss.item()) and norm.item() > 0


def test_the_feature_cache(gpu_model, tmp_path):
    manifest, _ = write_folder(tmp_path / "videos", 2)
    videos = group_by_video(load_manifest(manifest))
    cache = cache_of(tmp_path / "cache", gpu_model.backbone)
    assert fill_cache(cache, gpu_model.backbone, videos, chunks=(1, 2)) == []
    assert all(cache.holds(video, 2) for video in videos)
    samples = [source(gpu_model.backbone, videos, cache).load(i, 0) for i in range(2)]
    with torch.no_grad():
        loss = TrainStep(gpu_model.hypernet, gpu_model.backbone)(samples).loss
    assert np.isfinite(loss.item())


def test_training_frames_are_resized_on_the_device(device, gpu_model, tmp_path):
    manifest, _ = write_folder(tmp_path / "videos", 2)
    videos = group_by_video(load_manifest(manifest))
    plain_source = source(gpu_model.backbone, videos)
    features = []
    for resize in (False, True):
        reads = dataclasses.replace(plain_source, resize_on_device=resize)
        (chunk,) = reads.load(0, 0).chunks
        assert (chunk.longest_edge is not None) is resize and chunk.pixels.device.type == "cpu"
        visual_features(gpu_model.backbone, [chunk])
        with device.watch() as waits:
            features += visual_features(gpu_model.backbone, [chunk])
        assert waits == []
    assert torch.equal(*features)


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture
def examples(clips) -> list[EvalExample]:
    return [
        EvalExample(clips[0], QUESTION, ("red circle moves left", "blue square")),
        EvalExample(clips[1], QUESTION, ("a green square stays",)),
    ]


def test_evaluation_of_every_condition(gpu_model, clips):
    examples = [
        Example(f"{v}", f"{v}.mp4", f"{v}.mp4", "qa", QUESTION, "red circle", "A", "test")
        for v in range(2)
    ]
    result = evaluate(
        gpu_model, examples, AnswerSettings(max_new_tokens=3), lambda v: clips[int(v.path[0])]
    )
    assert all(len(texts) == 2 for texts in result.answers.values())


@pytest.mark.slow
def test_every_analysis(gpu_model, examples, tmp_path):
    adapters = list(internalize_each(gpu_model, examples))
    few = {"max_new_tokens": 3}
    ablations.rank_ablation(gpu_model, examples, adapters, token_f1, (0, 2), (0,), **few)
    ablations.layer_removal(gpu_model, examples, adapters)
    ablations.adapter_norms(gpu_model, adapters)
    ablations.compare_chunks(gpu_model, examples[:1], token_f1, (1, 2), **few)
    ablations.logit_attribution(gpu_model, examples, adapters)
    sampling = gpu_model.config.sampling.override(longest_edge=64)
    setting = MethodSettings(gpu_model, sampling, 3, FrameFusion(keep=0.5))
    rows = efficiency.compare_methods(setting, examples, token_f1, METHODS, repeats=1)["rows"]
    assert len(rows) == len(METHODS)
    efficiency.sweep(gpu_model, examples, token_f1, tmp_path, (1,), (32,), 3)

"""Captured passes on a CPU, where the captured function is called again instead of replayed.

This shows that everything a graph reads keeps its address, and that padded rows, lengths and
prompts change no answer. The capture itself needs a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.serving.engine_parts import QUESTIONS, WAIT, MemoryStore, copies, request
from v2l_fast.generation import Request, SamplingParams
from v2l_fast.serving import graphs, scheduler
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.graphs import CudaGraphRunner


@pytest.fixture
def captures(monkeypatch) -> list[str]:
    """One entry per capture; a replay writes to the output of the first run."""
    made = []

    def capture(self, run, inputs, adapters):
        made.append("")
        output = run()
        graph = SimpleNamespace(replay=lambda: output.copy_(run()))
        return graphs._CapturedPass(graph, inputs, output, adapters)

    monkeypatch.setattr(CudaGraphRunner, "_capture", capture)
    monkeypatch.setattr(graphs, "MIN_REACH", 16)
    monkeypatch.setattr(scheduler, "ModelRunner", CudaGraphRunner)
    return made


def test_answers_are_the_same(captures, model, adapters):
    store = MemoryStore(adapters)
    requests, expected = [], []
    for ids in ((), ("a0",), ("a1",)):
        for question in QUESTIONS:
            requests.append(request(question, *ids, max_new_tokens=9))
            adapter = store.adapters[ids[0]] if ids else None
            expected.append(model.ask(question, adapter, max_new_tokens=9))
    with Engine(model, store, max_batch=6, max_context=100, prefix_cache_bytes=0) as engine:
        assert isinstance(engine._scheduler.runner, CudaGraphRunner)
        for one, answer in zip(copies(requests), expected, strict=True):
            assert engine.submit(one).result(WAIT)[0] == answer
        many = [engine.submit(one) for one in copies(requests, 3)]
        assert [one.result(WAIT)[0] for one in many] == expected * 3
        before = len(captures)
        again = [engine.submit(one).result(WAIT)[0] for one in copies(requests)]
        assert again == expected and len(captures) == before


@pytest.mark.parametrize("rows", [1, 6, 8])
def test_warm_up_captures_the_graphs_of_short_questions(
    captures, model, adapters, monkeypatch, rows
):
    monkeypatch.setattr(graphs, "MIN_REACH", 64)
    store = MemoryStore(adapters)
    requests = [request(q, *ids, max_new_tokens=9) for q in QUESTIONS for ids in ((), ("a0",))]
    with Engine(model, store, max_batch=rows, max_context=64) as engine:
        engine.submit(requests[0]).result(WAIT)
        assert engine.ready
        before = len(captures)
        for one in [engine.submit(one) for one in copies(requests, 3)]:
            one.result(WAIT)
        assert len(captures) == before > 0
    with Engine(model, store, max_batch=rows, max_context=64, warm_up=False) as engine:
        engine.submit(requests[0].copy()).result(WAIT)
        assert engine.ready and len(captures) == before + 2


@torch.inference_mode()
def test_a_graph_for_each_power_of_two(captures, backbone):
    batch = CudaGraphRunner(backbone.decoder, 6, 60, ())
    prompts = [backbone.decoder.embed(torch.arange(3, 3 + n)) for n in (4, 7, 12, 5, 9)]
    for prompt in prompts:
        batch.prefill([Request(SamplingParams(40))], [prompt])
    assert len(captures) == 1  # prompts of up to 16 tokens
    for _ in range(3):
        batch.decode()
    assert len(captures) == 2  # 8, but at most 6 rows; attention to 16 tokens
    for _ in range(3):
        batch.decode()
    assert len(captures) == 3  # attention to 32
    batch.requests[1].finish_reason = "stop"
    batch.retire_finished()
    batch.decode()
    assert len(captures) == 4  # 4 rows

"""The bar in a terminal, and what MFU counts."""

import importlib
import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from csrc_triton.lora_linear import reference as lora_reference
from csrc_triton.perceiver_attention import reference as attention_reference
from csrc_triton.rank_projection import reference as projection_reference
from tests import tiny
from tests.tiny import json_lines
from tests.training import plain
from tests.training.tiny_run import TinySource, run, settings
from v2l_fast.hypernet import adapter_bank, perceiver
from v2l_fast.hypernet import network as hypernet
from v2l_fast.pipeline import visual_features
from v2l_fast.training.logging import StepCost, peak_flops
from v2l_fast.training.step import StepOptions, TrainStep
from v2l_fast.training.trainer import train


def test_a_terminal_shows_a_bar(tmp_path):
    backbone = tiny.backbone()
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=160)
    sources = TinySource(backbone.prompt_builder), None
    train(settings(tmp_path, "optim.steps=2"), backbone=backbone, sources=sources, console=console)
    text = said.getvalue()
    for part in ("training", "2/2", "loss", "videos/s", "wait", "MFU n/a"):
        assert part in text


def test_the_peak_is_that_of_the_longest_name(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (
        ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
        ("NVIDIA GB200", 2.5e15), ("Another", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak


@pytest.fixture
def visible_ops(monkeypatch):
    """The package's ops as plain torch, into which torch's counter can look."""
    gated = importlib.import_module("csrc_triton.gated_projection")
    monkeypatch.setattr(perceiver, "perceiver_attention", attention_reference.perceiver_attention)

    def gated_projection(x, visible, gate, up, down, keep=False):
        return gated.reference(x, visible, gate, up, down)

    def rank_projection(latents, weight, scaler_a, scaler_b, *, d_in, d_out):
        return projection_reference.rank_projection(
            latents, weight, scaler_a, scaler_b, d_in, d_out
        )

    def lora_linear(x, weight, bias, a, b, index, scale, ranks=None):
        return lora_reference.lora_linear(x, weight, bias, a, b, index, scale, ranks, False)[0]

    monkeypatch.setattr(perceiver, "gated_projection", gated_projection)
    monkeypatch.setattr(hypernet, "rank_projection", rank_projection)
    monkeypatch.setattr(adapter_bank, "lora_linear", lora_linear)


def attention(query, key, value, *_, **__) -> int:
    """Two products over half of all pairs."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens**2 * width


def attention_backward(grad, query, key, value, *_, **__) -> int:
    """Four products; the scores, which it computes again, do not count."""
    return 2 * attention(query, key, value)


def counted(run: Callable[[], Tensor]) -> int:
    """Operations of `run` and of the backward pass from what it returns, as torch sees them."""
    aten = torch.ops.aten
    unknown = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        run().backward()
    return counter.get_total_flops()


def test_operations_are_those_of_the_step(visible_ops):
    backbone, network = tiny.backbone(), tiny.hypernetwork()
    source = TinySource(backbone.prompt_builder)
    samples = [source.load(index, 0) for index in range(8)]
    step = TrainStep(network, backbone, StepOptions(recompute=False))
    features = visual_features(backbone, [c for sample in samples for c in sample.chunks])
    given = plain.leaves(step.adapters(samples, features))

    def adapters() -> Tensor:
        made = step.adapters(samples, features)
        return sum(t.sum() for one in made for side in (one.A, one.B) for t in side.values())

    cost = StepCost.of(backbone, network.config)
    # Left out: what the latents attend to among themselves; not needed: the gradient for what
    # enters the first layer's adapter.
    contexts = sum(cost.contexts(sample) for sample in samples)
    assert contexts == pytest.approx(counted(adapters), rel=0.05)
    turns = sum(cost.responses(sample) for sample in samples)
    assert turns == pytest.approx(
        counted(lambda: step.loss(samples, features, given).loss), rel=0.01
    )
    assert contexts + turns == sum(cost.sample(sample) for sample in samples)


def test_mfu_is_logged_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("v2l_fast.training.trainer.peak_flops", lambda device: 1e13)
    run(settings(tmp_path, "optim.steps=2"))
    line = json_lines(tmp_path / "log.jsonl")[0]
    assert 0 < line["mfu"] < 1

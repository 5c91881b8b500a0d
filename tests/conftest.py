"""Fixtures of every test: one thread, no network, poisoned memory, a tiny random Video2LoRA."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# The compiler's cache does not see a change in an op's fake implementation.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

from pathlib import Path

import pytest
import torch

from tests import tiny
from v2l_fast.generation import ModelRunner
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.model import Video2LoRA
from v2l_fast.video import Clip
from v2l_fast.vlm.smolvlm import SmolVLM

try:
    from hypothesis import settings
except ImportError:
    # The kernels' tests also run where only torch, transformers and pytest are installed.
    pass
else:
    settings.register_profile("suite", deadline=None, derandomize=True, database=None)
    settings.load_profile("suite")


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized floats are NaN, so that reading or returning one cannot go unnoticed."""

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            if made.is_floating_point():
                with torch.no_grad():
                    made.fill_(float("nan"))
            return made

        return call

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def backbone() -> SmolVLM:
    """A tiny random SmolVLM; tests must not change it."""
    return tiny.backbone()


@pytest.fixture(scope="session")
def hypernet() -> HyperNetwork:
    """A random hypernetwork for ``backbone``; tests must not change it."""
    return tiny.hypernetwork()


@pytest.fixture(scope="session")
def model(backbone: SmolVLM, hypernet: HyperNetwork) -> Video2LoRA:
    """Both as one Video2LoRA; tests must not change it."""
    return Video2LoRA(backbone, hypernet)


@pytest.fixture(scope="session")
def clips() -> list[Clip]:
    """Three clips of random frames, of 3, 1 and 2 frames."""
    return [tiny.clip(frames, seed) for seed, frames in enumerate((3, 1, 2))]


@pytest.fixture(scope="session")
def adapters(model: Video2LoRA, clips: list[Clip]):
    """Their adapters."""
    return model.internalize(clips)


@pytest.fixture
def pair(tmp_path: Path, backbone: SmolVLM, hypernet: HyperNetwork) -> Path:
    """``model`` on disk: a folder with ``base`` and ``hypernet``, a fresh copy for each test."""
    tiny.save_pair(tmp_path / "pair", backbone, hypernet)
    return tmp_path / "pair"


@pytest.fixture
def prefill_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every prefill of a model runner."""
    rows: list[int] = []
    prefill = ModelRunner.run_prefill

    def counted(self, embeddings, *rest):
        rows.append(len(embeddings))
        return prefill(self, embeddings, *rest)

    monkeypatch.setattr(ModelRunner, "run_prefill", counted)
    return rows


@pytest.fixture
def base() -> SmolVLM:
    """The shapes world's VLM, untrained, its weights so large that answers depend on the input."""
    # Needs PyAV, which the tests of csrc_triton do not.
    from v2l_fast.shapes.vlm import new_base

    model, tokenizer = new_base(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return SmolVLM(model, tokenizer, "untrained")

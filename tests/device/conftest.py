"""The tiny model in bfloat16 on a pretend CUDA device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.csrc_triton.checks import register_wide_product
from tests.device import pretend
from tests.device.pretend import CUDA, PretendDevice
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.model import Video2LoRA
from v2l_fast.vlm.smolvlm import SmolVLM

MakeModel = Callable[[torch.dtype], Video2LoRA]


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    """The device; a test that leaves a problem behind fails."""
    register_wide_product()
    with pretend.cuda() as device:
        yield device
    assert device.problems == []


@pytest.fixture
def on_device(device: PretendDevice, backbone: SmolVLM, hypernet: HyperNetwork) -> MakeModel:
    """Makes a copy of the tiny model on the device, in a dtype."""

    def make(dtype: torch.dtype = torch.bfloat16) -> Video2LoRA:
        vlm = copy.deepcopy(backbone.model).to(CUDA, dtype)
        network = copy.deepcopy(hypernet).to(CUDA, dtype)
        return Video2LoRA(SmolVLM(vlm, backbone.tokenizer, backbone.name_or_path), network)

    return make


@pytest.fixture
def gpu_model(on_device: MakeModel) -> Video2LoRA:
    return on_device(torch.bfloat16)

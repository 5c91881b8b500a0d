"""Models of the released shapes with random weights, and prompts of the right lengths for them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from bench.end_to_end import FRAME_TOKENS, INSTRUCTION_TOKENS, INTRODUCTION_TOKENS, Shape
from v2l_fast.vlm.smolvlm import SmolVLM


def random_backbone(shape: Shape, device: str, dtype: torch.dtype) -> SmolVLM:
    """A frozen VLM without a text tokenizer; the image token is the last of the vocabulary."""
    config = SmolVLMConfig(
        image_token_id=shape.vocabulary - 1,
        scale_factor=shape.shuffle,
        pad_token_id=0,
        text_config={
            "model_type": "llama", "vocab_size": shape.vocabulary, "head_dim": 64,
            "rope_theta": 100000.0, "max_position_embeddings": 8192, "pad_token_id": 0,
            **shape.text,
        },
        vision_config=dict(shape.vision),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device(device):
            model = SmolVLMForConditionalGeneration(config).to(dtype)
    return SmolVLM(model, SimpleNamespace(eos_token_id=0, pad_token_id=0), f"random {shape.name}")


def random_ids(backbone: SmolVLM, count: int, generator: torch.Generator) -> Tensor:
    """Text, int64 [count] on the CPU."""
    return torch.randint(3, backbone.image_token_id, (count,), generator=generator)


def random_context(backbone: SmolVLM, frames: int, generator: torch.Generator) -> Tensor:
    """A context prompt over untiled frames in the real prompt's proportions."""
    image = torch.full((backbone.tokens_per_view,), backbone.image_token_id)
    parts = [random_ids(backbone, INTRODUCTION_TOKENS, generator)]
    for _ in range(frames):
        parts += [random_ids(backbone, FRAME_TOKENS, generator), image]
    return torch.cat([*parts, random_ids(backbone, INSTRUCTION_TOKENS, generator)])

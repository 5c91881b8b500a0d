"""A SmolVLM and a hypernetwork of toy size with random weights, large enough to differ by input.

transformers' own model class and tokenizer, so everything that loads, runs or saves the real ones
runs on these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from v2l_fast.files import read_jsonl
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.video import Clip
from v2l_fast.vlm.smolvlm import SmolVLM

SPECIAL = (
    "<pad>",
    "<unk>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)),
)
WORDS = """
    User Assistant You are provided the following series of frame frames from a video Frame one two
    three Internalize this for later captioning what happens which color is it red green blue left
    right circle square moves stays how many first then after before small large . , : ? - [ ] H M S
""".split()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, digits and punctuation as they are, everything else <unk>."""
    tokens = [*SPECIAL, *WORDS, *"0123456789", "\n"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[A-Za-z]+|[0-9]|\n|[^\sA-Za-z0-9]"), behavior="removed", invert=True
    )
    return with_special_tokens(core)


def with_special_tokens(core: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers whose vocabulary begins with ``SPECIAL``."""
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=list(SPECIAL[4:]),
    )


def vlm(vocabulary: int, seed: int = 0) -> SmolVLMForConditionalGeneration:
    """3 decoder layers, hidden 32, intermediate 48, grouped-query; 32-pixel views of 4 tokens."""
    config = SmolVLMConfig(
        image_token_id=SPECIAL.index("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": vocabulary,
            "rope_theta": 100000.0,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SmolVLMForConditionalGeneration(config).eval()
        with torch.no_grad():
            # Ten times transformers' spread: answers then depend on the prompt.
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(10)
    return model


def backbone(seed: int = 0) -> SmolVLM:
    """The VLM with its tokenizer."""
    words = tokenizer()
    return SmolVLM(vlm(len(words), seed), words, "tiny/base")


CONFIG = HypernetConfig(
    hidden_size=32,
    num_layers=3,
    target_modules={"down_proj": (48, 32)},
    rank=4,
    latent_size=16,
    num_latents=3,
    num_blocks=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    base_model_name_or_path="tiny/base",
    max_frames=4,
    longest_edge=32,
)


def hypernetwork(config: HypernetConfig = CONFIG, seed: int = 0) -> HyperNetwork:
    """Every parameter random, those that start at 0 or 1 too."""
    network = HyperNetwork(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "scaler" in name or name.endswith(("mlp.0.weight", "6.weight")):
                parameter.copy_(1 + 0.3 * noise)
            elif name.startswith("bias_"):
                parameter.copy_(0.05 * noise)
            elif name.endswith("latents_q"):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return network.eval()


def clip(frames: int, seed: int, height: int = 24, width: int = 32) -> Clip:
    """Random frames at one a second."""
    generator = torch.Generator().manual_seed(seed)
    size = (frames, 3, height, width)
    return Clip.from_frames(
        torch.randint(0, 256, size, dtype=torch.uint8, generator=generator), fps=1.0
    )


def save_pair(folder: Path, base: SmolVLM, hypernet: HyperNetwork) -> None:
    """Write ``base`` and ``hypernet`` as ``Video2LoRA.from_pretrained`` reads them."""
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    hypernet.save_pretrained(folder / "hypernet")


def json_lines(path: Path) -> list[Any]:
    """The values of a JSON-lines file."""
    return [value for _, value in read_jsonl(path, allow_nan=True)]

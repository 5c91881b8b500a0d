"""Internalizing and asking at the released model shapes: stage times with random weights.

The whole path on the device: resized frames, vision tower, decoder layers with the hypernetwork
streamed behind them, then a question answered from the adapter and with the video in context. No
tokenizer: prompts are ids drawn at random around the image tokens, in the prompt's proportions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from bench import released
from bench.backends import backend
from bench.checks import json_number, limit, relative_error
from bench.timing import together
from v2l_fast.generation import SamplingParams, generate
from v2l_fast.hypernet.adapted_linear import AdapterBank
from v2l_fast.hypernet.adapter import AdapterBatch
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.video.preprocess import frame_views
from v2l_fast.vlm.smolvlm import SmolVLM

FRAMES, QUESTION_TOKENS, NEW_TOKENS = 12, 24, 32
# Text of the prompt: what introduces the video, what stands before each frame, the instruction.
INTRODUCTION_TOKENS, FRAME_TOKENS, INSTRUCTION_TOKENS = 30, 12, 16


@dataclass(frozen=True)
class Shape:
    """What the models' configs say (hidden size, layers, ...) and the frames' longest edge."""

    name: str
    text: dict[str, int]
    vision: dict[str, int]
    shuffle: int
    longest_edge: int = 384
    vocabulary: int = 49280


SHAPES = (
    Shape(
        "500M",
        {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
         "num_attention_heads": 15, "num_key_value_heads": 5},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "image_size": 512, "patch_size": 16},
        4,
    ),
    Shape(
        "2.2B",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
         "num_attention_heads": 32, "num_key_value_heads": 32},
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
         "num_attention_heads": 16, "image_size": 384, "patch_size": 14},
        3,
    ),
)  # fmt: skip
TINY = Shape(
    "tiny",
    {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
     "num_attention_heads": 2, "num_key_value_heads": 1},
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
     "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    2, 32, 200,
)  # fmt: skip


def measure(shape: Shape, device: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Median seconds of every stage, for ours and, on a GPU, for plain torch and both."""
    with torch.inference_mode():
        bench = _Bench(shape, device, dtype)
        found: dict[str, Any] = {
            "shape": shape.name, "frames": FRAMES, "context_tokens": len(bench.context_ids),
            "passed": False,
        }  # fmt: skip
        theirs = bench.released_factors()
        reference = _factors(bench.internalize("reference"))
        ours = _factors(bench.internalize("triton")) if device == "cuda" else reference
        error = max(
            relative_error(o, t)
            for factors in (ours, reference)
            for o, t in zip(factors, theirs, strict=True)
        )
        # Twelve layers deep, and the released order rounds in every one of them too.
        allowed = 8 * limit(dtype)
        found |= {"error": json_number(error), "limit": allowed, "passed": error <= allowed}
        if not found["passed"]:
            return {**found, "reason": "the adapter differs from the released op order's"}
        variants: dict[str, dict[str, float]] = {}
        calls = {"internalize": lambda: bench.released_factors(from_frames=True)}
        variants["released"] = _times(calls, device, seconds)
        for name in ("reference", "triton") if device == "cuda" else ("reference",):
            variants[name] = bench.stages(name, seconds)
        return {**found, "variants": variants}


class _Bench:
    """A backbone and a hypernetwork of random weights with one video and one question."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self.edge = shape.longest_edge
        torch.manual_seed(0)
        image_id = shape.vocabulary - 1
        config = SmolVLMConfig(
            image_token_id=image_id,
            scale_factor=shape.shuffle,
            pad_token_id=0,
            text_config={
                "model_type": "llama", "vocab_size": shape.vocabulary, "head_dim": 64,
                "rope_theta": 100000.0, "max_position_embeddings": 8192, "pad_token_id": 0,
                **shape.text,
            },
            vision_config=dict(shape.vision),
        )  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = SmolVLMForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
        self.backbone = SmolVLM(model.to(device, dtype), SimpleNamespace(eos_token_id=0), "random")
        width, inner = shape.text["hidden_size"], shape.text["intermediate_size"]
        layers = shape.text["num_hidden_layers"]
        self.network = HyperNetwork(HypernetConfig(width, layers, {"down_proj": (inner, width)}))
        # Fresh scalers of B are 0.
        self.network.scaler_B["down_proj"].normal_()
        self.network = self.network.to(device, dtype).eval()
        size = (FRAMES, 3, self.edge * 3 // 4, self.edge)
        self.frames = torch.randint(0, 256, size, dtype=torch.uint8)

        def text(count: int) -> Tensor:
            return torch.randint(3, image_id, (count,), device=device)

        image = torch.full((self.backbone.tokens_per_view,), image_id, device=device)
        parts = [text(INTRODUCTION_TOKENS)]
        for _ in range(FRAMES):
            parts += [text(FRAME_TOKENS), image]
        self.context_ids = torch.cat([*parts, text(INSTRUCTION_TOKENS)])
        self.question_ids = text(QUESTION_TOKENS)
        self.direct_ids = torch.cat([*parts, self.question_ids])

    def features(self) -> Tensor:
        views = frame_views(self.frames, self.edge, self.backbone.tile_size)
        return self.backbone.encode_views(views.views)

    def inputs(self, features: Tensor) -> Tensor:
        return self.backbone.embed(self.context_ids, features).embeddings[None]

    def generate_adapter(self, features: Tensor) -> AdapterBatch:
        hidden = self.backbone.decoder.layer_inputs(self.inputs(features))
        return self.network.assemble([self.network.layer(i, h) for i, h in enumerate(hidden)])

    def internalize(self, name: str) -> AdapterBatch:
        with backend(name):
            return self.generate_adapter(self.features())

    def released_factors(self, from_frames: bool = False) -> tuple[Tensor, Tensor]:
        """All layers' features at once, then the released op order."""
        if from_frames or not hasattr(self, "_cached"):
            self._cached = self.features()
        hidden = self.backbone.decoder.layer_inputs(self.inputs(self._cached))
        a, b = released.hypernetwork(self.network, torch.stack(list(hidden), 1))
        return a["down_proj"], b["down_proj"]

    def stages(self, name: str, seconds: float) -> dict[str, float]:
        backbone, decoder = self.backbone, self.backbone.decoder
        features = self.features()
        with backend(name):
            adapter = self.generate_adapter(features)[0]
            slots = AdapterBank.pack([adapter], decoder.device, decoder.dtype)

            def ask(adapters: AdapterBank | None, ids: Tensor, seen: Tensor | None, new: int):
                prompt = backbone.embed(ids, seen).embeddings
                return generate(decoder, [prompt], (), SamplingParams(new), adapters)

            found = _times(
                {
                    "vision": self.features,
                    "decoder and hypernetwork": lambda: self.generate_adapter(features),
                    "internalize": lambda: self.generate_adapter(self.features()),
                    "first token, adapter": lambda: ask(slots, self.question_ids, None, 1),
                    "first token, direct": lambda: ask(None, self.direct_ids, self.features(), 1),
                    "first token, direct, vision cached": lambda: ask(
                        None, self.direct_ids, features, 1
                    ),
                },
                self.device,
                seconds,
            )
            full = 1 + NEW_TOKENS
            long = _times(
                {
                    "adapter": lambda: ask(slots, self.question_ids, None, full),
                    "direct": lambda: ask(None, self.direct_ids, features, full),
                },
                self.device,
                seconds,
            )
        for way, first in (("adapter", ""), ("direct", ", vision cached")):
            rest = long[way] - found[f"first token, {way}{first}"]
            found[f"further token, {way}"] = rest / NEW_TOKENS
        return found


def _factors(batch: AdapterBatch) -> tuple[Tensor, Tensor]:
    return batch.A["down_proj"], batch.B["down_proj"]


def _times(calls: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, float]:
    """By the clock, as a caller sees it."""

    def finished(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return together({n: finished(c) for n, c in calls.items()}, "cpu", seconds, most=10)

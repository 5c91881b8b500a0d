"""One question about a video, answered in every way there is, with the same weights in one run.

Adapter: the question alone (applied beside the weights, merged into them, and by PEFT). Video in
context: from its frames, from cached vision features, and from cached keys and values. The seconds
to the first token and the tokens a second behind it; ways that must agree are compared before
anything is timed. Longest-lived state (features, keys and values, adapter in its slot) is there
before the clock starts; internalizing is not part of a question.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.end_to_end import Shape, _Bench
from bench.timing import together
from csrc_triton.peaks import peak_of
from v2l_fast.evaluation.prefix import continue_greedily, prefill
from v2l_fast.generation import ModelRunner, Request, SamplingParams
from v2l_fast.hypernet.adapted_linear import AdapterBank
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.interop.peft import save_peft
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.graphs import CudaGraphRunner
from v2l_fast.shapes.language import CAPTION_PROMPTS
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.vlm.smolvlm import SmolVLM

# Ways that give the same answer, to rounding.
AGREE = (
    ("adapter", "adapter, merged", "adapter, PEFT"),
    ("direct", "direct, vision features cached", "direct, keys and values cached"),
)


@dataclass(frozen=True)
class Asked:
    """A video and a question about it, ready for every way.

    Attributes:
        question: ids of the question alone.
        features: runs resizing and vision tower: [V, t, D].
        about: features -> the embedded prompt with the video in context [T, D].
        opening, continuation: the same prompt in two: to the video's last token, and the rest.
        visual_tokens: in that prompt.
    """

    backbone: SmolVLM
    adapter: Adapter
    question: Tensor
    features: Callable[[], Any]
    about: Callable[[Any], Tensor]
    opening: Callable[[Any], Tensor]
    continuation: Tensor
    visual_tokens: int


def shipped(seed: int) -> Asked:
    """A caption of a video that the shipped model never saw."""
    model = Video2LoRA.from_pretrained("shapes", device="cpu")
    backbone, edge = model.backbone, model.config.longest_edge
    with tempfile.TemporaryDirectory() as folder:
        scene = sample_scenes("test", 1, seed)[0]
        clip = model.load_clip(write_clip(scene, Path(folder) / "clip.mp4"))
    text = CAPTION_PROMPTS[0]
    video = backbone.encode(clip, edge)
    return Asked(
        backbone,
        model.internalize(clip),
        torch.tensor(backbone.prompt_builder.question(text)),
        lambda: backbone.encode(clip, edge),
        lambda encoded: backbone.video_prompt(encoded, text).embeddings,
        lambda encoded: backbone.video_prefix(encoded).embeddings,
        backbone.question_suffix(text).embeddings,
        backbone.video_prompt(video, text).visual_tokens,
    )


def random_weights(shape: Shape, device: str, dtype: torch.dtype, compile: bool) -> Asked:
    """The released models' shapes; a question of 32 tokens."""
    with torch.inference_mode():
        bench = _Bench(shape, device, dtype)
        backbone = bench.backbone
        if compile:
            backbone.compile()
        adapter = bench.generate_adapter(bench.features())[0]
        question = torch.randint(3, shape.vocabulary - 1, (32,), device=device)
        ids = torch.cat([bench.direct_ids[: -len(bench.question_ids)], question])
        split = int((ids == backbone.image_token_id).nonzero().max()) + 1
        whole, first = (lambda seen, part=part: backbone.embed(part, seen).embeddings
                        for part in (ids, ids[:split]))  # fmt: skip
        visual = int((ids == backbone.image_token_id).sum())
        rest = backbone.embed(ids[split:]).embeddings
    return Asked(backbone, adapter, question, bench.features, whole, first, rest, visual)


@torch.inference_mode()
def disagreeing(asked: Asked, new_tokens: int) -> list[str]:
    """Ways whose answer differs from the one it must be; with float32 weights there are none."""
    with tempfile.TemporaryDirectory() as folder:
        return _disagreeing(_ways(asked, new_tokens, Path(folder)), new_tokens)


def _disagreeing(ways: dict[str, Callable[[int], list[int]]], new_tokens: int) -> list[str]:
    answers = {name: way(new_tokens) for name, way in ways.items()}
    return [name for group in AGREE for name in group if answers[name] != answers[group[0]]]


@torch.inference_mode()
def compare(asked: Asked, new_tokens: int, seconds: float, checked: bool = False) -> dict[str, Any]:
    """Every way's answer, then its times.

    On a GPU of known bandwidth ``weight_floor_share`` is what part of the tokens a second a way
    reaches that reading the weights alone would allow.

    Args:
        new_tokens: of every answer, no end token before; 2 at least.
        seconds: to spend on each measurement.
        checked: the ways have agreed in float32; in bfloat16 rounding may tell them apart, where
            random weights make many a token as likely as the next one.
    """
    device = asked.backbone.decoder.device.type
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(asked, new_tokens, Path(folder))
        wrong = _disagreeing(ways, new_tokens)
        found: dict[str, Any] = {
            "question_tokens": len(asked.question), "visual_tokens": asked.visual_tokens,
            "new_tokens": new_tokens, "disagree": wrong, "passed": checked or not wrong,
            "checked_in_float32": checked, "ways": {},
        }  # fmt: skip
        if not found["passed"]:
            return found

        def timed(count: int) -> dict[str, float]:
            def finished(way: Callable[[int], list[int]]) -> Callable[[], None]:
                def run() -> None:
                    way(count)
                    if device == "cuda":
                        torch.cuda.synchronize()

                return run

            return together({n: finished(w) for n, w in ways.items()}, "cpu", seconds, most=30)

        first, whole = timed(1), timed(new_tokens)
    for name in ways:
        rest = max(whole[name] - first[name], 1e-9)
        found["ways"][name] = {
            "time_to_first_token": first[name],
            "tokens_per_second": (new_tokens - 1) / rest,
        }
    bandwidth = _bandwidth(device)
    if bandwidth is not None:
        floor = weight_floor(asked.backbone.decoder, bandwidth)
        for times in found["ways"].values():
            times["weight_floor_share"] = floor * times["tokens_per_second"]
    return found


def _bandwidth(device: str) -> float | None:
    """Bytes/s that this GPU can reach, where that is known."""
    peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    return None if peak is None else peak.reachable_bandwidth


def weight_floor(decoder: Decoder, bytes_per_second: float) -> float:
    """Seconds to read once what every token needs: the layers' and the LM head's weights."""
    weights = {id(p): p for m in (decoder.text_model.layers, decoder.lm_head)
               for p in m.parameters()}  # fmt: skip
    return sum(p.numel() * p.element_size() for p in weights.values()) / bytes_per_second


def _ways(asked: Asked, new_tokens: int, folder: Path) -> dict[str, Callable[[int], list[int]]]:
    """Name -> number of tokens -> ids; one question each, from its ids or frames."""
    backbone = asked.backbone
    decoder = backbone.decoder
    video = asked.features()
    longest = len(asked.about(video)) + new_tokens
    slots = AdapterBank.pack([asked.adapter], decoder.device, decoder.dtype)
    kind = CudaGraphRunner if decoder.device.type == "cuda" else ModelRunner
    plain, merged = (kind(d, 1, longest, ()) for d in (decoder, decoder.merged(asked.adapter)))
    peft = _peft(asked, folder)

    def answer(batch: ModelRunner, prompt: Tensor, count: int, adapters: Any = None) -> list[int]:
        row = Request(SamplingParams(count), -1 if adapters is None else 0)
        batch.prefill([row], [prompt], adapters)
        while batch.retire_finished():
            batch.decode(adapters)
        return row.tokens

    def question() -> Tensor:
        return decoder.embed(asked.question)

    opening = prefill(decoder, asked.opening(video), longest)
    return {
        "adapter": lambda count: answer(plain, question(), count, slots),
        "adapter, merged": lambda count: answer(merged, question(), count),
        "adapter, PEFT": peft,
        "direct": lambda count: answer(plain, asked.about(asked.features()), count),
        "direct, vision features cached": lambda count: answer(plain, asked.about(video), count),
        "direct, keys and values cached": lambda count: continue_greedily(
            decoder, opening, asked.continuation, (), count
        ).tokens[0],
    }


def _peft(asked: Asked, folder: Path) -> Callable[[int], list[int]]:
    """transformers' generation with the exported adapter, on the same weights."""
    import copy

    from peft import PeftModel

    model, decoder = asked.backbone.model, asked.backbone.decoder
    save_peft(asked.adapter, folder / "peft", asked.backbone.name_or_path)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model, shared), folder / "peft")
    wrapped = wrapped.to(decoder.device, decoder.dtype).eval()
    ids = asked.question[None]
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}

    def run(count: int) -> list[int]:
        found = wrapped.generate(
            input_ids=ids, min_new_tokens=count, max_new_tokens=count, **options
        )
        return found[0, ids.shape[1] :].tolist()

    return run

"""One question about a video, answered in every way there is, with the same weights in one run.

From an adapter, the question alone is the prompt; the adapter is applied beside the weights, merged
into them, or applied by PEFT. With the video in context, the answer starts from its frames, from
cached vision features, or from cached keys and values. Measured are the time to the first token and
the tokens per second after it. Answers that must agree are compared first. What lives longer than a
question (features, keys and values, the adapter in its slot) exists before the clock starts;
internalizing is not part of a question.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import (
    RESULTS,
    TARGETS,
    argument_parser,
    environment,
    median_latency,
    write_record,
)
from bench.models import FRAMES, SHAPES, RandomPair, Shape, random_context
from csrc_triton.device import peak_of
from v2l_fast.evaluation.methods import continue_greedily, prefill
from v2l_fast.generation import CacheKey, ModelRunner, PrefixCache, Request, SamplingParams
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.interop.peft import save_peft
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.graphs import CudaGraphRunner
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.vlm.smolvlm import SmolVLM

EXAMPLES = """
  python -m bench.runs.answer                                 the shipped model on the CPU
  python -m bench.runs.answer --shape 500M --device cuda      a released shape, random weights"""
# Ways that give the same answer, up to rounding.
AGREE = (
    ("adapter", "adapter, merged", "adapter, PEFT"),
    ("direct", "direct, vision features cached", "direct, keys and values cached"),
    ("adapter, second turn anew", "adapter, second turn reused"),
    ("adapter, late turn anew", "adapter, late turn reused"),
    ("direct, second turn anew", "direct, second turn reused"),
)
QUESTION_TOKENS = 32
# Of the answer before a second turn, and of the conversation before a late one.
ANSWER_TOKENS, LATE_TOKENS = 64, 1024
# Keys and values of all conversations measured.
CACHE_BYTES = 1 << 31

Way = Callable[[int], list[int]]


def main() -> int:
    parser = argument_parser("bench.runs.answer", __doc__, EXAMPLES)
    parser.add_argument(
        "--shape", choices=("shapes", "500M", "2.2B", "tiny"), default="shapes",
        help="the shipped model (shapes), or random weights of a shape; default: shapes",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--new-tokens", type=int, default=24, help="of every answer; default: 24")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each time; default: 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="measure CPU seconds, which other load on the machine changes less than the clock's",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: in bench/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = f"serve_{options.shape}_{options.device}"
    record = {"benchmark": name, **environment(options.device), "threads": options.threads}
    record |= {"load_average_before": os.getloadavg()[0], "shape": options.shape}
    if options.cpu_time and options.device != "cpu":
        parser.error("--cpu-time is for --device cpu")
    record["clock"] = "CPU time" if options.cpu_time else "wall time"
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.shape == "shapes":
        record |= compare(shipped(options.seed), options.new_tokens, options.seconds, clock=clock)
    else:
        shape, device = SHAPES[options.shape], options.device
        record |= measure(
            shape, device, options.new_tokens, options.seconds, device == "cuda", clock
        )
    if not record["passed"]:
        print(f"WRONG: {', '.join(record['disagree'])} answer differently; no times")
    for way, times in record["ways"].items():
        share = times.get("weight_floor_share")
        print(
            f"{way:32s} first token {times['time_to_first_token'] * 1e3:8.2f} ms  "
            f"then {times['tokens_per_second']:8.1f} tokens/s"
            + ("" if share is None else f"  {share:.0%} of what reading the weights allows")
        )
    record["targets"] = judge(record)
    write_record(record, options.out or RESULTS / f"{name}.json")
    return 0 if record["passed"] else 1


def judge(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Target -> limit, reached, met, for what was measured; a missed one is no failure."""
    adapter = record.get("ways", {}).get("adapter", {})
    reached = {name: adapter.get(name) for name in ("time_to_first_token", "weight_floor_share")}
    for row in record.get("rows", []):
        reached[f"internalize_{row['frames']}_seconds"] = row.get("internalize_seconds")
        reached[f"internalize_{row['frames']}_bytes"] = row.get("device_bytes")
    limits = next((shapes for gpu, shapes in TARGETS.items() if gpu in record["device"]), {})
    verdicts = {}
    for name, limit in limits.get(record["shape"], {}).items():
        value = reached.get(name)
        if value is not None:
            met = value >= limit if name.endswith("_share") else value <= limit
            verdicts[name] = {"limit": limit, "reached": value, "met": met}
            verdict = "met" if met else "MISSED"
            print(f"target {name}: {value:.4g}, target {limit:g}: {verdict}")
    return verdicts


# --- the question ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoQuestion:
    """A video and a question about it, prepared for every way.

    Attributes:
        question: ids of the question alone.
        encode: runs resizing and the vision tower.
        prompt: encoded video -> embeddings [T, D] of the prompt with the video in context.
        prefix, suffix: that prompt up to the last token of the video, and the rest.
        visual_tokens: number of visual tokens in it.
    """

    backbone: SmolVLM
    adapter: Adapter
    question: Tensor
    encode: Callable[[], Any]
    prompt: Callable[[Any], Tensor]
    prefix: Callable[[Any], Tensor]
    suffix: Tensor
    visual_tokens: int


def shipped(seed: int) -> VideoQuestion:
    """A caption of a video that the shipped model was not trained on."""
    from v2l_fast.shapes.language import CAPTION_PROMPTS
    from v2l_fast.shapes.render import write_clip
    from v2l_fast.shapes.world import sample_scenes

    model = Video2LoRA.from_pretrained("shapes", device="cpu")
    backbone, edge = model.backbone, model.config.longest_edge
    with tempfile.TemporaryDirectory() as folder:
        scene = sample_scenes("test", 1, seed)[0]
        clip = model.load_clip(write_clip(scene, Path(folder) / "clip.mp4"))
    text = CAPTION_PROMPTS[0]
    return VideoQuestion(
        backbone,
        model.internalize(clip),
        torch.tensor(backbone.prompt_builder.question(text)),
        lambda: backbone.encode(clip, edge),
        lambda video: backbone.video_prompt(video, text).embeddings,
        lambda video: backbone.video_prefix(video).embeddings,
        backbone.question_suffix(text).embeddings,
        backbone.video_prompt(backbone.encode(clip, edge), text).visual_tokens,
    )


@torch.inference_mode()
def random_question(
    shape: Shape, device: str, dtype: torch.dtype, compile: bool = False
) -> VideoQuestion:
    """A question of random ids to random weights of a released model's shape."""
    pair = RandomPair(shape, device, dtype)
    backbone = pair.backbone
    if compile:
        backbone.compile()
    generator = torch.Generator().manual_seed(1)
    ids = random_context(backbone, FRAMES, generator, end=QUESTION_TOKENS).to(device)
    visual = ids == backbone.image_token_id
    split = int(visual.nonzero().max()) + 1
    return VideoQuestion(
        backbone,
        pair.adapters(pair.encode())[0],
        ids[-QUESTION_TOKENS:],
        pair.encode,
        lambda features: backbone.embed(ids, [features]),
        lambda features: backbone.embed(ids[:split], [features]),
        backbone.embed(ids[split:]),
        int(visual.sum()),
    )


# --- every way ------------------------------------------------------------------------------------


def measure(
    shape: Shape,
    device: str,
    new_tokens: int,
    seconds: float,
    compile: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Compare random weights: bfloat16 on a GPU, after a check in float32."""
    dtype, checked = torch.float32, False
    if device == "cuda":
        exact = random_question(shape, device, torch.float32)
        checked = not disagreeing(exact, new_tokens)
        del exact
        dtype = torch.bfloat16
    question = random_question(shape, device, dtype, compile)
    return compare(question, new_tokens, seconds, checked, clock)


@torch.inference_mode()
def disagreeing(question: VideoQuestion, new_tokens: int) -> list[str]:
    """Ways with another answer than the first of their group; in float32 there are none."""
    with tempfile.TemporaryDirectory() as folder:
        return _disagreeing(_ways(question, new_tokens, Path(folder)), new_tokens)


def _disagreeing(ways: Mapping[str, Way], new_tokens: int) -> list[str]:
    answers = {name: way(new_tokens) for name, way in ways.items()}
    groups = [[name for name in group if name in answers] for group in AGREE]
    return [name for group in groups for name in group if answers[name] != answers[group[0]]]


@torch.inference_mode()
def compare(
    question: VideoQuestion,
    new_tokens: int,
    seconds: float,
    checked: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """The answer of every way, then its times.

    On a GPU of known bandwidth, ``weight_floor_share`` is the share that a way reaches of the
    tokens per second that reading the weights alone would allow.

    Args:
        new_tokens: of every answer, end tokens ignored; at least 2.
        seconds: to spend on each measurement.
        checked: the ways agreed in float32. In bfloat16 they may differ by rounding, since random
            weights make many tokens about equally likely.
        clock: as in :func:`~bench.harness.median_latency`.
    """
    decoder = question.backbone.decoder
    device = decoder.device.type
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(question, new_tokens, Path(folder))
        wrong = _disagreeing(ways, new_tokens)
        record: dict[str, Any] = {
            "question_tokens": len(question.question), "visual_tokens": question.visual_tokens,
            "new_tokens": new_tokens, "disagree": wrong, "passed": checked or not wrong,
            "checked_in_float32": checked, "ways": {},
        }  # fmt: skip
        if not record["passed"]:
            return record
        first, whole = (
            median_latency(
                {n: lambda w=w, c=c: w(c) for n, w in ways.items()}, device, seconds, clock=clock
            )
            for c in (1, new_tokens)
        )
    floor = weight_floor(decoder)
    for name in ways:
        rest = max(whole[name] - first[name], 1e-9)
        speed = (new_tokens - 1) / rest
        record["ways"][name] = {"time_to_first_token": first[name], "tokens_per_second": speed}
        if floor is not None:
            record["ways"][name]["weight_floor_share"] = floor * speed
    return record


def weight_floor(decoder: Decoder) -> float | None:
    """Seconds to read the weights that every token needs, on a GPU of known bandwidth."""
    peak = peak_of(torch.cuda.get_device_name()) if decoder.device.type == "cuda" else None
    if peak is None:
        return None
    modules = decoder.text_model.layers, decoder.lm_head
    weights = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in weights.values()) / peak.reachable_bandwidth


def _ways(question: VideoQuestion, new_tokens: int, folder: Path) -> dict[str, Way]:
    """Name -> function of the number of tokens that returns their ids."""
    decoder = question.backbone.decoder
    video = question.encode()
    prompt_tokens = len(question.prompt(video))
    following = ANSWER_TOKENS + len(question.question) + new_tokens
    longest = max(prompt_tokens, LATE_TOKENS) + following
    bank = AdapterBank.pack([question.adapter], decoder.device, decoder.dtype)
    kind = CudaGraphRunner if decoder.device.type == "cuda" else ModelRunner
    plain, merged = (kind(d, 1, longest, ()) for d in (decoder, decoder.merged(question.adapter)))

    def answer(runner: ModelRunner, prompt: Tensor, count: int, adapters: Any = None) -> list[int]:
        request = Request(SamplingParams(count), -1 if adapters is None else 0)
        runner.prefill([request], [prompt], adapters)
        while runner.retire_finished():
            runner.decode(adapters)
        return request.tokens

    def embed() -> Tensor:
        return decoder.embed(question.question)

    prefix = prefill(decoder, question.prefix(video), longest)
    ways: dict[str, Way] = {
        "adapter": lambda count: answer(plain, embed(), count, bank),
        "adapter, merged": lambda count: answer(merged, embed(), count),
    }
    if importlib.util.find_spec("peft") is not None:
        ways["adapter, PEFT"] = _peft(question, folder)
    ways["direct"] = lambda count: answer(plain, question.prompt(question.encode()), count)
    ways["direct, vision features cached"] = lambda count: answer(
        plain, question.prompt(video), count
    )
    ways["direct, keys and values cached"] = lambda count: continue_greedily(
        decoder, prefix, question.suffix, (), count
    ).tokens[0]
    return ways | _turns(question, kind, bank, longest)


def _turns(
    question: VideoQuestion, kind: Any, bank: AdapterBank | None, longest: int
) -> dict[str, Way]:
    """Later turns of a conversation, its history computed anew or its keys and values reused.

    The history is arbitrary tokens. With the video in context, its first turn is the prompt with
    the video; anew, the frames are encoded again.
    """
    decoder = question.backbone.decoder
    ids = question.question.tolist()
    ways: dict[str, Way] = {}

    def add(name: str, video: Callable[[], Tensor] | None, before: int) -> None:
        """A question after the video's prompt, if there is one, and ``before`` other tokens."""
        text = (ids * (before // len(ids) + 1))[:before] + ids
        # Stand-ins for the ids of the prompt with the video, of which only the number matters.
        shown = [] if video is None else [-1] * len(video())
        key = CacheKey(shown + text, name)
        adapters, slot = (bank, 0) if video is None else (None, -1)

        def answer(runner: ModelRunner, count: int) -> list[int]:
            cache = runner.prefix_cache
            prefix = None if cache is None else cache.acquire(runner.scoped(key))
            known = 0 if prefix is None else prefix.length
            request = Request(SamplingParams(count), slot, prefix=prefix)
            rest = torch.tensor(text[max(0, known - len(shown)) :], device=decoder.device)
            prompt = decoder.embed(rest)
            if video is not None and known < len(shown):
                prompt = torch.cat([video(), prompt])
            runner.prefill([request], [prompt], adapters)
            if cache is not None and prefix is not None:
                cache.release(prefix)
            while runner.retire_finished():
                runner.decode(adapters)
            return request.tokens

        plain, filled = (
            kind(decoder, 1, longest, (), prefix_cache=c) for c in (None, PrefixCache(CACHE_BYTES))
        )
        # The turn before: all but the question, which is not known.
        before_question = replace(key, tokens=key.tokens[: -len(ids)])
        first = Request(SamplingParams(1), slot, cache_key=before_question)
        history = decoder.embed(torch.tensor(text[: -len(ids)], device=decoder.device))
        embedded = history if video is None else torch.cat([video(), history])
        filled.prefill([first], [embedded], adapters)
        filled.retire_finished()
        ways[f"{name} anew"] = lambda count: answer(plain, count)
        ways[f"{name} reused"] = lambda count: answer(filled, count)

    add("adapter, second turn", None, len(ids) + ANSWER_TOKENS)
    add("adapter, late turn", None, LATE_TOKENS)
    add("direct, second turn", lambda: question.prompt(question.encode()), ANSWER_TOKENS)
    return ways


def _peft(question: VideoQuestion, folder: Path) -> Way:
    """Generation by transformers with the exported adapter, on the same weights."""
    import copy

    from peft import PeftModel

    model, decoder = question.backbone.model, question.backbone.decoder
    save_peft(question.adapter, folder / "peft", question.backbone.name_or_path)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model, shared), folder / "peft")
    wrapped = wrapped.to(decoder.device, decoder.dtype).eval()
    ids = question.question[None]
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}

    def run(count: int) -> list[int]:
        tokens = wrapped.generate(
            input_ids=ids, min_new_tokens=count, max_new_tokens=count, **options
        )
        return tokens[0, ids.shape[1] :].tolist()

    return run


if __name__ == "__main__":
    raise SystemExit(main())

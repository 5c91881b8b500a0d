"""Many requests at once: the serving engine beside transformers' ``generate``, in one process.

All requests are submitted together, as so many clients would, and there is no HTTP. They are
answered by the plain model, each from one of several adapters, or each with a video in context.
The rival answers the same requests as one static batch with transformers' Llama on the same
weights; an adapter is two batched products in plain torch beside each adapted layer, and a video is
encoded by the same code. Measured are the tokens per second of all answers together and the time to
a request's first token, from frames in memory on.

Before anything is timed, every token of every answer is judged, in the dtype that is timed: one
pass of transformers' model over prompt and answer must find it the likeliest, up to rounding.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, StoppingCriteria

from bench.harness import RESULTS, argument_parser, environment, error_limit, write_record
from bench.models import QUESTION_TOKENS, SHAPES, RandomPair, Shape
from v2l_fast.generation import SamplingParams
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.request import StreamingRequest
from v2l_fast.shapes.vlm import build_tokenizer
from v2l_fast.shapes.world import SHAPES as WORDS
from v2l_fast.video import Clip
from v2l_fast.vlm.base import video_prompt_ids
from v2l_fast.vlm.smolvlm import IMAGE_TOKEN, SmolVLM

EXAMPLES = """
  python -m bench.runs.engine --shape tiny --clients 4 --new-tokens 4
  python -m bench.runs.engine --shape 500M --device cuda"""
SOURCES = ("plain", "adapter", "context")
SYSTEMS = ("ours", "transformers")
# Videos, each with its adapter.
VIDEOS = 8
# Rounds that are measured, at least; the one before them captures, compiles and is judged.
ROUNDS = 3
# Seconds until a request counts as lost.
PATIENCE = 300.0


def main() -> int:
    parser = argument_parser("bench.runs.engine", __doc__, EXAMPLES)
    parser.add_argument("--shape", choices=("500M", "2.2B", "tiny"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clients", type=int, default=32, help="requests at once; default: 32")
    parser.add_argument("--new-tokens", type=int, default=24, help="of every answer; default: 24")
    parser.add_argument("--seconds", type=float, default=10.0, help="of all rounds; default: 10")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: in bench/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, device = options.shape, options.device
    name = f"engine_{shape}_{device}"
    record = {"benchmark": name, **environment(device), "threads": options.threads}
    sizes = options.clients, options.new_tokens, options.seconds
    record |= measure(SHAPES[shape], device, *sizes, compile=device == "cuda")
    for source, times in record.get("sources", {}).items():
        for system in SYSTEMS:
            print(
                f"{source:8s} {system:13s} {times[system]['tokens_per_second']:8.1f} tokens/s  "
                f"first token {times[system]['time_to_first_token'] * 1e3:8.2f} ms"
            )
    if not record["passed"]:
        print(f"WRONG: {record['reason']}; no times")
    write_record(record, options.out or RESULTS / f"{name}.json")
    return 0 if record["passed"] else 1


@dataclass
class Round:
    """What a system answered to all requests of a source.

    Attributes:
        tokens: ids of each answer.
        seconds: until the last answer was complete.
        first: seconds until each request's first token.
    """

    tokens: list[list[int]]
    seconds: float
    first: list[float]


@torch.no_grad()
def measure(
    shape: Shape, device: str, clients: int, new_tokens: int, seconds: float, compile: bool = False
) -> dict[str, Any]:
    """Both systems with ``clients`` requests at once: bfloat16 on a GPU, else float32.

    Args:
        new_tokens: of every answer, at least 2; end tokens are ignored.
        seconds: of all rounds, of which there are at least ``ROUNDS``.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    workload = Workload(shape, device, dtype, clients, new_tokens, compile)
    record: dict[str, Any] = {
        "clients": clients, "adapters": VIDEOS, "new_tokens": new_tokens,
        "prompt_tokens": {source: workload.prompt_tokens(source) for source in SOURCES},
        # As deep as the decoder is, and the rival itself rounds in each of its layers.
        "limit": 8 * error_limit(dtype),
    }  # fmt: skip
    rival = Rival(workload)
    with workload.engine() as engine:
        systems: Mapping[str, Callable[[str], Round]] = {
            "ours": lambda source: ask(engine, workload, source), "transformers": rival.answer,
        }  # fmt: skip
        gaps = {
            source: {name: rival.gap(source, run(source).tokens) for name, run in systems.items()}
            for source in SOURCES
        }
        wrong = [
            f"{source} by {name} ({gap:.1e})"
            for source, by_system in gaps.items()
            for name, gap in by_system.items()
            # Not "above": NaN is wrong, too.
            if not gap <= record["limit"]
        ]
        record["passed"] = not wrong
        if wrong:
            reason = "tokens that are not the likeliest: " + ", ".join(wrong)
            return {**record, "reason": reason}
        record["gaps"] = gaps
        return record | _times(systems, new_tokens * clients, seconds)


def _times(
    systems: Mapping[str, Callable[[str], Round]], tokens: int, seconds: float
) -> dict[str, Any]:
    """Medians over rounds in which the systems take turns, and ratios of medians."""
    rounds: dict[tuple[str, str], list[Round]] = {
        (source, name): [] for source in SOURCES for name in systems
    }
    start, count = time.perf_counter(), 0
    while count < ROUNDS or time.perf_counter() - start < seconds:
        for source, name in rounds:
            rounds[source, name].append(systems[name](source))
        count += 1
    sources: dict[str, dict[str, Any]] = {}
    for source in SOURCES:
        row: dict[str, Any] = {}
        for name in systems:
            taken = rounds[source, name]
            row[name] = {
                "tokens_per_second": tokens / statistics.median(r.seconds for r in taken),
                "time_to_first_token": statistics.median(statistics.median(r.first) for r in taken),
                "last_first_token": statistics.median(max(r.first) for r in taken),
            }
        ours, theirs = row["ours"], row["transformers"]
        row["ratios"] = {
            "tokens_per_second": ours["tokens_per_second"] / theirs["tokens_per_second"],
            "time_to_first_token": ours["time_to_first_token"] / theirs["time_to_first_token"],
        }
        sources[source] = row
    speeds = {source: row["ours"]["tokens_per_second"] for source, row in sources.items()}
    return {
        "rounds": count, "sources": sources,
        "adapter_to_plain": speeds["adapter"] / speeds["plain"],
        "adapter_to_context": speeds["adapter"] / speeds["context"],
    }  # fmt: skip


class Workload:
    """Models of random weights, videos with their adapters, and a question for each request.

    Request i is about video i modulo ``VIDEOS``. Text is that of the tokenizer of the shapes world;
    the vocabulary of the shape is enlarged where it is smaller.
    """

    def __init__(
        self,
        shape: Shape,
        device: str,
        dtype: torch.dtype,
        clients: int,
        new_tokens: int,
        compile: bool = False,
    ) -> None:
        tokenizer = build_tokenizer()
        shape = replace(shape, vocabulary=max(shape.vocabulary, len(tokenizer)))
        pair = RandomPair(shape, device, dtype)
        features = pair.encode()
        factors = [pair.adapters(features.roll(shift, 0)) for shift in range(VIDEOS)]
        model = pair.backbone.model
        model.config.image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self.backbone = SmolVLM(model, tokenizer, pair.backbone.name_or_path)
        # An answer ends at its limit of tokens.
        self.backbone.stop_ids = ()
        self.edge, self.new_tokens = pair.edge, new_tokens
        self.model = Video2LoRA(self.backbone, pair.network)
        if compile:
            self.model.compile()
        self.adapters: list[Adapter] = [self.model.attach(batch[0]) for batch in factors]
        self.clips = [Clip.from_frames(pair.frames.roll(i, 0), fps=1.0) for i in range(VIDEOS)]
        self.questions = [_question(number) for number in range(clients)]

    def ids(self, source: str, number: int) -> list[int]:
        """Token ids of a request's prompt."""
        builder, question = self.backbone.prompt_builder, self.questions[number]
        if source != "context":
            return builder.question(question)
        clip = self.clips[number % VIDEOS]
        return video_prompt_ids(builder, clip, question, self.edge, answer_follows=True)

    def prompt_tokens(self, source: str) -> int:
        """Tokens of the longest prompt."""
        return max(len(self.ids(source, number)) for number in range(len(self.questions)))

    def prompt(self, source: str, number: int) -> Tensor:
        """A request's embedded prompt [T, D]; a video is encoded."""
        chunk = None
        if source == "context":
            chunk = self.backbone.encode(self.clips[number % VIDEOS], self.edge)
        return self.backbone.prompt(self.ids(source, number), chunk).embeddings

    def requests(self, source: str) -> list[StreamingRequest]:
        """All requests, not submitted."""
        return [
            StreamingRequest(
                question,
                (str(number % VIDEOS),) if source == "adapter" else (),
                self.clips[number % VIDEOS] if source == "context" else None,
                SamplingParams(max_new_tokens=self.new_tokens),
                private=True,
            )
            for number, question in enumerate(self.questions)
        ]  # fmt: skip

    def engine(self) -> Engine:
        """An engine that has room for all requests at once and reuses no prompt."""
        clients = len(self.questions)
        return Engine(
            self.model, _Store(self.adapters), max_batch=clients,
            max_context=self.prompt_tokens("context") + self.new_tokens, adapter_slots=VIDEOS,
            queue_limit=clients, warm_up=False, prefix_cache_bytes=0,
        )  # fmt: skip


class _Store:
    """Adapters in memory; the id is the position."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = list(adapters)

    def put(self, adapter: Adapter) -> str:
        self._adapters.append(adapter)
        return str(len(self._adapters) - 1)

    def get(self, id: str) -> Adapter:
        return self._adapters[int(id)]


def _question(number: int) -> str:
    """As many words for each number, in an order of its own."""
    digits = [number // len(WORDS) ** place % len(WORDS) for place in range(QUESTION_TOKENS)]
    return " ".join(WORDS[digit] for digit in digits)


def ask(engine: Engine, workload: Workload, source: str) -> Round:
    """Submit all requests and wait for their answers."""
    requests = workload.requests(source)
    start = time.perf_counter()
    for request in requests:
        engine.submit(request)
    first = [request.result(PATIENCE)[2].time_to_first_token for request in requests]
    seconds = time.perf_counter() - start
    return Round([list(request.tokens) for request in requests], seconds, first)


# --- the rival ------------------------------------------------------------------------------------


class _FirstToken(StoppingCriteria):
    """Notes when the first token of a batch is there; ends nothing."""

    def __init__(self) -> None:
        self.time: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.time is None:
            _wait(input_ids.device)
            self.time = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Rival:
    """transformers' Llama on the workload's weights; all requests are one static batch."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        decoder = workload.backbone.decoder
        self.device = decoder.device
        with torch.device("meta"):
            self.llama = LlamaForCausalLM(decoder.config).eval()
        self.llama.model, self.llama.lm_head = decoder.text_model, decoder.lm_head
        clients = len(workload.questions)
        index = torch.arange(clients, device=self.device) % VIDEOS
        sides = [adapter.merged() for adapter in workload.adapters]
        # Module -> [L, E, r, width]: each example's factors.
        self.A, self.B = (
            {
                module: torch.stack([side[module] for side in of_side], 1).index_select(1, index)
                for module in of_side[0]
            }
            for of_side in zip(*sides, strict=True)
        )

    def answer(self, source: str) -> Round:
        """Greedy answers of the workload's number of tokens."""
        first, count = _FirstToken(), self.workload.new_tokens
        _wait(self.device)
        start = time.perf_counter()
        embeddings, mask = self._batch(source)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with self._adapted(source):
            tokens = self.llama.generate(
                inputs_embeds=embeddings, attention_mask=mask, stopping_criteria=[first],
                min_new_tokens=count, max_new_tokens=count, **options,
            )  # fmt: skip
        answers = tokens.tolist()
        seconds = time.perf_counter() - start
        assert first.time is not None
        return Round(answers, seconds, [first.time - start] * len(answers))

    def gap(self, source: str, answers: Sequence[Sequence[int]]) -> float:
        """The largest distance of an answer's token to the likeliest one after the same tokens.

        In logits, relative to the largest of them; inf for an answer of another length.
        """
        count = self.workload.new_tokens
        if any(len(tokens) != count for tokens in answers):
            return float("inf")
        chosen = torch.tensor(answers, device=self.device)
        prompts, mask = self._batch(source)
        embeddings = torch.cat([prompts, self.workload.backbone.embed(chosen[:, :-1])], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), count - 1)], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with self._adapted(source):
            logits = self.llama(
                inputs_embeds=embeddings, attention_mask=mask, position_ids=positions,
                logits_to_keep=count, use_cache=False,
            ).logits.float()  # fmt: skip
        likeliest = logits.amax(-1)
        gaps = likeliest - logits.gather(-1, chosen[..., None])[..., 0]
        return float((gaps / logits.abs().amax(-1)).max())

    def _batch(self, source: str) -> tuple[Tensor, Tensor]:
        """Embedded prompts [E, T, D], padded on the left, and the mask [E, T] of their tokens."""
        numbers = range(len(self.workload.questions))
        prompts = [self.workload.prompt(source, number) for number in numbers]
        longest = max(map(len, prompts))
        embeddings = prompts[0].new_zeros(len(prompts), longest, prompts[0].shape[1])
        mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):
            embeddings[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        return embeddings, mask

    @contextlib.contextmanager
    def _adapted(self, source: str) -> Iterator[None]:
        """Inside the block, each example's layers have its adapter, if the source is adapters."""
        handles = []
        for module in self.A if source == "adapter" else ():
            for layer in range(self.workload.backbone.decoder.num_layers):
                linear = self.workload.backbone.linear(layer, module)
                a, b = self.A[module][layer], self.B[module][layer]
                handles.append(linear.register_forward_hook(self._hook(a, b)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        scale = self.workload.adapters[0].scale
        return lambda _, inputs, output: output + scale * ((inputs[0] @ a.mT) @ b)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    raise SystemExit(main())

"""The serving engine under load, on the CPU with the shipped model.

Many clients ask at once, each about one of several internalized videos, about two composed, or
without an adapter, greedily and drawn; every answer is compared with the one given alone. Answers a
second against one request at a time, in turns in the same process; time to first token and between
pieces; memory; and what internalizing beside it costs. Clients are tasks of one event loop, as in
the server.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.latency import Latencies
from v2l_fast.generation import SamplingParams
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.requests import GenerationRequest
from v2l_fast.shapes.language import CAPTION_PROMPTS, ask_several
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.store.adapter_store import AdapterStore

NEW_TOKENS = 40
QUESTIONS_PER_VIDEO = 4
# Load and one request at a time take turns, so that both meet the same disturbances.
ROUNDS = 5
# Seconds of one request at a time for each second of load.
ALONE_SHARE = 0.2
# Further share at the end, in which videos are internalized without pause.
INTERNALIZING_SHARE = 0.2
# What the process may grow by after a quarter of the run: allocators keep some pages.
GROWTH_LIMIT = 0.03


@dataclass
class Load:
    """What a phase under load gave."""

    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    first: Latencies = field(default_factory=Latencies)
    between: Latencies = field(default_factory=Latencies)

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    def record(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "requests": self.requests,
            "wrong_answers": self.wrong,
            "errors": self.errors[:10],
            "error_count": len(self.errors),
            "requests_per_second": self.rate,
            "tokens_per_second": self.tokens / self.seconds,
            "time_to_first_token": self.first.summary(),
            "between_pieces": self.between.summary(),
        }


def run(minutes: float, clients: int, videos: int, seed: int, say: Callable[[str], None]) -> dict:
    """The whole test; ``say`` is told how it goes."""
    seconds = 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        model = Video2LoRA.from_pretrained("shapes", device="cpu")
        store = AdapterStore(Path(folder) / "adapters")
        scenes = sample_scenes("test", videos, seed)
        paths = [write_clip(s, Path(folder) / f"{i}.mp4") for i, s in enumerate(scenes)]
        ids = [store.put(model.internalize(path)) for path in paths]
        asked = questions(scenes, ids, seed)
        say(f"{len(asked)} different requests, each answered alone first")
        expected = {one: alone(model, store, one) for one in asked}

        resident: list[int] = []
        load, single = Load(), Load()
        with Engine(model, store, queue_limit=4 * clients) as engine:
            for number in range(ROUNDS):
                one_at_a_time(model, store, asked, seconds * ALONE_SHARE / ROUNDS, single)
                under_load(
                    engine, expected, clients, seconds / ROUNDS, seed + number, load, resident
                )
                say(
                    f"round {number + 1} of {ROUNDS}: {load.rate:.1f} requests/s from {clients} "
                    f"clients, {single.rate:.1f} one at a time"
                )
            busy, share = Load(), seconds * INTERNALIZING_SHARE
            under_load(engine, expected, clients, share, seed + ROUNDS, busy, [], paths)
            stats = engine.stats()
    settled = resident[len(resident) // 4]
    found: dict[str, Any] = {
        "clients": clients,
        "adapters": videos,
        "different_requests": len(asked),
        "one_at_a_time": {
            "seconds": single.seconds, "requests": single.requests,
            "requests_per_second": single.rate,
            "tokens_per_second": single.tokens / single.seconds,
        },
        "load": load.record(),
        "speedup": load.rate / single.rate,
        "resident_bytes": {
            "settled": settled, "most": max(resident), "end": resident[-1],
            "growth": resident[-1] / settled - 1, "every_second": resident,
        },
        "while_internalizing": {**busy.record(), "videos": stats.jobs_done},
        "engine": asdict(stats),
    }  # fmt: skip
    found["passed"] = {
        "no_error": not load.errors and not busy.errors and not stats.jobs_failed,
        "no_wrong_answer": not load.wrong and not busy.wrong,
        "memory_flat": found["resident_bytes"]["growth"] <= GROWTH_LIMIT,
        "four_times": found["speedup"] >= 4,
    }
    return found


def questions(scenes: list, ids: list[str], seed: int) -> list[GenerationRequest]:
    """About each video, about it with the next one composed, and without; a quarter drawn."""
    rng = random.Random(seed)
    asked = []
    for place, scene in enumerate(scenes):
        texts = [CAPTION_PROMPTS[0]]
        texts += [turn.question for turn in ask_several(scene, QUESTIONS_PER_VIDEO - 1, rng)]
        both = (ids[place], ids[(place + 1) % len(ids)])
        for number, text in enumerate(texts):
            for adapters in ((ids[place],), both, ()):
                drawn = {"temperature": 0.8, "seed": place} if number == 1 else {}
                asked.append(
                    GenerationRequest(text, adapters, sampling=SamplingParams(NEW_TOKENS, **drawn))
                )
    return list(dict.fromkeys(asked))


def alone(model: Video2LoRA, store: AdapterStore, one: GenerationRequest) -> str:
    parts = [model.attach(store.get(id)) for id in one.adapters]
    return model.ask(one.text, Adapter.compose(parts) if parts else None, **asdict(one.sampling))


def one_at_a_time(
    model: Video2LoRA,
    store: AdapterStore,
    asked: list[GenerationRequest],
    seconds: float,
    single: Load,
) -> None:
    """The same requests one after the other, each with its adapter at hand; adds to ``single``."""
    known: dict[tuple[str, ...], Adapter | None] = {(): None}
    for one in asked:
        if one.adapters not in known:
            composed = Adapter.compose([store.get(id) for id in one.adapters])
            known[one.adapters] = model.attach(composed)
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        one = asked[single.requests % len(asked)]
        answer = model.answer(one.text, known[one.adapters], **asdict(one.sampling))[0]
        single.tokens += answer.new_tokens
        single.requests += 1
    single.seconds += spent


def under_load(
    engine: Engine,
    expected: dict[GenerationRequest, str],
    clients: int,
    seconds: float,
    seed: int,
    load: Load,
    resident: list[int],
    paths: list[Path] | None = None,
) -> None:
    """``clients`` ask without pause; with ``paths``, their videos are internalized meanwhile.

    Adds to ``load`` and, every second, to ``resident``.
    """
    asked = list(expected)
    start = time.perf_counter()

    async def client(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        while time.perf_counter() - start < seconds:
            one = rng.choice(asked)
            last = time.perf_counter()
            pieces = []
            try:
                generation = engine.submit(one)
                async for chunk in generation.chunks():
                    now = time.perf_counter()
                    if chunk.text:
                        (load.between if pieces else load.first).add(now - last)
                        pieces.append(chunk.text)
                        last = now
            except Exception as error:
                load.errors.append(f"{type(error).__name__}: {error}")
                continue
            load.wrong += "".join(pieces) != expected[one]
            load.requests += 1
            load.tokens += generation.usage.completion_tokens

    async def watch() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while time.perf_counter() - start < seconds:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
            await asyncio.sleep(1)

    async def internalize() -> None:
        place = 0
        while time.perf_counter() - start < seconds:
            job = engine.internalize(paths[place % len(paths)])
            await asyncio.to_thread(job.wait)
            place += 1

    async def main() -> None:
        tasks = [client(number) for number in range(clients)] + [watch()]
        await asyncio.gather(*tasks, *([internalize()] if paths else []))

    asyncio.run(main())
    load.seconds += time.perf_counter() - start

"""The server under load, measured at its clients, over HTTP.

``v2l serve`` runs in a process of its own with the shipped model on the CPU, the clients in others.
Ordinary clients ask without pause, each about one of several internalized videos, about two
composed, or without an adapter, greedily and sampled; every answer is compared with the answer to
the same request alone. They first have the server to themselves (the quiet run), then share it with
odd clients: slow readers, extreme parameters, invalid uploads, equal uploads, clients that leave,
and an 8K clip.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.harness import RESULTS, argument_parser, environment, write_record
from bench.models import write_clip
from bench.runs.serve_clients import LARGE_SECONDS, CheckedRequest, Observations, work
from v2l_fast.generation import SamplingParams
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes import render
from v2l_fast.shapes.language import CAPTION_PROMPTS, ask_several
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.store.adapter_store import AdapterStore

EXAMPLES = """
  python -m bench.runs.serve                                      64 clients, 10 minutes
  python -m bench.runs.serve --minutes 1 --clients 8 --videos 2"""
PROCESSES = multiprocessing.get_context("spawn")
MODEL = "shapes-any"
CLIENT_PROCESSES = 2
NEW_TOKENS = 40
QUESTIONS_PER_VIDEO = 4
# Share of ordinary clients that use OpenAI's client, which costs ten times a plain socket.
OFFICIAL_SHARE = 1 / 8
# Length of the quiet run relative to the mixed run.
QUIET_SHARE = 0.25
# Limit of the time to first token beside odd clients, relative to the quiet run.
RATIO_LIMIT = 3.0
# Limit of the growth of the server's memory: allocators keep some pages.
GROWTH_LIMIT = 0.03
MEMORY_WINDOW = 60.0
LARGE_FRAMES, LARGE_HEIGHT = 8, 4320
ADDRESS = "127.0.0.1"


def main() -> int:
    parser = argument_parser("bench.runs.serve", __doc__, EXAMPLES)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the mixed run; default: 10")
    parser.add_argument("--clients", type=int, default=64, help="ordinary clients; default: 64")
    parser.add_argument("--videos", type=int, default=8, help="adapters in use; default: 8")
    parser.add_argument("--threads", type=int, default=1, help="of the server; default: 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_http.json")
    options = parser.parse_args()
    record = {"benchmark": "serve_http", **environment(), "threads": options.threads}
    record["load_average_before"] = os.getloadavg()[0]
    sizes = options.minutes, options.clients, options.videos
    record |= run(*sizes, options.seed, options.threads, print)
    for problem in record["problems"][:5] + record["load"]["errors"][:5]:
        print(f"PROBLEM {problem}")
    print(
        f"first token p95 {record['first_token_ratio']:.2f} times the quiet run's; "
        f"memory {record['resident_bytes']['growth']:+.1%}; odd: {record['odd']}, "
        f"8K clip: {record['clip_8k']}"
    )
    print("  ".join(f"{name}: {'yes' if ok else 'NO'}" for name, ok in record["passed"].items()))
    write_record(record, options.out)
    return 0 if all(record["passed"].values()) else 1


def run(
    minutes: float, clients: int, videos: int, seed: int, threads: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Quiet run, mixed run, and verdicts; progress is reported through ``say``."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes = sample_scenes("test", videos + 1, seed)
        paths = [render.write_clip(s, folder / f"{i}.mp4") for i, s in enumerate(scenes)]
        large = write_clip(folder / "8k.mp4", "h264", LARGE_FRAMES, LARGE_HEIGHT)
        with running_server(folder, clients, threads) as (server, port):
            ids = [_internalize(port, path) for path in paths[:-1]]
            requests, extreme = checked_requests(folder / "store", scenes[:-1], ids, seed)
            say(f"{len(requests)} different requests, each answered alone first")
            options = {"requests": requests, "seed": seed, "extreme": extreme,
                       "clip": str(paths[-1]), "large": str(large)}  # fmt: skip
            phase = server, (ADDRESS, port), clients, options
            quiet, _, _ = _phase(*phase, 60 * minutes * QUIET_SHARE, mixed=False)
            say(f"quiet: {_line(quiet)}")
            load, odd, resident = _phase(*phase, 60 * minutes, mixed=True)
            say(f"mixed: {_line(load)}")
            alive = server.poll() is None
            server.send_signal(signal.SIGTERM)
            ended = server.wait(LARGE_SECONDS)
    window = min(MEMORY_WINDOW, minutes * 60 / 4)
    # One sample per second.
    count = max(1, int(window))
    first, last = (statistics.median(part) for part in (resident[:count], resident[-count:]))
    growth = last / first - 1
    ratio = load["time_to_first_token"]["p95"] / max(quiet["time_to_first_token"]["p95"], 1e-9)
    return {
        "clients": clients,
        "official_clients": _official(clients),
        "adapters": videos,
        "different_requests": len(requests),
        "quiet": quiet,
        "load": load,
        "first_token_ratio": ratio,
        "odd": dict(odd.odd),
        "clip_8k": odd.clip,
        "problems": odd.problems[:20],
        "problem_count": len(odd.problems),
        "resident_bytes": {
            "window_seconds": window, "first": first, "last": last, "most": max(resident),
            "growth": growth, "every_second": resident,
        },
        "passed": {
            "no_wrong_answer": not quiet["wrong_answers"] and not load["wrong_answers"],
            "none_lost": not quiet["error_count"] and not load["error_count"],
            "odd_clients_right": not odd.problems and odd.clip is not None,
            "first_token_ratio": ratio <= RATIO_LIMIT,
            "memory_flat": growth <= GROWTH_LIMIT,
            "server_ended_well": alive and ended in (0, -signal.SIGTERM),
        },
    }  # fmt: skip


# --- the server -----------------------------------------------------------------------------------


@contextmanager
def running_server(
    folder: Path, clients: int, threads: int
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process of ``v2l serve`` and its port, once it answers."""
    command = [sys.executable, "-m", "v2l_fast", "serve", "--model", MODEL]
    command += ["--store", str(folder / "store")]
    command += ["--host", ADDRESS, "--port", "0", "--device", "cpu", "--log-level", "warning"]
    command += ["--max-queue", str(4 * clients)]
    variables = {"OMP_NUM_THREADS": str(threads), "COLUMNS": "200"}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | variables
        )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if "http://" not in line:
                raise RuntimeError(f"no server: {(folder / 'server.log').read_text()[-2000:]}")
            port = int(line.rstrip().rstrip("/").rpartition(":")[2])
            while not _is_healthy(port):
                time.sleep(0.1)
            yield server, port
        finally:
            server.kill()
            server.wait()


def _is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://{ADDRESS}:{port}/health", timeout=LARGE_SECONDS).is_success
    except httpx.TransportError:
        return False


def _internalize(port: int, path: Path) -> str:
    with httpx.Client(base_url=f"http://{ADDRESS}:{port}", timeout=LARGE_SECONDS) as client:
        with open(path, "rb") as file:
            video = client.post("/v1/videos", files={"file": file}).raise_for_status().json()
        while video["status"] not in ("completed", "failed"):
            time.sleep(0.05)
            video = client.get(f"/v1/videos/{video['id']}").raise_for_status().json()
    if video["status"] == "failed":
        raise RuntimeError(f"{path}: {video['error']['message']}")
    return video["adapter_id"]


# --- requests and their answers -------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    text: str
    adapters: tuple[str, ...]
    sampling: SamplingParams


def checked_requests(
    folder: Path, scenes: list, ids: list[str], seed: int
) -> tuple[list[CheckedRequest], list[CheckedRequest]]:
    """Requests with their right answers; then requests with extreme parameters."""
    model = Video2LoRA.from_pretrained(MODEL, device="cpu")
    store = AdapterStore(folder)

    def alone(request: _Question) -> str:
        parts = [model.attach(store.get(id)) for id in request.adapters]
        adapter = Adapter.compose(parts) if parts else None
        return model.answer(request.text, adapter, **asdict(request.sampling))[0].text

    try:
        requests = _requests(scenes, ids, seed)
        checked = [CheckedRequest(_body(one), alone(one)) for one in requests]
        number = next(i for i, one in enumerate(requests) if one.sampling.temperature == 0)
        sampling = SamplingParams(NEW_TOKENS, temperature=0.8, seed=7)
        sampled = alone(replace(requests[number], sampling=sampling))
    finally:
        store.close()
    return checked, _extreme_requests(checked[number], sampled)


def _requests(scenes: list, ids: list[str], seed: int) -> list[_Question]:
    """About each video, about it composed with the next one, and without; a quarter sampled."""
    rng = random.Random(seed)
    requests = []
    for index, scene in enumerate(scenes):
        texts = [CAPTION_PROMPTS[0]]
        texts += [turn.question for turn in ask_several(scene, QUESTIONS_PER_VIDEO - 1, rng)]
        both = (ids[index], ids[(index + 1) % len(ids)])
        for number, text in enumerate(texts):
            options = {"temperature": 0.8, "seed": index} if number == 1 else {}
            sampling = SamplingParams(NEW_TOKENS, **options)
            for adapters in ((ids[index],), both, ()):
                requests.append(_Question(text, adapters, sampling))
    return list(dict.fromkeys(requests))


def _body(request: _Question) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.adapters[0] if len(request.adapters) == 1 else MODEL,
        "messages": [{"role": "user", "content": request.text}],
        "max_tokens": request.sampling.max_new_tokens,
        "temperature": request.sampling.temperature,
        "seed": request.sampling.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if len(request.adapters) > 1:
        body["video_ids"] = list(request.adapters)
    return body


def _extreme_requests(greedy: CheckedRequest, sampled: str) -> list[CheckedRequest]:
    """Parameters at the edges of what is allowed, with the answers their meaning implies.

    Args:
        sampled: the answer to the same question at temperature 0.8 with seed 7.
    """
    likeliest = [
        {"temperature": 1e-40}, {"temperature": 1e-300}, {"temperature": 5e-324},
        {"temperature": 2.0, "top_p": 1e-300}, {"temperature": 0.8, "top_p": 5e-324},
        {"temperature": 2.0, "top_k": 1}, {"stop": ["\u2603", "\U0001f600", "~" * 256, "\0"]},
        {"seed": -1}, {"seed": (1 << 63) - 1}, {"top_k": 1 << 31, "top_p": 1.0},
    ]  # fmt: skip
    neutral = [{}, {"top_k": 1 << 31}, {"top_p": 1.0}, {"top_k": 0, "stop": []}]
    any_answer = [
        {"temperature": 2.0, "seed": -(1 << 63)}, {"temperature": 1e-3, "seed": (1 << 63) - 1},
        {"temperature": 2.0, "top_p": 1 - 2**-53}, {"max_tokens": 1, "temperature": 2.0},
    ]  # fmt: skip
    body, sampling = greedy.body, {"temperature": 0.8, "seed": 7}
    return [
        *(CheckedRequest(body | change, greedy.answer) for change in likeliest),
        *(CheckedRequest(body | sampling | change, sampled) for change in neutral),
        *(CheckedRequest(body | change, None) for change in any_answer),
    ]


# --- phases ---------------------------------------------------------------------------------------


def _official(clients: int) -> int:
    return round(clients * OFFICIAL_SHARE)


def _phase(
    server: subprocess.Popen,
    url: tuple[str, int],
    clients: int,
    options: dict[str, Any],
    seconds: float,
    mixed: bool,
) -> tuple[dict[str, Any], Observations, list[int]]:
    """What ordinary clients saw, what odd clients saw, and the server's memory every second."""
    parts = []
    count = min(CLIENT_PROCESSES, clients)
    for number in range(count):
        share = clients // count + (number < clients % count)
        official = _official(clients) // count + (number < _official(clients) % count)
        parts.append((True, {"clients": share, "official": min(official, share)}))
    if mixed:
        parts.append((False, {}))
    running = []
    for number, (ordinary, own) in enumerate(parts):
        ours, theirs = PROCESSES.Pipe()
        own |= {"seconds": seconds, "seed": options["seed"] * 100 + number}
        process = PROCESSES.Process(target=work, args=(theirs, ordinary, url, options | own))
        process.start()
        theirs.close()
        running.append((process, ours))
    for _, ours in running:
        ours.recv()
    start = time.perf_counter()
    for _, ours in running:
        ours.send("begin")
    resident = []
    page = os.sysconf("SC_PAGE_SIZE")
    while (spent := time.perf_counter() - start) < seconds and server.poll() is None:
        resident.append(int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * page)
        time.sleep(min(1.0, seconds - spent))
    seen = [ours.recv() for _, ours in running]
    for process, _ in running:
        process.join()
    odd = seen.pop() if mixed else Observations()
    return _summary(seen), odd, resident


def _summary(parts: list[Observations]) -> dict[str, Any]:
    first, between = parts[0].first, parts[0].between
    for part in parts[1:]:
        first.counts = np.add(first.counts, part.first.counts)
        between.counts = np.add(between.counts, part.between.counts)
    seconds = max(part.seconds for part in parts)
    started, answered, tokens, wrong = (
        sum(getattr(part, name) for part in parts)
        for name in ("started", "answered", "tokens", "wrong")
    )
    return {
        "seconds": seconds,
        "started": started,
        "requests": answered,
        "wrong_answers": wrong,
        "errors": [error for part in parts for error in part.errors][:10],
        "error_count": started - answered,
        "requests_per_second": answered / seconds,
        "tokens_per_second": tokens / seconds,
        "time_to_first_token": first.summary(),
        "between_pieces": between.summary(),
    }


def _line(summary: dict[str, Any]) -> str:
    first = summary["time_to_first_token"]
    return (
        f"{summary['requests']} answers, {summary['wrong_answers']} wrong, "
        f"{summary['error_count']} lost, {summary['requests_per_second']:.1f} per second; "
        f"first token p50 {first['p50'] * 1e3:.0f} ms, p95 {first['p95'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    raise SystemExit(main())

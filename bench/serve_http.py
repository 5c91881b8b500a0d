"""The server under load, measured where its users are: at the client, over HTTP.

``v2l serve`` runs as a process of its own with the shipped model on the CPU, clients in others.
Ordinary clients ask without pause, each about one of several internalized videos, about two
composed, or without an adapter, greedily and drawn; every answer is compared with the one given
alone. First they are by themselves (the quiet run), then beside odd ones: slow readers, extreme
parameters, uploads that are no videos, equal uploads, clients that leave, and a clip of 8K.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.http_client import Ask, Seen, work
from bench.serve_load import GROWTH_LIMIT, alone, questions
from v2l_fast.generation import SamplingParams
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.requests import GenerationRequest
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.store.adapter_store import AdapterStore

PROCESSES = multiprocessing.get_context("spawn")
CLIENT_PROCESSES = 2
# Of the ordinary clients, those that use OpenAI's own client: it costs ten times a plain socket.
OFFICIAL_SHARE = 1 / 8
# Length of the quiet run, in lengths of the mixed one.
QUIET_SHARE = 0.25
# Time to first token beside odd clients, in those of the quiet run.
RATIO_LIMIT = 3.0
MEMORY_WINDOW = 60.0
LARGE_FRAMES, LARGE_SIZE = 8, (7680, 4320)
ADDRESS = "127.0.0.1"


def run(
    minutes: float, clients: int, videos: int, seed: int, threads: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The whole test; ``say`` is told how it goes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes = sample_scenes("test", videos + 1, seed)
        paths = [write_clip(s, folder / f"{i}.mp4") for i, s in enumerate(scenes)]
        large = _large_clip(folder / "8k.mp4")
        with _served(folder, clients, threads) as (server, port):
            url = ADDRESS, port
            ids = [_internalize(port, path) for path in paths[:-1]]
            asks, extreme = _expected(folder / "store", scenes[:-1], ids, seed)
            say(f"{len(asks)} different requests, each answered alone first")
            options = {"asks": asks, "seed": seed, "extreme": extreme, "clip": str(paths[-1]),
                       "large": str(large)}  # fmt: skip
            quiet, _, _ = _phase(url, 60 * minutes * QUIET_SHARE, clients, options, False, server)
            say(f"quiet: {_line(quiet)}")
            load, odd, resident = _phase(url, 60 * minutes, clients, options, True, server)
            say(f"mixed: {_line(load)}")
            alive = server.poll() is None
            server.send_signal(signal.SIGTERM)
            ended = server.wait(120)
    window = min(MEMORY_WINDOW, minutes * 60 / 4)
    # One figure a second.
    count = max(1, int(window))
    first, last = (statistics.median(part) for part in (resident[:count], resident[-count:]))
    ratio = load["time_to_first_token"]["p95"] / max(quiet["time_to_first_token"]["p95"], 1e-9)
    record: dict[str, Any] = {
        "clients": clients,
        "official_clients": _official(clients),
        "adapters": videos,
        "different_requests": len(asks),
        "quiet": quiet,
        "load": load,
        "first_token_ratio": ratio,
        "odd": dict(odd.odd),
        "clip_8k": odd.clip,
        "problems": odd.problems[:20],
        "problem_count": len(odd.problems),
        "resident_bytes": {
            "window_seconds": window, "first": first, "last": last, "most": max(resident),
            "growth": last / first - 1, "every_second": resident,
        },
    }  # fmt: skip
    record["passed"] = {
        "no_wrong_answer": not quiet["wrong_answers"] and not load["wrong_answers"],
        "none_lost": not quiet["error_count"] and not load["error_count"],
        "odd_clients_right": not odd.problems and odd.clip is not None,
        "first_token_ratio": ratio <= RATIO_LIMIT,
        "memory_flat": record["resident_bytes"]["growth"] <= GROWTH_LIMIT,
        "server_ended_well": alive and ended in (0, -signal.SIGTERM),
    }
    return record


@contextmanager
def _served(
    folder: Path, clients: int, threads: int
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command in a process of its own, ready."""
    command = [sys.executable, "-m", "v2l_fast", "serve", "--store", str(folder / "store")]
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
            while not _answers(port):
                time.sleep(0.1)
            yield server, port
        finally:
            server.kill()
            server.wait()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://{ADDRESS}:{port}/health", timeout=60).is_success
    except httpx.TransportError:
        return False


def _internalize(port: int, path: Path) -> str:
    with httpx.Client(base_url=f"http://{ADDRESS}:{port}", timeout=60) as client:
        with open(path, "rb") as file:
            video = client.post("/v1/videos", files={"file": file}).raise_for_status().json()
        while video["status"] not in ("completed", "failed"):
            time.sleep(0.05)
            video = client.get(f"/v1/videos/{video['id']}").raise_for_status().json()
    if video["status"] == "failed":
        raise RuntimeError(f"{path}: {video['error']['message']}")
    return video["adapter_id"]


def _expected(folder: Path, scenes: list, ids: list[str], seed: int) -> tuple[list[Ask], list[Ask]]:
    """Requests and their right answers; then those with extreme parameters."""
    model = Video2LoRA.from_pretrained("shapes", device="cpu")
    store = AdapterStore(folder)
    try:
        requests = questions(scenes, ids, seed)
        answers = [alone(model, store, one) for one in requests]
        asks = [Ask(_body(one), text) for one, text in zip(requests, answers, strict=True)]
        greedy = next(i for i, one in enumerate(requests) if one.sampling.temperature == 0)
        drawn = replace(requests[greedy], sampling=SamplingParams(40, temperature=0.8, seed=7))
        extreme = _extreme(requests[greedy], answers[greedy], alone(model, store, drawn))
    finally:
        store.close()
    return asks, extreme


def _body(request: GenerationRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.adapters[0] if len(request.adapters) == 1 else "shapes",
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


def _extreme(request: GenerationRequest, greedy: str, drawn: str) -> list[Ask]:
    """Values at the edges of what is allowed, with the answers that follow from their meaning."""
    body = _body(request)
    likeliest = [
        {"temperature": 1e-40}, {"temperature": 1e-300}, {"temperature": 5e-324},
        {"temperature": 2.0, "top_p": 1e-300}, {"temperature": 0.8, "top_p": 5e-324},
        {"temperature": 2.0, "top_k": 1}, {"stop": ["\u2603", "\U0001f600", "~" * 256, "\0"]},
        {"seed": -1}, {"seed": (1 << 63) - 1}, {"top_k": 1 << 31, "top_p": 1.0},
    ]  # fmt: skip
    as_drawn = [{}, {"top_k": 1 << 31}, {"top_p": 1.0}, {"top_k": 0, "stop": []}]
    any_answer = [
        {"temperature": 2.0, "seed": -(1 << 63)}, {"temperature": 1e-3, "seed": (1 << 63) - 1},
        {"temperature": 2.0, "top_p": 1 - 2**-53}, {"max_tokens": 1, "temperature": 2.0},
    ]  # fmt: skip
    drawing = {"temperature": 0.8, "seed": 7}
    return [
        *(Ask(body | change, greedy) for change in likeliest),
        *(Ask(body | drawing | change, drawn) for change in as_drawn),
        *(Ask(body | change, None) for change in any_answer),
    ]


def _official(clients: int) -> int:
    return round(clients * OFFICIAL_SHARE)


def _phase(
    url: tuple[str, int],
    seconds: float,
    clients: int,
    options: dict[str, Any],
    mixed: bool,
    server: subprocess.Popen,
) -> tuple[dict[str, Any], Seen, list[int]]:
    """Clients for so long: what the ordinary ones saw, what the odd ones did, memory by second."""
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
    ordinary = [part for part, (kind, _) in zip(seen, parts, strict=True) if kind]
    return _summary(ordinary), seen[-1] if mixed else Seen(), resident


def _summary(parts: list[Seen]) -> dict[str, Any]:
    whole, seconds = Seen(), max(part.seconds for part in parts)
    for part in parts:
        whole.started += part.started
        whole.answered += part.answered
        whole.tokens += part.tokens
        whole.wrong += part.wrong
        whole.errors += part.errors
        for mine, its in ((whole.first, part.first), (whole.between, part.between)):
            mine.counts = np.add(mine.counts, its.counts)
    return {
        "seconds": seconds,
        "started": whole.started,
        "requests": whole.answered,
        "wrong_answers": whole.wrong,
        "errors": whole.errors[:10],
        "error_count": whole.started - whole.answered,
        "requests_per_second": whole.answered / seconds,
        "tokens_per_second": whole.tokens / seconds,
        "time_to_first_token": whole.first.summary(),
        "between_pieces": whole.between.summary(),
    }


def _line(summary: dict[str, Any]) -> str:
    first = summary["time_to_first_token"]
    return (
        f"{summary['requests']} answers, {summary['wrong_answers']} wrong, "
        f"{summary['error_count']} lost, {summary['requests_per_second']:.1f} a second; "
        f"first token p50 {first['p50'] * 1e3:.0f} ms, p95 {first['p95'] * 1e3:.0f} ms"
    )


def _large_clip(path: Path) -> Path:
    """A few frames of 8K, gray bars that move."""
    import av

    width, height = LARGE_SIZE
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 2
        bars = np.tile((np.arange(width) // 480 * 13 % 256).astype(np.uint8), (height * 3 // 2, 1))
        bars[height:] = 128
        for number in range(LARGE_FRAMES):
            planes = bars.copy()
            planes[:height] = np.roll(bars[:height], 240 * number, axis=1)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

"""The shipped model, clips of scenes it was not trained on, and servers on ports of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.serving.stand_in import StandInEngine
from tests.waiting import LIMIT, wait_until
from v2l_fast.model import Video2LoRA
from v2l_fast.serving import http as connections
from v2l_fast.serving import sandbox
from v2l_fast.serving.api import create_app
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.gate import ApiKeys, MediaSources
from v2l_fast.serving.replicas import Replica
from v2l_fast.serving.sandbox import VideoReader
from v2l_fast.serving.schemas import ServerLimits
from v2l_fast.serving.server import Server
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.store.adapter_store import AdapterStore

ENDED = ("completed", "failed", "cancelled")


def start_forking() -> None:
    """Start the fork server, which servers and tests share, with the imports of both."""
    sandbox.start_forkserver((*sandbox.PRELOAD, "tests.tiny", "tests.serving.test_restart"))


@dataclass
class Running:
    """A listening server, its parts and a client."""

    url: str
    server: Server
    http: httpx.Client
    stop: Callable[[], None]

    @property
    def engine(self):
        return self.server.engine

    def internalize(self, path: Path, **fields: object) -> dict:
        """Upload a file and wait for its adapter."""
        with open(path, "rb") as file:
            answer = self.http.post("/v1/videos", files={"file": file}, data=fields)
        assert answer.status_code in (200, 202), answer.text
        return self.completed(answer.json())

    def completed(self, video: dict) -> dict:
        """Wait until a job has its adapter."""

        def ended() -> bool:
            video.update(self.http.get(f"/v1/videos/{video['id']}").raise_for_status().json())
            return video["status"] in ENDED

        if video["status"] not in ENDED:
            wait_until(ended)
        assert video["status"] == "completed", video
        return video


@pytest.fixture(scope="session")
def shapes() -> Video2LoRA:
    """The shipped model; tests must leave it as it is."""
    return Video2LoRA.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three H.264 files."""
    folder = tmp_path_factory.mktemp("videos")
    scenes = sample_scenes("test", 3, 0)
    return [write_clip(scene, folder / f"clip{i}.mp4") for i, scene in enumerate(scenes)]


def patient(limits: ServerLimits) -> ServerLimits:
    """Raise the time limits that the test has not set."""
    default = ServerLimits()
    times = [f.name for f in dataclasses.fields(limits) if f.name.endswith("_seconds")]
    kept = [name for name in times if getattr(limits, name) == getattr(default, name)]
    return dataclasses.replace(limits, **dict.fromkeys(kept, 2 * LIMIT))


@contextlib.contextmanager
def running(
    model: Video2LoRA,
    folder: Path,
    limits: ServerLimits | None = None,
    keys: tuple[str, ...] = (),
    root: Path | None = None,
    stand_in: dict[str, object] | None = None,
    merged: str | None = None,
    drain_seconds: float = LIMIT,
    media: MediaSources | None = None,
    replicas: Sequence[Replica] = (),
) -> Iterator[Running]:
    """A server in a thread; ``stand_in`` is options of a StandInEngine that replaces the engine."""
    store = AdapterStore(folder)
    start_forking()
    limits = patient(limits or ServerLimits())
    reader = VideoReader(model, limits)
    if stand_in is None:
        engine = Engine(
            model, store, max_batch=8, adapter_slots=4, merged=merged, load_clip=reader.load_clip
        )
    else:
        engine = StandInEngine(model, store, **stand_in)
    server = Server(
        model,
        engine,
        store,
        reader,
        "shapes",
        limits,
        ApiKeys(keys),
        root,
        media=media,
        replicas=replicas,
    )
    bound = connections.bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    app = create_app(server, drain_seconds)
    web = connections.http_server(app, server.limits, drain_seconds)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [bound]})
    thread.start()

    def stop() -> None:
        web.should_exit = True
        thread.join(LIMIT)
        assert not thread.is_alive()

    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        wait_until(lambda: web.started or not thread.is_alive())
        assert web.started
        with httpx.Client(base_url=url, headers=headers, timeout=LIMIT) as http:
            yield Running(url, server, http, stop)
    finally:
        stop()
        bound.close()


@pytest.fixture
def serve(shapes: Video2LoRA, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """``serve(**options)`` starts a server of the shipped model; options as of :func:`running`."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path = tmp_path / "store", **options: object) -> Running:
            return stack.enter_context(running(shapes, folder, **options))

        yield start

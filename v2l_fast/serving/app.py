"""The FastAPI application: routes and middleware around a :class:`Server`, start and end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool

import v2l_fast
from v2l_fast.serving import http_errors, logs, openai_routes, video_routes
from v2l_fast.serving.admission import Admission
from v2l_fast.serving.auth import documented
from v2l_fast.serving.gate import Gate
from v2l_fast.serving.requests import EngineClosed
from v2l_fast.serving.schemas import Health
from v2l_fast.serving.server import Server

PAGE = Path(__file__).parent / "page" / "index.html"
# The page needs nothing from elsewhere, and nothing that gets into it may call elsewhere.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_POLL_SECONDS = 0.1

router = APIRouter(tags=["Server"])


def create_app(server: Server, drain_seconds: float = 30.0) -> FastAPI:
    """The application; it closes the engine and the store when it ends.

    Args:
        drain_seconds: time for answers and jobs to finish when the server is stopped; then videos
            are read no further, and the engine stops after the unit of work it is at.
    """
    drain = Drain(drain_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(_follow(server))
        logs.event("listening", model=server.name, adapters=len(server.adapters()))
        yield
        logs.event("draining")
        drain.begin()
        reason = EngineClosed("the server is shutting down; try again later")
        # The engine may still be at a unit of its work then.
        ending = asyncio.get_running_loop().call_later(drain.left, server.reader.close, reason)
        await run_in_threadpool(server.engine.close, drain=True, timeout=drain.left)
        ending.cancel()
        server.reader.close(reason)
        following.cancel()
        server.jobs.collect()
        server.store.close()
        logs.event("stopped")

    # Swagger UI's files come from the package, not from elsewhere.
    app = FastAPIOffline(
        redoc_url=None,
        swagger_ui_parameters={"validatorUrl": None},
        title="v2l_fast",
        version=v2l_fast.__version__,
        description="Videos become LoRA adapters; questions are answered without visual tokens.",
        lifespan=lifespan,
    )
    app.state.server = server
    app.state.drain = drain
    app.state.started = int(time.time())
    app.state.admission = Admission(server.jobs, server.limits)
    http_errors.install(app)
    for part in (router, openai_routes.router, video_routes.router):
        app.include_router(part, responses=http_errors.responses(403, 421))
    app.add_middleware(Gate, hosts=server.hosts, keys=server.keys, limits=server.limits)
    app.add_middleware(logs.RequestLog)
    _document(app)
    return app


class Drain:
    """The time for what is under way when the server is stopped: connections, then the engine."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end: float | None = None

    def begin(self) -> None:
        """The server stops; only the first call counts."""
        if self._end is None:
            self._end = time.monotonic() + self._seconds

    @property
    def left(self) -> float:
        """Seconds, 0 at least; all of them before :meth:`begin`."""
        if self._end is None:
            return self._seconds
        return max(0.0, self._end - time.monotonic())


async def _follow(server: Server) -> None:
    """Account for finished jobs, and say when the engine is ready."""
    ready = False
    while True:
        if server.engine.ready and not ready:
            ready = True
            logs.event("ready")
        await asyncio.sleep(_POLL_SECONDS)
        await run_in_threadpool(server.jobs.collect)


def _document(app: FastAPI) -> None:
    """FastAPI announces its own 422 for every route; ours answer 400 in OpenAI's shape."""
    generate = app.openapi

    def openapi() -> dict:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        return document

    app.openapi = openapi


@router.get("/", response_class=HTMLResponse)
def page() -> HTMLResponse:
    """The page for people."""
    return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": PAGE_POLICY})


@router.get("/health", responses={503: {"model": Health, "description": "Not ready yet"}})
def health(request: Request, response: Response) -> Health:
    """Whether the server is ready; no key needed. What is asked before is answered then."""
    server: Server = request.app.state.server
    ready = server.engine.ready
    if not ready:
        response.status_code = 503
    return Health(
        status="ok" if ready else "starting",
        model=server.name,
        version=v2l_fast.__version__,
        key_required=server.keys.required,
    )


@router.get(
    "/metrics",
    response_class=Response,
    dependencies=[Depends(documented)],
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"}}
    | http_errors.responses(401),
)
def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    server: Server = request.app.state.server
    return Response(server.metrics.render(), media_type=METRICS_TYPE)

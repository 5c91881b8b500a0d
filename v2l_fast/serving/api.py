"""The FastAPI application: start and end, the page, metrics, and the routes for videos."""

from __future__ import annotations

import asyncio
import time
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

import v2l_fast
from v2l_fast.serving import chat
from v2l_fast.serving.gate import FORM_TYPE, Gate, api_key_scheme, content_type
from v2l_fast.serving.http import (
    ApiError,
    error_responses,
    from_validation,
    install_error_handlers,
    parse_json_body,
)
from v2l_fast.serving.jobs import Admission, Job, ReceiveSlots
from v2l_fast.serving.media import MediaInbox
from v2l_fast.serving.monitoring import RequestLog, log_event
from v2l_fast.serving.request import EngineClosed
from v2l_fast.serving.schemas import (
    Deleted,
    Health,
    InternalizeOptions,
    ListQuery,
    PathRequest,
    PeftQuery,
    VideoBody,
    VideoList,
)
from v2l_fast.serving.server import Server
from v2l_fast.serving.videos import WRITE_BYTES, HashedFile, ReceivedVideo, allowed_path
from v2l_fast.store.adapter_store import StoreError
from v2l_fast.store.folder import StoredAdapter

PAGE = Path(__file__).parent / "page" / "index.html"
# The page loads nothing from elsewhere, and nothing injected into it may call elsewhere.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_POLL_SECONDS = 0.1
# Chat requests of the largest size that are read at the same time.
_LARGE_BODIES = 4
_MAX_FIELD_BYTES = 1024

server_router = APIRouter(tags=["Server"])
video_router = APIRouter(
    prefix="/v1/videos", tags=["Videos"], dependencies=[Depends(api_key_scheme)]
)


# --- the application ------------------------------------------------------------------------------


def create_app(server: Server, drain_seconds: float = 30.0) -> FastAPI:
    """The application; it closes the engine and the store when it shuts down.

    Args:
        drain_seconds: time for answers and jobs to finish when the server is stopped; after that,
            videos are read no further and the engine stops after the unit of work it is running.
    """
    drain = Drain(drain_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(_follow(server))
        log_event("listening", model=server.name, adapters=len(server.adapters()))
        yield
        log_event("draining")
        drain.begin()
        reason = EngineClosed("the server is shutting down; try again later")
        # The engine may still be running a unit of work then.
        timer = asyncio.get_running_loop().call_later(drain.left, server.reader.close, reason)
        await run_in_threadpool(server.engine.close, drain=True, timeout=drain.left)
        timer.cancel()
        server.reader.close(reason)
        following.cancel()
        server.jobs.collect()
        server.store.close()
        log_event("stopped")

    # Swagger UI's files come from the package, not from the network.
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
    app.state.media = MediaInbox(server, app.state.admission, server.media_sources)
    # Bodies with videos are held in memory, in several copies while they are parsed.
    app.state.large_bodies = ReceiveSlots(
        server.limits.uploads, _LARGE_BODIES * server.limits.chat_bytes,
        server.limits.uploads_waiting,
    )  # fmt: skip
    install_error_handlers(app)
    for router in (server_router, chat.router, video_router):
        app.include_router(router, responses=error_responses(403, 421))
    app.add_middleware(Gate, hosts=server.hosts, keys=server.keys, limits=server.limits)
    app.add_middleware(RequestLog)
    _remove_unused_422(app)
    return app


class Drain:
    """The time for what is under way when the server is stopped: connections, then the engine."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end: float | None = None

    def begin(self) -> None:
        """The server is stopping; only the first call counts."""
        if self._end is None:
            self._end = time.monotonic() + self._seconds

    @property
    def left(self) -> float:
        """Remaining seconds, at least 0; the whole time before :meth:`begin`."""
        if self._end is None:
            return self._seconds
        return max(0.0, self._end - time.monotonic())


async def _follow(server: Server) -> None:
    """Collect finished jobs, and log when the engine is ready."""
    ready = False
    while True:
        if server.engine.ready and not ready:
            ready = True
            log_event("ready")
        await asyncio.sleep(_POLL_SECONDS)
        await run_in_threadpool(server.jobs.collect)


def _remove_unused_422(app: FastAPI) -> None:
    """FastAPI declares its own 422 for every route; ours respond 400 in OpenAI's shape."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        return document

    app.openapi = openapi


@server_router.get("/", response_class=HTMLResponse)
def page() -> HTMLResponse:
    """The page for people."""
    return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": PAGE_POLICY})


@server_router.get("/health", responses={503: {"model": Health, "description": "Not ready yet"}})
def health(request: Request, response: Response) -> Health:
    """Whether the server is ready; needs no key. Earlier questions wait until it is."""
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


@server_router.get(
    "/metrics",
    response_class=Response,
    dependencies=[Depends(api_key_scheme)],
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"}}
    | error_responses(401),
)
def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    server: Server = request.app.state.server
    return Response(server.metrics.render(), media_type=METRICS_TYPE)


# --- receiving a video ----------------------------------------------------------------------------

_FORM_SCHEMA = {
    "type": "object",
    "required": ["file"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "The video."},
        **InternalizeOptions.model_json_schema()["properties"],
    },
}
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM_SCHEMA},
            "application/json": {"schema": PathRequest.model_json_schema()},
        },
    }
}
_UPLOAD_RESPONSES = {
    200: {"model": VideoBody, "description": "The store already has this video's adapter"},
    202: {"model": VideoBody, "description": "A job internalizes the video; ask for it by its id"},
}


@video_router.post(
    "",
    response_model=VideoBody,
    responses=_UPLOAD_RESPONSES | error_responses(400, 401, 408, 413, 415, 503),
    openapi_extra=_UPLOAD_BODY,
)
async def create(request: Request, response: Response) -> VideoBody:
    """Internalize a video: uploaded, or named by a path under the folder the operator allowed.

    The same bytes with the same options are never internalized twice.
    """
    server: Server = request.app.state.server
    # The gate lets only these two content types through.
    if content_type(request.headers) == FORM_TYPE:
        job = await _upload(request, server)
    else:
        job = await _link(request, server)
    if isinstance(job, Job):
        response.status_code = 202
        return server.describe_job(job)
    body = await run_in_threadpool(server.describe_adapter, job)
    return body.model_copy(update={"cached": True})


async def _upload(request: Request, server: Server) -> Job | StoredAdapter:
    admission: Admission = request.app.state.admission
    path, limit = server.store.staging.new_path(), server.limits.upload_bytes
    try:
        size = int(request.headers.get("content-length", limit))
        async with admission.receiving(size):
            received, options = await _receive_form(request, path, limit)
        return await admission.start(received, options)
    finally:
        server.store.staging.remove(path)


async def _link(request: Request, server: Server) -> Job | StoredAdapter:
    admission: Admission = request.app.state.admission
    try:
        options = PathRequest.model_validate(parse_json_body(await request.body()))
    except ValidationError as error:
        raise from_validation(error.errors(include_context=False)) from None
    path = await run_in_threadpool(allowed_path, options.path, server.root)
    size, limit = path.stat().st_size, server.limits.upload_bytes
    if size > limit:
        raise _video_too_large(limit)
    async with admission.receiving(size):
        received = await run_in_threadpool(ReceivedVideo.linked_to, path)
    return await admission.start(received, options)


async def _receive_form(
    request: Request, path: Path, limit: int
) -> tuple[ReceivedVideo, InternalizeOptions]:
    """Write the file of a form to ``path``; return the video and the options sent with it.

    Raises:
        ApiError: 400 for a malformed form, 413 for a file larger than ``limit`` bytes.
        StoreError: the disk is full.
    """
    try:
        file = HashedFile(path)
        try:
            form = VideoForm(request, file)
            parts = (await form.parse()).multi_items()
        finally:
            file.close()
    except MultiPartException as error:
        raise ApiError(400, f"the form is malformed: {error.message}", "invalid_form") from None
    except OSError as error:
        raise StoreError(f"{path.parent}: the upload was not written ({error.strerror})") from None
    if not form.complete:
        raise ApiError(400, "the form ends before its last boundary", "invalid_form")
    uploads = {name: part for name, part in parts if isinstance(part, UploadFile)}
    if uploads.keys() != {"file"}:
        message = "the form needs one part with a file name, named 'file'"
        raise ApiError(400, message, "invalid_form", "file")
    if path.stat().st_size > limit:
        raise _video_too_large(limit)
    try:
        fields = {name: part for name, part in parts if not isinstance(part, UploadFile)}
        options = InternalizeOptions.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error.errors(include_context=False)) from None
    name = uploads["file"].filename or ""
    return ReceivedVideo(file.sha256, path, name), options


class VideoForm(MultiPartParser):
    """Starlette's form parser, with the one file written to ``file``.

    Starlette's own writes files to the system's temporary folder. The size of the body is bounded
    by the gate.

    Attributes:
        complete: whether the form's last boundary arrived.
    """

    def __init__(self, request: Request, file: HashedFile) -> None:
        super().__init__(
            request.headers,
            _blocks(request),
            max_files=1,
            max_fields=len(InternalizeOptions.model_fields),
            max_part_size=_MAX_FIELD_BYTES,
        )
        self.complete = False
        self._file = file

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if self._current_part.file is not None:
            self._current_part.file.file = self._file

    def on_end(self) -> None:
        self.complete = True


async def _blocks(request: Request) -> AsyncGenerator[bytes, None]:
    """The body in pieces of about a megabyte."""
    pending = bytearray()
    async for piece in request.stream():
        pending += piece
        if len(pending) >= WRITE_BYTES:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)


def _video_too_large(limit: int) -> ApiError:
    return ApiError(413, f"the video is larger than {limit} bytes", "too_large")


# --- videos ---------------------------------------------------------------------------------------


@video_router.get("", responses=error_responses(400, 401, 503))
def list_videos(request: Request, query: Annotated[ListQuery, Query()]) -> VideoList:
    """Jobs that have not ended or failed, then adapters, the newest of each first."""
    server: Server = request.app.state.server
    entries: list[Job | StoredAdapter] = [*server.jobs.unfinished(), *server.adapters()]
    return VideoList(
        data=[
            server.describe_job(entry) if isinstance(entry, Job) else server.describe_adapter(entry)
            for entry in entries[query.offset : query.offset + query.limit]
        ]
    )


@video_router.get("/{video_id}", responses=error_responses(401, 404, 503))
def video(video_id: str, request: Request) -> VideoBody:
    """A job with its progress, or an adapter."""
    server: Server = request.app.state.server
    return server.describe(video_id)


@video_router.delete("/{video_id}", responses=error_responses(401, 404, 409, 503))
def delete(video_id: str, request: Request) -> Deleted:
    """Cancel a job that has not ended, or remove an adapter, and the video if it has no other.

    Equal uploads with equal options share a job: each request withdraws one upload, and the last
    one cancels the job. A cancelled job has the status `cancelled` and is not listed.
    """
    server: Server = request.app.state.server
    return server.delete(video_id)


@video_router.get(
    "/{video_id}/adapter",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "A safetensors file"}
    }
    | error_responses(401, 404, 409, 503),
)
def adapter(video_id: str, request: Request) -> FileResponse:
    """The adapter's file, as ``v2l ask`` reads it."""
    server: Server = request.app.state.server
    adapter_id = server.resolve(video_id)
    handle = server.store.open(adapter_id)
    # The open file is sent, even if another file takes its name in the meantime.
    return FileResponse(
        f"/dev/fd/{handle.fileno()}",
        media_type="application/octet-stream",
        filename=server.store.file(adapter_id).name,
        background=BackgroundTask(handle.close),
    )


@video_router.get(
    "/{video_id}/peft",
    response_class=Response,
    responses={200: {"content": {"application/zip": {}}, "description": "A PEFT directory, zipped"}}
    | error_responses(400, 401, 404, 409, 503),
)
def peft(video_id: str, request: Request, query: Annotated[PeftQuery, Query()]) -> FileResponse:
    """The adapter as PEFT, vLLM and SGLang read it."""
    from v2l_fast.interop.peft import TEXT_LAYERS, VLM_LAYERS, save_peft

    server: Server = request.app.state.server
    adapter_id = server.resolve(video_id)
    attached = server.model.attach(server.store.get(adapter_id))
    folder, archive = server.store.staging.new_path(), server.store.staging.new_path(".zip")
    try:
        layers = TEXT_LAYERS if query.text_only else VLM_LAYERS
        save_peft(attached, folder, query.base or server.peft_base, layers=layers)
        with zipfile.ZipFile(archive, "w") as zipped:
            for file in sorted(folder.iterdir()):
                zipped.write(file, f"{adapter_id}/{file.name}")
    finally:
        server.store.staging.remove(folder)
    return FileResponse(
        archive,
        media_type="application/zip",
        filename=f"{adapter_id}.zip",
        background=BackgroundTask(server.store.staging.remove, archive),
    )

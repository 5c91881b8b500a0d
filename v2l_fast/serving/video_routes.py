"""Videos: internalize, follow, list, download, delete."""

from __future__ import annotations

import zipfile
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from v2l_fast.serving import json_body, upload
from v2l_fast.serving.admission import Admission
from v2l_fast.serving.auth import documented
from v2l_fast.serving.gate import FORM, content_type
from v2l_fast.serving.http_errors import ApiError, from_validation, responses
from v2l_fast.serving.jobs import Job
from v2l_fast.serving.schemas import (
    Deleted,
    InternalizeOptions,
    ListQuery,
    PathRequest,
    PeftQuery,
    VideoBody,
    VideoList,
)
from v2l_fast.serving.server import Server
from v2l_fast.serving.videos import allowed_path
from v2l_fast.store.index import StoredAdapter

router = APIRouter(prefix="/v1/videos", tags=["Videos"], dependencies=[Depends(documented)])

_FORM = {
    "type": "object",
    "required": ["file"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "The video."},
        **InternalizeOptions.model_json_schema()["properties"],
    },
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "application/json": {"schema": PathRequest.model_json_schema()},
        },
    }
}
_ACCEPTED = {
    200: {"model": VideoBody, "description": "The store has this video's adapter already"},
    202: {"model": VideoBody, "description": "A job internalizes it; ask for it by its id"},
}


@router.post(
    "",
    response_model=VideoBody,
    responses=_ACCEPTED | responses(400, 401, 408, 413, 415, 503),
    openapi_extra=_BODY,
)
async def create(request: Request, response: Response) -> VideoBody:
    """Internalize a video: uploaded, or by a path under the folder the operator allowed.

    The same bytes with the same options are never internalized twice.
    """
    server: Server = request.app.state.server
    # The gate lets these two kinds through.
    if content_type(request.headers) == FORM:
        job = await _uploaded(request, server)
    else:
        job = await _linked(request, server)
    if isinstance(job, Job):
        response.status_code = 202
        return server.describe_job(job)
    known = await run_in_threadpool(server.describe_adapter, job)
    return known.model_copy(update={"cached": True})


async def _uploaded(request: Request, server: Server) -> Job | StoredAdapter:
    admission: Admission = request.app.state.admission
    part, limit = server.store.staging.new_path(), server.limits.upload_bytes
    try:
        announced = request.headers.get("content-length")
        async with admission.receiving(limit if announced is None else int(announced)):
            name, options = await upload.receive(request, part, limit)
            video = await run_in_threadpool(server.videos.uploaded, part, name)
        return await admission.start(video, options)
    finally:
        server.store.staging.remove(part)


async def _linked(request: Request, server: Server) -> Job | StoredAdapter:
    admission: Admission = request.app.state.admission
    try:
        options = PathRequest.model_validate(json_body.parse(await request.body()))
    except ValidationError as error:
        raise from_validation(error.errors(include_context=False)) from None
    path = await run_in_threadpool(allowed_path, options.path, server.root)
    size, limit = path.stat().st_size, server.limits.upload_bytes
    if size > limit:
        raise ApiError(413, f"the video is larger than {limit} bytes", "too_large")
    async with admission.receiving(size):
        video = await run_in_threadpool(server.videos.linked, path)
    return await admission.start(video, options)


@router.get("", responses=responses(400, 401, 503))
def videos(request: Request, page: Annotated[ListQuery, Query()]) -> VideoList:
    """Unfinished and failed jobs, then adapters, each the newest first."""
    server: Server = request.app.state.server
    found: list[Any] = [*server.jobs.unfinished(), *server.adapters()]
    return VideoList(
        data=[
            server.describe_job(item) if isinstance(item, Job) else server.describe_adapter(item)
            for item in found[page.offset : page.offset + page.limit]
        ]
    )


@router.get("/{video_id}", responses=responses(401, 404, 503))
def video(video_id: str, request: Request) -> VideoBody:
    """A job with its progress, or an adapter."""
    server: Server = request.app.state.server
    return server.describe(video_id)


@router.delete("/{video_id}", responses=responses(401, 404, 409, 503))
def delete(video_id: str, request: Request) -> Deleted:
    """Cancel a job that is not finished, or remove an adapter, and the video when nothing else was
    made from it.

    Equal uploads with equal options share a job: each request takes back one upload, and the job is
    cancelled with the last. A cancelled job has the status `cancelled` and is not listed.
    """
    server: Server = request.app.state.server
    return Deleted(id=server.delete(video_id))


@router.get(
    "/{video_id}/adapter",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "A safetensors file"}
    }
    | responses(401, 404, 409, 503),
)
def adapter(video_id: str, request: Request) -> FileResponse:
    """The adapter's file, as ``v2l ask`` reads it."""
    server: Server = request.app.state.server
    adapter_id = server.resolve(video_id)
    handle = server.store.open(adapter_id)
    # The open file is sent, whatever takes its name meanwhile.
    return FileResponse(
        f"/dev/fd/{handle.fileno()}",
        media_type="application/octet-stream",
        filename=server.store.file(adapter_id).name,
        background=BackgroundTask(handle.close),
    )


@router.get(
    "/{video_id}/peft",
    response_class=Response,
    responses={200: {"content": {"application/zip": {}}, "description": "A PEFT directory, zipped"}}
    | responses(400, 401, 404, 409, 503),
)
def peft(video_id: str, request: Request, wanted: Annotated[PeftQuery, Query()]) -> FileResponse:
    """The adapter as PEFT, vLLM and SGLang read it."""
    from v2l_fast.interop.peft import TEXT_LAYERS, VLM_LAYERS, save_peft

    server: Server = request.app.state.server
    adapter_id = server.resolve(video_id)
    attached = server.model.attach(server.store.get(adapter_id))
    folder, archive = server.store.staging.new_path(), server.store.staging.new_path(".zip")
    try:
        layers = TEXT_LAYERS if wanted.text_only else VLM_LAYERS
        save_peft(attached, folder, wanted.base or server.peft_base, layers=layers)
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

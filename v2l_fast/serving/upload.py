"""Receiving a form with a video in it: bounded, straight to the staging folder.

Starlette's own form parser spools a file to the system's temporary folder before a route sees it;
this one writes it where it will stay and gives up at the first thing that is wrong.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import Request
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from v2l_fast.serving.http_errors import ApiError, from_validation
from v2l_fast.serving.schemas import InternalizeOptions
from v2l_fast.store.adapter_store import StoreError

_MAX_FIELD = 1024
_MAX_HEADERS = 8192
_MAX_PARTS = 16
# Writing goes to a thread; a hop for each network packet would cost more than the copy.
_WRITE_BYTES = 1 << 20


class Form:
    """A multipart/form-data body as it arrives: one file and a few short fields.

    Attributes:
        file_name: as the client gave it, None until the file's part began.
        fields: name -> text.
    """

    def __init__(self, boundary: bytes, part: Path, limit: int) -> None:
        self.file_name: str | None = None
        self.fields: dict[str, str] = {}
        self._limit = limit
        self._written = 0
        self._parts = 0
        self._file = open(part, "xb")
        self._header = bytearray()
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._field: str | None = None
        self._text = bytearray()
        self.complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def write(self, data: bytes) -> None:
        """Parse a piece of the body; what it holds of the file is on its way to the disk."""
        self._parser.write(data)

    def close(self) -> None:
        self._file.close()

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise ApiError(400, f"the form has more than {_MAX_PARTS} parts", "invalid_form")
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_headers()

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_headers()

    def _check_headers(self) -> None:
        if len(self._header) + len(self._value) > _MAX_HEADERS:
            raise ApiError(400, "a part of the form has too long headers", "invalid_form")

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._text.clear()
        if b"filename" in options:
            if name != "file":
                raise ApiError(400, "the form's file must be named 'file'", "invalid_form")
            if self.file_name is not None:
                raise ApiError(400, "the form has more than one file", "invalid_form", "file")
            self._field = None
            self.file_name = options[b"filename"].decode("utf-8", "replace")
        elif name not in InternalizeOptions.model_fields:
            names = ", ".join(InternalizeOptions.model_fields)
            raise ApiError(400, f"the form's fields are file, {names}", "invalid_form")
        else:
            self._field = name

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._written += end - start
            if self._written > self._limit:
                raise ApiError(413, f"the video is larger than {self._limit} bytes", "too_large")
            self._file.write(memoryview(data)[start:end])
        else:
            self._text += data[start:end]
            if len(self._text) > _MAX_FIELD:
                raise ApiError(400, f"{self._field} is too long", "invalid_form", self._field)

    def _on_part_end(self) -> None:
        if self._field is not None:
            self.fields[self._field] = self._text.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self.complete = True


async def receive(request: Request, part: Path, limit: int) -> tuple[str, InternalizeOptions]:
    """Read a form; its file is at ``part`` afterwards, whole.

    Returns:
        The file's name as given, and the options beside it.

    Raises:
        ApiError: 400 for a malformed form, 413 for a file of more than ``limit`` bytes.
        StoreError: the disk is full.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 256:
        raise ApiError(400, "the form's content type names no boundary", "invalid_form")
    try:
        form = Form(boundary, part, limit)
        try:
            async for block in _blocks(request):
                await run_in_threadpool(form.write, block)
        finally:
            form.close()
    except FormParserError:
        raise ApiError(400, "the form is malformed", "invalid_form") from None
    except OSError as error:
        raise StoreError(f"{part.parent}: the upload was not written ({error.strerror})") from None
    if not form.complete:
        raise ApiError(400, "the form ends before its last boundary", "invalid_form")
    if form.file_name is None:
        raise ApiError(400, "the form has no part 'file' with a file name", "invalid_form", "file")
    try:
        return form.file_name, InternalizeOptions(**form.fields)
    except ValidationError as error:
        raise from_validation(error.errors(include_context=False)) from None


async def _blocks(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces of about a megabyte."""
    pending = bytearray()
    async for piece in request.stream():
        pending += piece
        if len(pending) >= _WRITE_BYTES:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)

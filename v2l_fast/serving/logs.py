"""JSON log lines and the middleware that writes one a request.

Questions, answers, file names and keys never go into a line; ids and counts do.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("v2l_fast.serving")

FIELDS = "fields"


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what is passed as ``extra={"fields": {..}}`` becomes its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str = "info") -> None:
    """Send the process's log to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # A line for each request is written below, with what it cost.
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("python_multipart").setLevel(logging.WARNING)


def event(name: str, **fields: object) -> None:
    """Log an event with fields."""
    log.info(name, extra={FIELDS: fields})


class Occasional:
    """An event that may come thousands of times a second, logged once in an interval.

    Args:
        name: of the event; its field ``count`` says how often it came since the last line.
    """

    def __init__(self, name: str, seconds: float = 10.0) -> None:
        self._name, self._seconds = name, seconds
        self._count = 0
        self._next = 0.0

    def event(self) -> None:
        """Count it, and log it when it is time."""
        self._count += 1
        now = time.monotonic()
        if now >= self._next:
            log.warning(self._name, extra={FIELDS: {"count": self._count}})
            self._count, self._next = 0, now + self._seconds


class RequestLog:
    """ASGI middleware: a request id in every answer, one log line when it is complete."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = uuid.uuid4().hex
        status = 0

        async def labeled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self.app(scope, receive, labeled)
        finally:
            # The route's pattern: a path may hold anything.
            route = getattr(scope.get("route"), "path", None)
            event(
                "request",
                request_id=request_id,
                method=scope["method"] if route else None,
                route=route,
                status=status,
                seconds=round(time.perf_counter() - start, 6),
            )

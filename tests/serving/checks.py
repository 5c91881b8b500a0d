"""Small pieces that the server's tests share."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx

from tests.serving.conftest import Running
from tests.waiting import LIMIT, wait_until

QUESTION = {"model": "shapes", "messages": [{"role": "user", "content": "What happens?"}]}


def refused(answer: httpx.Response, status: int, code: str | None = None) -> dict:
    """Check the status and the shape of an error; its body."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code
    return error


def raw(live: Running) -> socket.socket:
    url = httpx.URL(live.url)
    return socket.create_connection((url.host, url.port), timeout=LIMIT)


def nothing_left(live: Running) -> None:
    """No half-written file, no adapter, no video."""
    wait_until(lambda: not list(live.server.store.staging.folder.iterdir()))
    assert live.server.store.list() == []
    wait_until(lambda: not list(live.server.videos.folder.iterdir()))
    assert not live.server.videos._in_use


def children(process: int) -> set[int]:
    """Processes that one started, and those that they did."""
    parents = processes()
    found, last = {process}, set()
    while found != last:
        last = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {process}


def processes() -> dict[int, int]:
    """Those of this machine and their parents."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            # One that has ended stays listed until its parent looks.
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    return parents

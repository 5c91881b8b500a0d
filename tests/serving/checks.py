"""Helpers that the server's tests share."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx

from tests.serving.conftest import Running
from tests.waiting import LIMIT, wait_until

QUESTION = {"model": "shapes", "messages": [{"role": "user", "content": "What happens?"}]}


def refused(answer: httpx.Response, status: int, code: str | None = None) -> dict:
    """Check an error's status, code and shape; return its body."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code
    return error


def raw(live: Running) -> socket.socket:
    """A plain connection to the server."""
    url = httpx.URL(live.url)
    return socket.create_connection((url.host, url.port), timeout=LIMIT)


def begin_upload(client: socket.socket, data: bytes) -> None:
    """Send the beginning of an upload whose rest never comes."""
    client.sendall(
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: "
        b'form-data; name="file"; filename="a.mp4"\r\n\r\n' + data
    )


def nothing_left(live: Running) -> None:
    """Wait until no staged file, adapter or video is left."""
    wait_until(lambda: not list(live.server.store.staging.folder.iterdir()))
    assert live.server.store.list() == []
    wait_until(lambda: not list(live.server.videos.folder.iterdir()))
    assert not live.server.videos._in_use


def children(process: int) -> set[int]:
    """The descendants of a process."""
    parents = processes()
    family, last = {process}, set()
    while family != last:
        last = set(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return family - {process}


def processes() -> dict[int, int]:
    """Running process -> its parent, for the whole machine."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            # A process that has ended stays listed until its parent waits for it.
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    return parents

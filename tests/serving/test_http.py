"""Connections: no delays, slow or silent clients, and more of them than file descriptors."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
from asyncio import constants
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import pytest

from tests.serving.checks import QUESTION, raw
from tests.serving.conftest import running
from tests.waiting import LIMIT, wait_until
from v2l_fast.errors import ConfigError
from v2l_fast.serving import http
from v2l_fast.serving.monitoring import configure_logging
from v2l_fast.serving.schemas import ServerLimits

PROCESSES = multiprocessing.get_context("forkserver")
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


ADDRESSES = ["127.0.0.1", "localhost", *(["::1"] if has_ipv6() else [])]


@pytest.mark.parametrize("protocol", ["named", "not named"])
@pytest.mark.parametrize("host", ADDRESSES)
def test_connections_set_tcp_nodelay(serve, monkeypatch, host, protocol):
    """Otherwise each piece of a stream would wait for the acknowledgement of the one before."""
    if protocol == "not named":
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = (host, 0)
        monkeypatch.setattr(http, "bind", lambda *_: socket.create_server(address, family=family))
    else:
        bind = http.bind
        monkeypatch.setattr(http, "bind", lambda *_: bind(host, 0))
    options = []
    made = http._Connection.connection_made

    def recorded(self, transport):
        made(self, transport)
        accepted = transport.get_extra_info("socket")
        options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(http._Connection, "connection_made", recorded)
    live = serve(stand_in={})
    port = httpx.URL(live.url).port
    with closing(socket.create_connection((host, port), timeout=LIMIT)) as client:
        client.sendall(GET)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    assert options and all(options)


@pytest.mark.parametrize("begun", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: local", GET])
def test_a_silent_connection_is_closed(serve, begun):
    """Without a request, within its head, and after a response."""
    live = serve(limits=ServerLimits(head_seconds=0.2, keep_alive_seconds=0.2), stand_in={})
    with closing(raw(live)) as client:
        client.settimeout(LIMIT)
        client.sendall(begun)
        received = b""
        while data := client.recv(1 << 16):
            received += data
    assert received.startswith(b"HTTP/1.1 200 ") == (begun == GET)


def test_a_head_that_never_ends_is_closed(serve):
    """Sending bytes does not extend the time limit."""
    live = serve(limits=ServerLimits(head_seconds=0.3), stand_in={})
    with closing(raw(live)) as client:
        client.settimeout(0.05)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")

        def closed() -> bool:
            try:
                client.sendall(b"X: y\r\n")
                return client.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        wait_until(closed)


def test_a_client_that_stops_reading_is_disconnected(serve):
    words = ["x" * 100_000 + " "] * 10_000
    live = serve(limits=ServerLimits(stalled_seconds=0.3), stand_in={"words": words, "pause": 0.01})
    with live.http.stream("POST", "/v1/chat/completions", json={**QUESTION, "stream": True}) as s:
        next(s.iter_raw())
        wait_until(lambda: live.engine.ended == ["cancelled"])
    assert live.http.get("/health").is_success


def test_no_connection_beyond_the_limit(serve):
    live = serve(limits=ServerLimits(connections=3, head_seconds=LIMIT), stand_in={})
    with ExitStack() as stack:
        idle = [stack.enter_context(closing(raw(live))) for _ in range(3)]
        answer = httpx.get(live.url + "/health", timeout=LIMIT)
        assert answer.status_code == 503 and answer.headers["connection"] == "close"
        assert answer.json()["error"]["code"] == "queue_full" and answer.headers["retry-after"]
        idle[0].sendall(GET)
        assert idle[0].recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: httpx.get(live.url + "/health", timeout=LIMIT).is_success)


# --- file descriptors ---------------------------------------------------------------------------


def few_files(
    control: Connection, folder: Path, spare: int, limited: bool, retry_seconds: float = 1.0
) -> None:
    """A server in a process that may open ``spare`` more files than it has open, and that tries
    again to accept a connection after ``retry_seconds``."""
    import torch

    from v2l_fast.model import Video2LoRA

    torch.set_num_threads(1)
    constants.ACCEPT_RETRY_DELAY = retry_seconds
    errors = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(errors, 2)
    configure_logging("info")
    model = Video2LoRA.from_pretrained("shapes", device="cpu")
    most = len(os.listdir("/proc/self/fd")) + spare
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    connections = http.connection_limit(10_000) if limited else 10_000
    limits = ServerLimits(connections=connections, head_seconds=1.5)
    with running(model, folder / "store", limits, stand_in={"words": ["a"]}) as live:
        control.send((live.url, connections))
        control.recv()


@contextmanager
def server_of_few_files(folder: Path, *arguments) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Its URL, its limit on connections, and how to stop it; it must end without an error."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=few_files, args=(theirs, folder, *arguments))
    process.start()

    def stop() -> None:
        ours.send(None)
        process.join(LIMIT)
        assert process.exitcode == 0

    try:
        yield (*ours.recv(), stop)
    finally:
        process.kill()
        process.join()


def connect_silently(stack: ExitStack, url: str, count: int) -> None:
    address = httpx.URL(url).host, httpx.URL(url).port
    for _ in range(count):
        stack.enter_context(closing(socket.create_connection(address, timeout=LIMIT)))


@pytest.mark.parametrize(
    ("spare", "limited"), [(240, True), pytest.param(60, False, marks=pytest.mark.slow)]
)
def test_more_connections_than_files(tmp_path, spare, limited):
    """Silent connections are refused or wait, and time out; the log stays small."""
    with server_of_few_files(tmp_path, spare, limited) as (url, most, stop):
        assert not limited or 16 <= most < spare

        def answers() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(url + "/health", timeout=LIMIT).is_success
            return False

        with ExitStack() as stack:
            connect_silently(stack, url, 300)
            wait_until(answers)
        wait_until(answers)
        stop()
    assert (tmp_path / "log").stat().st_size < 50_000


def test_stopping_while_no_file_is_left(tmp_path):
    """asyncio resumes accepting on the closed socket; the log reports no error."""
    log = tmp_path / "log"
    with ExitStack() as stack, server_of_few_files(tmp_path, 60, False, 0.02) as (url, _, stop):
        connect_silently(stack, url, 100)
        wait_until(lambda: "no file descriptor is left" in log.read_text())
        stop()
    assert "Exception" not in log.read_text()


def test_too_few_files_for_connections(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    with pytest.raises(ConfigError, match="may open 100 files.*ulimit -n"):
        http.connection_limit(4096)

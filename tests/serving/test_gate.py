"""Requests refused by their head: other hosts and origins, missing keys, bodies of a wrong kind."""

from __future__ import annotations

from contextlib import closing

import pytest
from starlette.datastructures import Headers

from tests.serving.checks import QUESTION, nothing_left, raw, refused
from tests.serving.conftest import Running, running
from v2l_fast.errors import ConfigError
from v2l_fast.serving.gate import AllowedHosts
from v2l_fast.serving.schemas import ServerLimits

FORM = "multipart/form-data; boundary=b"
HUGE = 900_000_000


def verdict(hosts: AllowedHosts, method: str = "POST", **headers: str) -> int:
    error = hosts.refusal(method, Headers(headers))
    return 0 if error is None else error.status


# --- hosts and origins --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 0), ("localhost:8000", 0), ("LOCALHOST.:1", 0), ("app.localhost", 0),
        ("127.0.0.1:8000", 0), ("127.9.9.9", 0), ("[::1]:8000", 0), ("[::ffff:127.0.0.1]", 0),
        ("allowed.example", 0), ("Allowed.Example:443", 0), ("10.0.0.7:80", 0),
        ("evil.example", 421), ("evil.example:8000", 421), ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421), ("evillocalhost", 421), ("192.168.0.2", 421),
        ("0.0.0.0:8000", 421), ("", 421), ("a b", 421), ("localhost@evil.example", 421),
        ("evil.example@localhost", 421), ("localhost:99999999", 421), ("[::1", 421),
        ("2130706433", 421), ("127.0.0.1/", 421), ("localhost\\evil.example", 421),
    ],
)  # fmt: skip
def test_a_host(host, expected):
    hosts = AllowedHosts(["allowed.example", "10.0.0.7"])
    for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS"):
        assert verdict(hosts, method, host=host) == expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:3000", 0), ("http://127.0.0.1", 0), ("http://[::1]:9", 0),
        ("https://allowed.example", 0), ("https://allowed.example:8443", 0),
        ("http://evil.example", 403), ("https://localhost.evil.example", 403), ("null", 403),
        ("", 403), ("file://", 403), ("evil.example", 403), ("http://10.1.2.3", 403),
        ("http://localhost@evil.example", 403), ("chrome-extension://abcdef", 403),
    ],
)  # fmt: skip
def test_an_origin(origin, expected):
    hosts = AllowedHosts(["allowed.example"])
    assert verdict(hosts, host="localhost:8000", origin=origin) == expected
    reading = 0 if origin == "null" else expected
    assert verdict(hosts, "GET", host="localhost:8000", origin=origin) == reading


def test_listening_on_all_addresses():
    """Names can be rebound, addresses cannot; a page is allowed from the same address only."""
    for bound in ("0.0.0.0", "::"):
        hosts = AllowedHosts(bound=bound)
        for host in ("192.168.0.2:8000", "[2001:db8::1]:8000", "localhost"):
            assert verdict(hosts, host=host) == 0
            assert verdict(hosts, host=host, origin=f"http://{host}") == 0
            assert verdict(hosts, host=host, origin="http://192.168.0.3:8000") == 403
        assert verdict(hosts, host="evil.example", origin="http://evil.example") == 421


@pytest.mark.parametrize("bound", ["192.168.0.2", "2001:db8::1", "machine.lan"])
def test_the_bound_address(bound):
    host = f"[{bound}]" if ":" in bound else bound
    hosts = AllowedHosts(bound=bound)
    assert verdict(hosts, host=f"{host}:8000", origin=f"http://{host}:8000") == 0
    assert verdict(hosts, host="192.168.0.9") == 421


@pytest.mark.parametrize("name", ["", "http://x", "x:80", "*", "a b", "x/y", "[::1]:80"])
def test_an_invalid_allowed_host(name):
    with pytest.raises(ConfigError, match="--allowed-host"):
        AllowedHosts([name])


def test_no_origin_and_no_host():
    """Programs send no Origin, and HTTP/1.0 no Host."""
    assert verdict(AllowedHosts()) == verdict(AllowedHosts(), host="localhost") == 0


@pytest.fixture(scope="module")
def guarded(shapes, tmp_path_factory):
    """A server with a key and small limits."""
    limits = ServerLimits(upload_bytes=1 << 20, body_bytes=1 << 16, media_bytes=0)
    folder = tmp_path_factory.mktemp("store")
    with running(shapes, folder, limits, keys=("key",), stand_in={"words": ["yes"]}) as live:
        yield live


def test_another_sites_page(guarded, videos):
    data = videos[0].read_bytes()
    for header, status in (("Origin", 403), ("Host", 421)):
        value = "http://evil.example" if header == "Origin" else "evil.example"
        headers = {header: value}
        answer = guarded.http.post("/v1/videos", files={"file": data}, headers=headers)
        message = refused(answer, status)["message"]
        assert header in message and "evil.example" in message and "--allowed-host" in message
        for path in ("/", "/health", "/docs", "/openapi.json", "/metrics", "/v1/models"):
            refused(guarded.http.get(path, headers=headers), status)
        body = guarded.http.post("/v1/chat/completions", json=QUESTION, headers=headers)
        refused(body, status)
    nothing_left(guarded)
    own = {"Origin": guarded.url}
    assert guarded.http.post("/v1/chat/completions", json=QUESTION, headers=own).is_success


# --- before the body ----------------------------------------------------------------------------

REFUSED = {
    "no key": (401, "/v1/videos", {"Content-Type": FORM, "Authorization": ""}),
    "wrong key": (401, "/v1/videos", {"Content-Type": FORM, "Authorization": "Bearer k"}),
    "no key for a question": (401, "/v1/chat/completions", {"Authorization": ""}),
    "no key, no such path": (401, "/v1/nothing", {"Authorization": ""}),
    "too large": (413, "/v1/videos", {"Content-Type": FORM}),
    "a question too large": (413, "/v1/chat/completions", {"Content-Type": "application/json"}),
    "another kind": (415, "/v1/videos", {"Content-Type": "video/mp4"}),
    "a question of another kind": (415, "/v1/chat/completions", {"Content-Type": FORM}),
    "another host": (421, "/v1/videos", {"Content-Type": FORM, "Host": "evil.example"}),
    "another origin": (403, "/v1/videos", {"Content-Type": FORM, "Origin": "http://evil.example"}),
    "too large for any path": (413, "/nothing", {}),
}


def head(path: str, headers: dict[str, str], length: str = f"Content-Length: {HUGE}") -> bytes:
    whole = {"Host": "localhost", "Authorization": "Bearer key"} | headers
    lines = [f"{name}: {value}" for name, value in whole.items() if value]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, length, "\r\n"]).encode()


def answer(client) -> bytes:
    """Everything received until the server closes the connection."""
    received = b""
    while data := client.recv(1 << 16):
        received += data
    return received


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_needs_no_body(guarded, kind):
    status, path, headers = REFUSED[kind]
    with closing(raw(guarded)) as client:
        client.sendall(head(path, headers))
        received = answer(client)
    assert received.startswith(b"HTTP/1.1 %d " % status) and b"connection: close" in received
    with closing(raw(guarded)) as client:
        client.sendall(head(path, headers))
        sent = send_on(client)
    assert sent < HUGE / 5
    nothing_left(guarded)


def send_on(client) -> int:
    """Send zeros until the server closes the connection; the number sent."""
    sent, block = 0, bytes(1 << 20)
    while sent < HUGE:
        try:
            client.sendall(block)
        except OSError:
            break
        sent += len(block)
    return sent


def test_a_body_without_length_is_read_to_the_limit(guarded):
    begin = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    headers = {"Content-Type": FORM}
    with closing(raw(guarded)) as client:
        client.sendall(head("/v1/videos", headers, "Transfer-Encoding: chunked"))
        client.sendall(b"%x\r\n%s\r\n" % (len(begin), begin) + b"%x\r\n" % HUGE)
        assert send_on(client) < HUGE / 5
    nothing_left(guarded)


def test_a_client_that_sends_first_and_reads_later_gets_the_response(guarded: Running):
    """Closing a socket with unread bytes would reset the connection."""
    for _ in range(5):
        with closing(raw(guarded)) as client:
            client.sendall(head("/v1/videos", {"Authorization": ""}, "Content-Length: 500000"))
            client.sendall(bytes(500_000))
            assert answer(client).startswith(b"HTTP/1.1 401 ")


def test_a_connection_stays_open_after_a_refusal_with_its_body(guarded):
    body = {**QUESTION, "model": "nobody"}
    sent = [guarded.http.post("/v1/chat/completions", json=body) for _ in range(2)]
    for one in sent:
        refused(one, 404)
        assert "connection" not in one.headers


# --- methods and kinds --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/docs", "/metrics", "/v1/models", "/v1/videos"])
def test_head_is_get_without_the_body(guarded, path):
    got, answer = guarded.http.get(path), guarded.http.head(path)
    assert answer.status_code == got.status_code == 200 and not answer.content
    assert answer.headers["content-type"] == got.headers["content-type"]
    refused(guarded.http.post(path.replace("/v1/videos", "/health"), json={}), 405)
    assert guarded.http.head("/v1/chat/completions").status_code == 405


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain", "x"])
def test_a_question_without_its_content_type(guarded, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = guarded.http.post("/v1/chat/completions", content=b"{}", headers=headers)
    message = refused(answer, 415)["message"]
    sent = "none" if kind is None else repr(kind)
    assert message == f"Content-Type must be application/json, got {sent}"

"""Generated requests against the server's own OpenAPI document: no 5xx except 503 when it is full.

schemathesis checks that every response has a declared status, content type and body, that wrong
data is refused, and that keys and methods are enforced.
"""

from __future__ import annotations

import json
import socket
import urllib.parse

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serving.conftest import running
from tests.waiting import LIMIT
from v2l_fast.serving.schemas import ChatRequest, PathRequest, ServerLimits

KEY = {"Authorization": "Bearer key"}


@pytest.fixture(scope="module")
def document(shapes, videos, tmp_path_factory):
    """The document of a server with an adapter, a root and a key."""
    limits = ServerLimits(upload_bytes=1 << 20, body_bytes=1 << 16, media_bytes=0)
    with running(
        shapes,
        tmp_path_factory.mktemp("store"),
        limits,
        keys=("key",),
        root=videos[0].parent,
        stand_in={"words": ["yes"]},
    ) as live:
        live.internalize(videos[0])
        yield schemathesis.openapi.from_url(live.url + "/openapi.json")


# Only the key can be wrong in these.
PLAIN = ("GET /", "GET /health", "GET /metrics", "GET /v1/models")
OPERATIONS = (
    "GET /v1/models/{model}",
    "POST /v1/chat/completions",
    "GET /v1/videos",
    "POST /v1/videos",
    "GET /v1/videos/{video_id}",
    "DELETE /v1/videos/{video_id}",
    "GET /v1/videos/{video_id}/peft",
    "GET /v1/videos/{video_id}/adapter",
)
# A conversation, or a file that is not a video, is well-formed and still refused.
NOT_CHECKED = [positive_data_acceptance]
PROFILE = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def operations(document) -> dict:
    return {result.ok().label: result.ok() for result in document.get_all_operations()}


def test_every_operation_is_covered(document):
    assert set(operations(document)) == {*PLAIN, *OPERATIONS}


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        *((label, GenerationMode.POSITIVE) for label in (*PLAIN, *OPERATIONS)),
        *((label, GenerationMode.NEGATIVE) for label in OPERATIONS),
    ],
)
def test_generated_requests(document, label, mode):
    operation = operations(document)[label]

    @PROFILE
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(headers=KEY, excluded_checks=NOT_CHECKED, timeout=LIMIT)

    check()


# Everything a JSON string can hold, halves of surrogate pairs included.
TEXT = st.text(st.characters(codec=None), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = (*ChatRequest.model_fields, *PathRequest.model_fields, "user", "x")


@st.composite
def spoiled(draw) -> dict:
    """A valid body except for a few values, or for what its texts contain."""
    text = draw(TEXT | st.just("What happens?"))
    body = {"model": "shapes", "messages": [{"role": "user", "content": text}], "path": "a.mp4"}
    return body | draw(st.dictionaries(st.sampled_from(FIELDS) | TEXT, JSON, max_size=3))


def no_5xx(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/videos"])
def test_generated_json(document, path):
    with httpx.Client(base_url=document.location.removesuffix("/openapi.json")) as client:

        @settings(PROFILE, max_examples=150)
        @given(body=spoiled() | JSON)
        def check(body):
            headers = KEY | {"Content-Type": "application/json"}
            no_5xx(client.post(path, content=json.dumps(body), headers=headers))

        check()


def test_generated_forms(document):
    fields = st.dictionaries(
        st.sampled_from(["max_frames", "longest_edge", "exact_frames", "path", "file"]) | TEXT,
        TEXT | st.sampled_from(["1", "true", "null"]),
        max_size=3,
    )

    with httpx.Client(base_url=document.location.removesuffix("/openapi.json")) as client:

        @PROFILE
        @given(fields=fields, name=TEXT, content=st.binary(max_size=30))
        def check(fields, name, content):
            parts = [(field, None, value.encode("utf-8", "surrogatepass")) for field, value in
                     fields.items()]  # fmt: skip
            body = b""
            for field, file, data in [*parts, ("file", name, content)]:
                label = f'form-data; name="{field}"'
                label += "" if file is None else f'; filename="{file}"'
                head = b"--b\r\nContent-Disposition: " + label.encode("utf-8", "surrogatepass")
                body += head + b"\r\n\r\n" + data + b"\r\n"
            headers = KEY | {"Content-Type": "multipart/form-data; boundary=b"}
            no_5xx(client.post("/v1/videos", content=body + b"--b--\r\n", headers=headers))

        check()


@PROFILE
@given(tail=st.binary(max_size=20), query=st.binary(max_size=20))
def test_generated_addresses(document, tail, query):
    target = "/v1/videos" + urllib.parse.quote(tail) + "?" + urllib.parse.quote(query, safe="=&")
    base = document.location.removesuffix("/openapi.json")
    for method in ("GET", "DELETE", "HEAD"):
        answer = httpx.request(method, base + target, headers=KEY, follow_redirects=True)
        assert answer.status_code < 500, answer.text


NAME = st.one_of(
    st.sampled_from(["Authorization", "Content-Type", "Content-Length", "Transfer-Encoding", "Host",
                     "Range", "Accept", "Connection", "Expect", "Cookie", "X-Request-ID"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20),
)  # fmt: skip
VALUE = st.one_of(
    st.binary(max_size=40).map(lambda value: value.replace(b"\n", b"")),
    st.sampled_from([b"Bearer key", b"application/json", b"multipart/form-data; boundary=",
                     b"-1", b"99999999999999999999", b"chunked", b"bytes=9-1,5-", b"100-continue"]),
)  # fmt: skip


def test_generated_headers(document):
    url = urllib.parse.urlsplit(document.location)

    @PROFILE
    @given(
        line=st.sampled_from(
            ["GET /health", "GET /v1/videos", "POST /v1/videos", "POST /v1/chat/completions"]
        ),
        headers=st.lists(st.tuples(NAME, VALUE), max_size=6),
        body=st.binary(max_size=50),
    )
    def check(line, headers, body):
        lines = [f"{line} HTTP/1.1".encode(), b"Connection: close"]
        lines += [name.encode() + b": " + value for name, value in headers]
        with socket.create_connection((url.hostname, url.port), timeout=LIMIT) as client:
            client.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(1 << 16)
        # Something other than HTTP, or a body shorter than announced, may get no response.
        assert not answer.startswith(b"HTTP/1.1 5"), answer

    check()

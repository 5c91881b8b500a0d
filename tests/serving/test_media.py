"""Videos and images in messages, as vLLM's clients send them, and what URLs must not reach."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serving.conftest import running
from tests.waiting import wait_until
from v2l_fast.errors import ConfigError
from v2l_fast.serving import media
from v2l_fast.serving.gate import MediaSources
from v2l_fast.serving.media import MediaDownloader, MediaError
from v2l_fast.serving.schemas import ServerLimits

QUESTION = "What happens in the video?"
LIMITS = ServerLimits(media_bytes=1 << 20, body_bytes=1 << 14)
LOCAL = MediaSources(["*"], ["127.0.0.0/8"])


_CHUNKS = b"200000\r\n" + b"x" * (2 << 20)


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (96, 64)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


class Files(BaseHTTPRequestHandler):
    """Serves ``files``, (status, headers, content) by path; counts requests and whole downloads."""

    protocol_version = "HTTP/1.1"
    files: dict[str, tuple[int, dict[str, str], bytes]]
    log: list[tuple[str, int]]

    def do_GET(self) -> None:
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            return
        status, headers, content = self.files[self.path]
        tag = headers.get("ETag")
        if tag is not None and self.headers.get("If-None-Match") == tag:
            status, content = 304, b""
        self.log.append((self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Transfer-Encoding" not in headers and "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.close_connection = "Content-Length" in headers
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def handle(self) -> None:
        # A client may leave at any time.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def files(videos: list[Path]) -> Iterator[tuple[str, type[Files]]]:
    class Handler(Files):
        files = {
            "/clip.mp4": (200, {"ETag": '"1"'}, videos[1].read_bytes()),
            "/plain.mp4": (200, {}, videos[1].read_bytes()),
            "/to-clip": (302, {"Location": "/clip.mp4"}, b""),
            "/to-meta": (302, {"Location": "http://169.254.169.254/latest"}, b""),
            "/to-file": (302, {"Location": "file:///etc/passwd"}, b""),
            "/loop": (302, {"Location": "/loop"}, b""),
            "/huge": (200, {"Content-Length": str(1 << 40)}, b"x"),
            "/huge-chunked": (200, {"Transfer-Encoding": "chunked"}, _CHUNKS),
            "/gzip": (200, {"Content-Encoding": "gzip"}, b"x"),
            "/missing": (404, {}, b"no"),
            "/page": (200, {"Content-Type": "text/html"}, b"<html></html>"),
        }  # fmt: skip
        log: list[tuple[str, int]] = []

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", Handler
        server.shutdown()


@pytest.fixture(scope="module")
def live(shapes, tmp_path_factory):
    with running(shapes, tmp_path_factory.mktemp("store"), LIMITS, media=LOCAL) as server:
        yield server


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="-", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, *parts: dict, model: str = "shapes", **options):
    content = [*parts, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, **options)


def video(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url}}


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def refusal(client: openai.OpenAI, *parts: dict, **options) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, *parts, **options)
    assert refused.value.type == "invalid_request_error"
    return refused.value


def internalized(live) -> int:
    return live.engine.stats().jobs_done


def test_a_video_in_a_message(client, live, shapes, videos):
    (expected,) = shapes.answer(QUESTION, shapes.internalize(videos[0]))
    part, before = video(data_url(videos[0].read_bytes())), internalized(live)
    whole = ask(client, part)
    assert whole.choices[0].message.content == expected.text
    # The second question costs no visual token: nothing is internalized again.
    *chunks, last = ask(client, part, stream=True, stream_options={"include_usage": True})
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
    assert internalized(live) == before + 1
    for usage in (whole.usage, last.usage):
        assert usage.prompt_tokens == expected.prompt_tokens
        assert usage.prompt_tokens_details.visual_tokens == 0
    assert last.choices == [] and all("usage" in c.model_fields_set for c in chunks)
    assert all(c.usage is None for c in chunks)
    context = ask(client, part, extra_body={"video_mode": "context"})
    assert context.usage.prompt_tokens_details.visual_tokens > 0
    short = {"type": "video_url", "video_url": part["video_url"]["url"]}
    assert ask(client, short).choices[0].message.content == expected.text


def test_frames_and_options_of_vllm(client, live, shapes, videos):
    frames = [picture(i, "JPEG") for i in range(3)]
    joined = ",".join(base64.b64encode(frame).decode() for frame in frames)
    part, before = video(f"data:video/jpeg;base64,{joined}"), internalized(live)
    first, second = ask(client, part), ask(client, part)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert internalized(live) == before + 1
    assert live.server.adapters()[0].frames == 3
    ask(client, part, extra_body={"media_io_kwargs": {"video": {"num_frames": 2}}})
    assert live.server.adapters()[0].frames == 2
    error = refusal(client, part, extra_body={"media_io_kwargs": {"video": {"fps": 2}}})
    assert error.param == "media_io_kwargs.video.fps"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_an_image_is_a_video_of_one_frame(client, live, kind):
    part = image(data_url(picture(len(kind) + ord(kind[0]), kind), f"image/{kind.lower()}"))
    before = internalized(live)
    assert ask(client, part).usage.prompt_tokens_details.visual_tokens == 0
    assert ask(client, part).choices[0].message.content is not None
    assert internalized(live) == before + 1 and live.server.adapters()[0].frames == 1


def test_several_parts_are_composed(client, live, shapes, videos):
    urls = [data_url(path.read_bytes()) for path in videos[:2]]
    ids = [live.internalize(path)["adapter_id"] for path in videos[:2]]
    expected = ask(client, extra_body={"video_ids": ids}).choices[0].message.content
    assert ask(client, *map(video, urls)).choices[0].message.content == expected
    mixed = ask(client, video(urls[1]), extra_body={"video_ids": ids[:1]})
    assert mixed.choices[0].message.content == expected


def test_base_and_adapter_in_one_name(client, live, videos):
    adapter_id = live.internalize(videos[0])["adapter_id"]
    answers = [ask(client, model=model) for model in (adapter_id, f"shapes:{adapter_id}")]
    texts = {answer.choices[0].message.content for answer in answers}
    assert len(texts) == 1 and answers[1].model == f"shapes:{adapter_id}"
    assert client.models.retrieve(f"shapes:{adapter_id}").id == adapter_id
    for unknown in (f"other:{adapter_id}", "shapes:" + "0" * 32):
        with pytest.raises(openai.NotFoundError):
            ask(client, model=unknown)
    error = refusal(client, video("data:,"), model=adapter_id)
    assert error.param == "model" and "only text parts, so model must be shapes" in error.message


def test_a_url(client, live, files, shapes, videos):
    url, handler = files
    (expected,) = shapes.answer(QUESTION, shapes.internalize(videos[1]))
    before = internalized(live)
    for path in ("/clip.mp4", "/clip.mp4", "/to-clip", "/plain.mp4", "/plain.mp4"):
        assert ask(client, video(url + path)).choices[0].message.content == expected.text
    # One content, whatever its URL; what has not changed is not even downloaded.
    assert internalized(live) <= before + 1
    assert handler.log[:2] == [("/clip.mp4", 200), ("/clip.mp4", 304)]
    handler.files["/clip.mp4"] = (200, {"ETag": '"2"'}, videos[2].read_bytes())
    (changed,) = shapes.answer(QUESTION, shapes.internalize(videos[2]))
    assert ask(client, video(url + "/clip.mp4")).choices[0].message.content == changed.text
    # A deleted adapter is made again.
    names = {r.id: live.server.describe_adapter(r).name for r in live.server.adapters()}
    deleted = next(one for one, name in names.items() if name == "clip.mp4")
    live.server.delete(deleted)
    assert ask(client, video(url + "/clip.mp4")).choices[0].message.content == changed.text


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://{host}:1/x", "cannot be downloaded"),
        ("/to-meta", "may not reach"),
        ("/to-file", "must begin with"),
        ("/loop", "redirects more than"),
        ("/huge", "larger than"),
        ("/huge-chunked", "larger than"),
        ("/gzip", "compresses"),
        ("/missing", "status 404"),
        ("/page", "web page"),
        ("ftp://example.com/x", "must begin with"),
        ("file:///etc/passwd", "must begin with"),
        ("/etc/passwd?", "must begin with"),
        ("http://user:pw@127.0.0.1/x", "user name"),
        ("http://[::1", "malformed"),
        ("http://a\tb/", "malformed"),
        ("http://127.0.0.1:99999/", "malformed"),
        ("http://nobody.invalid/x", "no address"),
        ("data:video/mp4;base64,####", "not valid base64"),
        ("data:video/mp4;base64,QUJD=QUI", "not valid base64"),
        ("data:video/mp4;base64,\u00e9", "not valid base64"),
        ("data:video/mp4,plain", "form data:"),
        ("data:text/html;base64,PGI+", "neither a video nor an image"),
        ("data:;base64,PGI+", "neither a video nor an image"),
        ("data:video/mp4;base64,", "empty"),
        ("data:video/mp4;base64,PGh0bWw+", "web page"),
        ("data:image/png;base64,iVBORw0KGgo=", "cannot be read"),
        ("data:video/jpeg;base64,/9j/,/9j/", "cannot be read"),
        ("data:video/mp4;base64," + "A" * 1_404_000, "larger than"),
        ("", "must begin with"),
    ],
)
def test_a_url_is_refused(client, live, files, url, reason):
    if url.startswith("/") and url != "/etc/passwd?":
        url = files[0] + url
    error = refusal(client, video(url.format(host="127.0.0.1")))
    assert reason in error.message and str(live.server.store.folder) not in error.message
    assert (error.code, error.param) == ("invalid_video_url", "messages.0.content.0.video_url.url")
    wait_until(lambda: not list(live.server.store.staging.folder.iterdir()))


def test_other_parts(client):
    error = refusal(client, {"type": "input_audio", "input_audio": {}})
    assert error.param == "messages.0.content" and "video_url" in error.message
    assert "string" in refusal(client, {"type": "video_url", "video_url": {}}).message


def test_bombs(client, live):
    """A small file of enormous frames, and images of different sizes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(30_000 * 3751 // 100))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    )
    error = refusal(client, image(data_url(content, "image/png")))
    assert "cannot be read" in error.message or "more than" in error.message
    frames = [picture(0, "JPEG"), picture(1, "JPEG", (64, 64))]
    joined = ",".join(base64.b64encode(frame).decode() for frame in frames)
    assert "differ in size" in refusal(client, video(f"data:video/jpeg;base64,{joined}")).message
    many = {"extra_body": {"padding": [0] * 50_000}}
    for part, options in (
        (video(data_url(b"\0" * (3 << 20))), {}),
        ({"type": "text", "text": "x" * 20_000}, {}),
        ({"type": "text", "text": "x"}, many),
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            ask(client, part, **options)
        assert refused.value.status_code == 413


def test_without_the_option_only_data_urls(serve, shapes, videos):
    live = serve()
    with openai.OpenAI(base_url=live.url + "/v1", api_key="-", max_retries=0) as client:
        assert "downloads no URLs" in refusal(client, video("http://example.com/x.mp4")).message


ADDRESSES = [
    "127.0.0.1", "127.1", "2130706433", "0177.0.0.1", "0x7f.1", "0x7f000001", "[::1]", "[::]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]", "0.0.0.0", "0", "169.254.169.254", "2852039166", "[fe80::1]", "[fd00::1]",
    "[fec0::1]", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "224.0.0.1",
    "255.255.255.255",
    "[ff02::1]", "localhost", "LOCALHOST.", "198.18.0.1", "192.0.2.1", "240.0.0.1",
]  # fmt: skip


def fetch(url: str, sources: MediaSources, limits: ServerLimits = LIMITS) -> bytes:
    received = bytearray()

    async def write(piece: bytes) -> None:
        received.extend(piece)

    async def download() -> None:
        await MediaDownloader(sources, limits).download(url, write)

    asyncio.run(download())
    return bytes(received)


@pytest.mark.parametrize("host", ADDRESSES)
def test_private_addresses(host, monkeypatch):
    connected = []
    monkeypatch.setattr(media.httpcore.AnyIOBackend, "connect_tcp", connected.append)
    with pytest.raises(MediaError, match="may not reach|no address"):
        fetch(f"http://{host}/x", MediaSources(["*"]))
    assert not connected


def test_a_name_is_resolved_once(files, monkeypatch):
    """The name's second address would be private; the connection goes to the one checked."""
    port = int(files[0].rpartition(":")[2])
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["8.8.8.8", "10.0.0.1"]])
    lookups = []

    async def resolve(self, host, port, **options):
        lookups.append(host)
        return [(socket.AF_INET, 1, 6, "", (one, port)) for one in next(answers)]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    sources = MediaSources(["videos.example"], ["127.0.0.1/32"])
    assert fetch(f"http://videos.example:{port}/plain.mp4", sources)
    assert lookups == ["videos.example"]
    for _ in range(2):
        with pytest.raises(MediaError, match="may not reach"):
            fetch(f"http://videos.example:{port}/plain.mp4", sources)


def test_only_the_allowed_hosts(files):
    sources = MediaSources(["Videos.example.", "127.0.0.1"], ["127.0.0.0/8"])
    assert fetch(files[0] + "/plain.mp4", sources)
    for host in ("example", "videos.example.org", "evil-videos.example", "127.0.0.2", "localhost"):
        with pytest.raises(MediaError, match="not one that this server"):
            fetch(f"http://{host}/x", sources)


def test_a_slow_body(files):
    limits = ServerLimits(media_seconds=0.3)
    start = time.monotonic()
    with pytest.raises(MediaError, match="takes more than 0.3 s"):
        fetch(files[0] + "/slow", LOCAL, limits)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("hosts", "networks"), [(["http://x"], []), (["a b"], []), ([], ["10.0.0.1/8"]), ([], ["x"])]
)
def test_malformed_options(hosts, networks):
    with pytest.raises(ConfigError, match="--media"):
        MediaSources(hosts, networks)


def test_a_client_that_leaves_cancels_its_job(serve, videos):
    hold = threading.Event()
    live = serve(stand_in={"hold": hold}, media=LOCAL)
    content = [video(data_url(videos[0].read_bytes())), {"type": "text", "text": QUESTION}]
    body = {"model": "shapes", "messages": [{"role": "user", "content": content}]}
    jobs, address = live.server.jobs, httpx.URL(live.url)
    with contextlib.closing(HTTPConnection(address.host, address.port)) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        wait_until(lambda: len(jobs._by_id) == 1)
    wait_until(lambda: not jobs.unfinished())
    assert next(iter(jobs._by_id.values())).work.state == "cancelled"
    hold.set()

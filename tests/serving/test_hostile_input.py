"""Wrong or malicious input: files, forms, JSON, names, paths and ids."""

from __future__ import annotations

import json
import os
from contextlib import closing

import pytest

from tests.serving.checks import QUESTION, nothing_left, raw, refused
from tests.serving.conftest import running
from tests.store.test_store_damage import BAD_FILES
from tests.waiting import wait_until
from v2l_fast.serving.schemas import ChatRequest

# --- files that are not videos -------------------------------------------------------------------

PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
NOT_VIDEOS = {
    "empty": b"",
    "one byte": b"\0",
    "text": b"hello " * 100,
    "html": b"<html><script>alert(1)</script></html>",
    "noise": bytes(range(256)) * 64,
    "playlist": PLAYLIST,
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "elf": b"\x7fELF" + b"\0" * 512,
    "mp4 header only": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\0" * 64,
    "huge box": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom\xff\xff\xff\xffmoov" + b"\0" * 64,
    "wav": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x44\xac\0\0\x88\x58\x01\0\x02\0\x10\0"
    b"data\0\0\0\0",
}


@pytest.fixture(scope="module")
def patient(shapes, tmp_path_factory):
    """One server for all requests that leave nothing behind."""
    root, store = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("store")
    with running(shapes, store, root=root, stand_in={"words": ["yes"]}) as live:
        yield live
        nothing_left(live)


@pytest.mark.parametrize("kind", NOT_VIDEOS)
def test_not_a_video(patient, kind):
    answer = patient.http.post("/v1/videos", files={"file": ("a.mp4", NOT_VIDEOS[kind])})
    message = refused(answer, 400, "invalid_video")["message"]
    assert str(patient.server.store.folder) not in message


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_truncated_video(patient, videos, share):
    data = videos[0].read_bytes()
    answer = patient.http.post("/v1/videos", files={"file": data[: int(len(data) * share)]})
    refused(answer, 400, "invalid_video")


def test_a_video_that_fails_later(serve, videos, monkeypatch):
    """A fault that probing does not see fails the job; the file can be sent again."""
    live = serve()
    monkeypatch.setattr(live.server.reader, "probe", lambda path: None)
    job = live.http.post("/v1/videos", files={"file": ("a.mp4", b"hello")}).json()
    wait_until(lambda: live.http.get(f"/v1/videos/{job['id']}").json()["status"] == "failed")
    failed = live.http.get(f"/v1/videos/{job['id']}").json()
    assert failed["error"]["code"] == "invalid_video" and failed["adapter_id"] is None
    assert str(live.server.store.folder) not in failed["error"]["message"]
    refused(live.http.post("/v1/chat/completions", json={**QUESTION, "model": job["id"]}), 409)
    refused(live.http.delete(f"/v1/videos/{job['id']}"), 409, "video_failed")
    wait_until(lambda: not live.server.videos._in_use)
    again = live.http.post("/v1/videos", files={"file": ("a.mp4", b"hello")}).json()
    assert again["id"] != job["id"]


def part(name: str, text: str = "x", file: str | None = None) -> bytes:
    label = f'; filename="{file}"' if file is not None else ""
    return (
        f'--b\r\nContent-Disposition: form-data; name="{name}"{label}\r\n\r\n{text}\r\n'
    ).encode()


FILE = part("file", file="a.mp4")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b--\r\n",
        b"not a form",
        b"--other\r\n",
        FILE,
        FILE[:40],
        FILE + FILE + b"--b--\r\n",
        part("other", file="a.mp4") + b"--b--\r\n",
        part("max_frames", "3") + b"--b--\r\n",
        FILE + part("max_frames", "many") + b"--b--\r\n",
        FILE + part("max_frames", "0") + b"--b--\r\n",
        FILE + part("max_frames", "9" * 5000) + b"--b--\r\n",
        FILE + part("exact_frames", "\xff") + b"--b--\r\n",
        FILE + part("path", "/etc/passwd") + b"--b--\r\n",
        FILE + part("max_frames", "3") * 50 + b"--b--\r\n",
        b"--b\r\nX: " + b"y" * 20000 + b"\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\n\r\nx\r\n--b--\r\n",
    ],
)
def test_a_malformed_form(patient, body):
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    refused(patient.http.post("/v1/videos", content=body, headers=headers), 400)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        (f"multipart/form-data; boundary={'b' * 300}", 400),
        ("multipart/mixed; boundary=b", 415),
        ("text/plain", 415),
        ("", 415),
    ],
)
def test_another_kind_of_body(patient, kind, status):
    headers = {"Content-Type": kind}
    refused(patient.http.post("/v1/videos", content=FILE, headers=headers), status)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b'{"path": 1}', b'{"path": ""}',
        b'{"path": "\\ud800"}', b'{"path": "a", "max_frames": 1e999}', b"[" * 100_000,
        b'{"path": "a", "other": 1}', b'{"path": "a", "max_frames": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_malformed_json(patient, body):
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/videos", "/v1/chat/completions"):
        refused(patient.http.post(path, content=body, headers=headers), 400)


HALF = "x \ud83d"


def user_says(content: object) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (user_says(HALF), "messages.0.content"),
        (user_says([{"type": "text", "text": HALF}]), "messages.0.content.0.text"),
        ({"messages": [{"role": "system", "content": HALF}, *QUESTION["messages"]]},
         "messages.0.content"),
        ({"messages": [{**QUESTION["messages"][0], "name": HALF}]}, "messages.0.name"),
        ({"model": HALF}, "model"), ({"stop": HALF}, "stop"), ({"stop": ["a", HALF]}, "stop.1"),
        ({"user": HALF}, "user"), ({"metadata": {"a": [HALF]}}, "metadata.a.0"),
        ({HALF: 1}, "x \\ud83d"), ({"video_ids": [HALF]}, "video_ids.0"),
        ({"video_mode": HALF}, "video_mode"), ({"path": HALF}, "path"),
        (user_says("\udc00\ud800 the wrong way round"), "messages.0.content"),
    ],
)  # fmt: skip
def test_half_a_character_is_named(patient, changed, named, stream):
    body = json.dumps({**QUESTION, "stream": stream, **changed})
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/videos"):
        answer = patient.http.post(path, content=body, headers=headers)
        error = refused(answer, 400, "invalid_text")
        assert error["param"] == named and error["message"].startswith(f"{named}: ")


def test_whole_characters_are_text(patient):
    body = json.dumps({**QUESTION, **user_says("\U0001f600 \uffff \0")})
    assert "\\ud83d\\ude00" in body
    headers = {"Content-Type": "application/json"}
    assert patient.http.post("/v1/chat/completions", content=body, headers=headers).is_success


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": }', "not JSON: Expecting value at line 1, column 11"),
        (b'{"model":\n "a",}', "at line 2, column"),
        (b"{'a': 1}", "Expecting property name enclosed in double quotes at line 1, column 2"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'"\xff"', "byte 1 is not UTF-8 text"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
    ],
)
def test_json_errors_say_where(patient, body, message):
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/videos", "/v1/chat/completions"):
        answer = patient.http.post(path, content=body, headers=headers)
        assert message in refused(answer, 400)["message"]


TEXT_PART = {"type": "text", "text": "x"}
IMAGE_PART = {"type": "input_audio", "input_audio": {}}


@pytest.mark.parametrize(
    ("changed", "named", "message"),
    [
        (user_says([TEXT_PART, IMAGE_PART]), "messages.0.content", "part 1 must have the type"),
        (user_says([{"type": "video_url"}]), "messages.0.content", "string as its video_url.url"),
        (user_says([{"type": "text"}]), "messages.0.content", "must have a string as its text"),
        (user_says(["x"]), "messages.0.content", "part 0 must have the type text"),
        (user_says(5), "messages.0.content", "must be text or a list of parts"),
        (user_says(None), "messages", "the question is empty"),
        (user_says([]), "messages", "the question is empty"),
        ({"messages": [*user_says("a")["messages"], {"role": "assistant", "content": None,
                                                "tool_calls": []}, *user_says("b")["messages"]]},
         "messages", "one user message"),
        ({"messages": "x"}, "messages", "list"), ({"messages": None}, "messages", "list"),
        ({"stop": list("abcde")}, "stop", "at most 4 strings, got 5"),
        ({"stop": 5}, "stop", "string or a list of strings"), ({"stop": ["a", 5]}, "stop", "list"),
        ({"stop": [""]}, "stop", "1 to 256"), ({"stop": "x" * 257}, "stop", "1 to 256"),
        ({"seed": 1 << 63}, "seed", "less than"), ({"seed": 10**4000}, "seed", "less than"),
        ({"seed": -(1 << 63) - 1}, "seed", "greater than"),
        ({"functions": [{"name": "f"}]}, "functions", "at most 0"),
        ({"function_call": {"name": "f"}}, "function_call", "none"),
        ({"tool_choice": "required"}, "tool_choice", "none"),
        ({"modalities": ["text", "audio"]}, "modalities.1", "text"),
        ({"audio": {"voice": "a"}}, "audio", "None"),
        ({"top_logprobs": 5}, "top_logprobs", "needs logprobs"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "1"),
        ({"video_ids": ["nobody"]}, "video_ids", "no such video"),
        ({"model": "nobody"}, "model", "no such video or model"),
    ],
)  # fmt: skip
def test_errors_name_the_field(patient, changed, named, message):
    answer = patient.http.post("/v1/chat/completions", json={**QUESTION, **changed})
    error = refused(answer, 404 if "nobody" in str(changed) else 400)
    assert error["param"] == named and message in error["message"], error
    assert "constrained" not in error["message"] and ".str" not in error["message"]


OPTIONAL = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_is_unset(patient, name):
    answer = patient.http.post("/v1/chat/completions", json={**QUESTION, name: None})
    assert answer.json()["choices"][0]["message"]["content"] == "yes"


def test_null_is_unset_everywhere(patient, videos):
    options = {"include_usage": None}
    body = {**QUESTION, **dict.fromkeys(OPTIONAL), "stream": True, "stream_options": options}
    answer = patient.http.post("/v1/chat/completions", json=body)
    assert answer.is_success and "usage" not in answer.text
    path = {"path": "x", "max_frames": None, "longest_edge": None, "exact_frames": None}
    assert "no such file" in refused(patient.http.post("/v1/videos", json=path), 400)["message"]


@pytest.mark.parametrize(
    "unchanging",
    [
        {"functions": [], "function_call": "auto", "tools": [], "tool_choice": "none"},
        {"modalities": ["text"], "top_logprobs": 0, "repetition_penalty": 1, "min_p": 0.0},
        {"seed": -1}, {"seed": -(1 << 63)}, {"seed": (1 << 63) - 1}, {"stop": []}, {"stop": "a"},
        {"user": "a", "store": True, "metadata": {"a": "b"}, "anything": 10**4000},
    ],
)  # fmt: skip
def test_parameters_that_change_nothing_are_accepted(patient, unchanging):
    assert patient.http.post("/v1/chat/completions", json={**QUESTION, **unchanging}).is_success


def test_text_parts_are_joined_with_line_breaks(serve):
    live = serve(stand_in={"words": ["a"]})
    texts = []
    submit = live.engine.submit
    live.engine.submit = lambda request: (texts.append(request.question), submit(request))[1]
    parts = [{"type": "text", "text": part} for part in ("What color is", "the ring?")]
    assert live.http.post("/v1/chat/completions", json={**QUESTION, **user_says(parts)}).is_success
    assert texts == ["What color is\nthe ring?"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\\\..\\\\evil.mp4", "evil.mp4"),
        ("\x1b[2Ja\x07.mp4", "[2Ja.mp4"),
        ("x" * 3000, "x" * 200),
        ("dir/", "video"),
        ("\u00fcber \U0001f600.mp4", "\u00fcber \U0001f600.mp4"),
    ],
)
def test_a_file_name_is_only_displayed(serve, videos, name, shown):
    live = serve(stand_in={})
    header = f'form-data; name="file"; filename="{name}"'.encode()
    body = b"--b\r\nContent-Disposition: " + header + b"\r\n\r\n"
    body += videos[0].read_bytes() + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = live.http.post("/v1/videos", content=body, headers=headers)
    assert answer.status_code == 202 and answer.json()["name"] == shown
    wait_until(lambda: not live.server.jobs.unfinished())
    (stored,) = live.server.store.list()
    (kept,) = (live.server.store.folder / "videos").iterdir()
    assert kept.name == stored.video and stored.name == "video"
    assert sorted(file.name for file in kept.iterdir()) == ["name", "video"]


# --- paths and ids ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../../etc/passwd", "missing.mp4", ".", "", "link", "folder/../link",
     "a\0b", "~/x", "/proc/self/mem", "x" * 4000, "file:///etc/passwd"],
)  # fmt: skip
def test_paths_outside_the_root(patient, path):
    link = patient.server.root / "link"
    if not link.is_symlink():
        link.symlink_to("/etc/passwd")
    answer = patient.http.post("/v1/videos", json={"path": path})
    error = refused(answer, 400)
    assert not path or "no such file under the folder" in error["message"]


def test_no_paths_without_a_root(serve, videos):
    answer = serve().http.post("/v1/videos", json={"path": str(videos[0])})
    assert "accepts no paths" in refused(answer, 400)["message"]


@pytest.mark.parametrize(
    "video",
    ["..", "../..", "..%2f..%2fetc%2fpasswd", "%2e%2e%2fx", "a" * 32, "A" * 32, "x" * 500, "%00",
     "%ff", "é", "0" * 31 + "%0a"],
)  # fmt: skip
def test_malformed_ids(patient, video):
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/peft"), ("GET", "/adapter")):
        with closing(raw(patient)) as client:
            # Sent as it is: a client library would normalize the dots.
            line = f"{method} /v1/videos/{video}{tail} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            client.sendall(line.encode())
            assert client.recv(4096)[:12] in (b"HTTP/1.1 404", b"HTTP/1.1 400", b"HTTP/1.1 405")
    answer = patient.http.post("/v1/chat/completions", json={**QUESTION, "model": video})
    refused(answer, 404, "model_not_found")


# --- a store folder that others write to --------------------------------------------------------


def test_bad_files_in_the_store_do_not_affect_others(shapes, videos, tmp_path):
    """The server starts and answers; a link reveals nothing."""
    folder = tmp_path / "store" / "adapters"
    folder.mkdir(parents=True)
    for number, content in enumerate(BAD_FILES.values()):
        (folder / f"{number:032x}.safetensors").write_bytes(content())
    (tmp_path / "secret").write_text("secret")
    (folder / f"{'a' * 32}.safetensors").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / f"{'b' * 32}.safetensors")
    (folder / f"{'c' * 32}.safetensors").mkdir()
    with running(shapes, tmp_path / "store") as live:
        adapter = live.internalize(videos[0])["adapter_id"]
        listed = live.http.get("/v1/videos").json()["data"]
        assert [video["id"] for video in listed] == [adapter]
        models = live.http.get("/v1/models").json()["data"]
        assert {model["id"] for model in models} == {"shapes", adapter}
        assert live.http.get("/metrics").status_code == 200
        asked = {**QUESTION, "model": adapter, "max_tokens": 2}
        assert live.http.post("/v1/chat/completions", json=asked).status_code == 200
        for name in (f"{0:032x}", "a" * 32, "b" * 32, "c" * 32):
            for path in ("", "/adapter", "/peft"):
                refused(live.http.get(f"/v1/videos/{name}{path}"), 404)
            refused(live.http.post("/v1/chat/completions", json={**QUESTION, "model": name}), 404)


def test_a_replaced_file_is_not_sent(serve, videos):
    live = serve()
    first, second = (live.internalize(video)["adapter_id"] for video in videos[:2])
    path, other = (live.server.store.file(adapter) for adapter in (first, second))
    sound = live.http.get(f"/v1/videos/{second}/adapter")
    assert sound.content == other.read_bytes()
    assert int(sound.headers["content-length"]) == other.stat().st_size
    part = live.http.get(f"/v1/videos/{second}/adapter", headers={"Range": "bytes=8-15"})
    assert part.status_code == 206 and part.content == sound.content[8:16]
    path.write_bytes(other.read_bytes())
    refused(live.http.get(f"/v1/videos/{first}/adapter"), 404)
    listed = live.http.get("/v1/videos").json()["data"]
    assert [video["id"] for video in listed] == [second]
    # Every file that was sent is closed again.
    held = "/proc/self/fd"
    wait_until(
        lambda: (
            not any(os.path.realpath(f"{held}/{name}") == str(other) for name in os.listdir(held))
        )
    )
    # The video is internalized again.
    assert live.internalize(videos[0])["adapter_id"] == first
    assert live.http.get(f"/v1/videos/{first}/adapter").status_code == 200

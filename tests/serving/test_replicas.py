"""Adapters on replicas: servers with vLLM's and SGLang's endpoints and our model behind them."""

from __future__ import annotations

import base64
import io
import json
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from v2l_fast.cli import app
from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.interop.peft import CONFIG_NAME, WEIGHTS_NAME, load_peft, peft_tensors
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.replicas import (
    Replica,
    ReplicaError,
    completion_logprobs,
    unload_everywhere,
    verify,
)
from v2l_fast.tensor_files import save_tensors

BASE = "org/base"


class FakeReplica:
    """Answers ``/v1/completions`` with our own model's log probabilities.

    Attributes:
        loaded: adapters by name.
        fault: "ignores" (loads adapters and answers from the base), "silent" (never responds),
            "static" (no runtime updates), "no logprobs", "garbage", "key", or None.
        noise: added to every log probability.
    """

    def __init__(self, model: Video2LoRA, kind: str = "vllm", fault: str | None = None) -> None:
        self.model, self.kind, self.fault, self.noise = model, kind, fault, 0.0
        self.loaded: dict[str, Adapter] = {}
        self.bodies: list[tuple[str, dict]] = []
        replica, mutex = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.respond({})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self.respond(json.loads(self.rfile.read(length)))

            def respond(self, body: dict) -> None:
                if replica.fault == "silent":
                    time.sleep(1)
                    return
                with mutex:
                    status, reply = replica.reply(self.path, body, self.headers)
                content = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> FakeReplica:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reply(self, path: str, body: dict, headers: Any) -> tuple[int, dict | str]:
        self.bodies.append((path, body))
        if self.fault == "key" and headers.get("Authorization") != "Bearer secret":
            return 401, {"error": {"message": "Unauthorized"}}
        if self.fault == "garbage":
            return 200, "<html>"
        if path == "/v1/models":
            names = [{"id": BASE, "owned_by": self.kind}]
            return 200, {"data": names + [{"id": n, "parent": BASE} for n in self.loaded]}
        if path == "/v1/completions":
            return self.complete(body)
        prefix = "/v1" if self.kind == "vllm" else ""
        update = path.removeprefix(prefix).lstrip("/")
        if self.fault == "static" or not path.startswith(prefix):
            return 404, {"detail": "Not Found"}
        if update == "load_lora_adapter":
            return self.load(body["lora_name"], load_peft(body["lora_path"]))
        if update == "load_lora_adapter_from_tensors" and self.kind == "sglang":
            if "serialized_named_tensors" not in body:
                return 400, {"success": False, "error_message": "missing field"}
            (content,) = body["serialized_named_tensors"]
            tensors = pickle.load(io.BytesIO(base64.b64decode(content)))
            folder = self.folder / body["lora_name"]
            folder.mkdir(parents=True)
            save_tensors(tensors, folder / WEIGHTS_NAME)
            (folder / CONFIG_NAME).write_text(json.dumps(body["config_dict"]))
            return self.load(body["lora_name"], load_peft(folder))
        if update == "unload_lora_adapter":
            if self.loaded.pop(body["lora_name"], None) is not None:
                return self.done()
            if self.kind == "vllm":
                return 404, {"error": {"message": "The lora adapter cannot be found."}}
            return 400, {"success": False, "error_message": "LoRA adapter is not loaded"}
        return 404, {"detail": "Not Found"}

    folder: Path

    def load(self, name: str, adapter: Adapter) -> tuple[int, dict | str]:
        if name in self.loaded:
            message = f"The lora adapter '{name}' has already been loaded."
            return 400, {"error": {"message": message}}
        self.loaded[name] = adapter
        return self.done()

    def done(self) -> tuple[int, dict | str]:
        return (200, "Success") if self.kind == "vllm" else (200, {"success": True})

    def complete(self, body: dict) -> tuple[int, dict]:
        name = body["model"]
        if self.kind == "sglang":
            name = name.removeprefix(f"{BASE}:")
        if name != BASE and name not in self.loaded:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        if self.fault == "no logprobs":
            return 200, {"choices": [{"text": "x", "logprobs": None}]}
        adapter = None if self.fault == "ignores" else self.loaded.get(name)
        ids = body["prompt"]
        assert body["echo"] and body["logprobs"] >= 1 and body["max_tokens"] == 1
        values = completion_logprobs(self.model, adapter, ids[:1], ids[1:])
        logprobs = {"token_logprobs": [None, *(v + self.noise for v in values), -1.0]}
        return 200, {"choices": [{"logprobs": logprobs}]}


@pytest.fixture
def replica(shapes, tmp_path) -> Iterator[Any]:
    """``replica(kind, fault)`` starts a replica."""
    with ExitStack() as stack:

        def start(kind: str = "vllm", fault: str | None = None) -> FakeReplica:
            started = stack.enter_context(FakeReplica(shapes, kind, fault))
            started.folder = tmp_path / "replica"
            return started

        yield start


@pytest.fixture(scope="module")
def adapters(shapes, videos) -> list[Adapter]:
    return [shapes.internalize(path) for path in videos[:2]]


@pytest.fixture
def file(adapters, tmp_path) -> Path:
    adapters[0].save(tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def run(*arguments: object) -> Any:
    return CliRunner(env={"V2L_MODEL": "shapes"}).invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_push_verify_and_unload(replica, file, tmp_path, kind):
    server = replica(kind)
    place = ["--folder", tmp_path / "shared"] if kind == "vllm" else []
    options = ["--served-base", BASE, "--device", "cpu"]
    done = run("push", file, server.url, *place, *options)
    assert done.exit_code == 0, done.output
    name = "clip" if kind == "vllm" else f"{BASE}:clip"
    assert f'"model": "{name}"' in done.output and list(server.loaded) == ["clip"]
    done = run("export", file, "--verify", server.url, "--device", "cpu")
    assert done.exit_code == 0 and "answers from clip" in done.output, done.output
    for state in ("removed", "not loaded"):
        done = run("push", file, server.url, "--unload")
        assert done.exit_code == 0 and state in done.output and not server.loaded
    done = run("export", file, "--verify", server.url, "--device", "cpu")
    assert isinstance(done.exception, ReplicaError) and "does not exist" in str(done.exception)


def test_it_compares_log_probabilities(replica, shapes, adapters):
    server = replica()
    server.loaded["clip"] = adapters[0]
    result = verify(shapes, adapters[0], Replica(server.url), "clip")
    assert result.error < 1e-3 and result.base_error < 1e-3
    assert result.effect == pytest.approx(result.expected_effect, abs=1e-3)
    assert result.effect > 2 * result.bound
    server.noise = 0.1
    result = verify(shapes, adapters[0], Replica(server.url), "clip")
    assert result.error == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(ReplicaError, match="base model differs"):
        verify(shapes, adapters[0], Replica(server.url), "clip", bound=0.05)


def test_a_stale_name(replica, shapes, adapters):
    server = replica()
    server.loaded["clip"] = adapters[1]
    with pytest.raises(ReplicaError, match="another adapter or an older version"):
        verify(shapes, adapters[0], Replica(server.url), "clip")


def test_a_probe_that_tells_nothing(replica, shapes, adapters):
    server = replica()
    server.loaded["clip"] = adapters[0]
    with pytest.raises(ReplicaError, match="another --probe"):
        verify(shapes, adapters[0], Replica(server.url), "clip", bound=100.0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignores", "no effect"),
        ("silent", "does not respond"),
        ("no logprobs", "does not report"),
        ("garbage", "not a list of models"),
        ("key", "401"),
    ],
)
def test_a_broken_replica(replica, shapes, adapters, fault, message):
    server = replica(fault=fault)
    server.loaded["clip"] = adapters[0]
    client = Replica(server.url, timeout=0.3 if fault == "silent" else 60)
    with pytest.raises(ReplicaError, match=message):
        verify(shapes, adapters[0], client, "clip")
    if fault == "key":
        verify(shapes, adapters[0], Replica(server.url, key="secret"), "clip")


def test_push_reports_each_server(replica, file, tmp_path):
    good, static = replica(), replica(fault="static")
    arguments = [file, good.url, static.url, "--folder", tmp_path / "shared", "--device", "cpu"]
    done = run("push", *arguments, "--served-base", BASE)
    assert done.exit_code == 1 and list(good.loaded) == ["clip"]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in done.output
    # Weights under a name never change: replicas would go on answering from the old ones.
    again = run("push", *arguments[:2], "--folder", tmp_path / "other", "--device", "cpu")
    assert again.exit_code == 1 and "already been loaded" in again.output
    memory = run("push", file, good.url, "--device", "cpu")
    assert memory.exit_code == 1 and "--folder" in memory.output


def test_an_older_sglang(replica, shapes, adapters, monkeypatch):
    server = replica("sglang")
    reply = server.reply
    seen = []

    def older(path: str, body: dict, headers: Any) -> tuple[int, dict | str]:
        if "from_tensors" not in path:
            return reply(path, body, headers)
        seen.append(sorted(body))
        if "serialized_tensors" not in body:
            return 422, {"error": {"message": "serialized_tensors: field required"}}
        return 200, {"success": True}

    monkeypatch.setattr(server, "reply", older)
    Replica(server.url).load_tensors("clip", *peft_tensors(adapters[0], BASE))
    assert len(seen) == 2


def test_a_deletion_reaches_the_replicas(replica, serve, shapes, videos, adapters):
    first, second, silent, static = (
        replica(), replica("sglang"), replica(fault="silent"), replica(fault="static"),
    )  # fmt: skip
    gone = Replica("http://127.0.0.1:9")
    servers = [*(Replica(one.url, timeout=0.5) for one in (first, second, silent, static)), gone]
    live = serve(replicas=servers)
    stored = live.internalize(videos[0])["adapter_id"]
    first.loaded[stored] = adapters[0]
    reply = live.http.delete(f"/v1/videos/{stored}").json()
    assert reply["deleted"] and stored not in first.loaded
    results = {one["url"]: (one["unloaded"], one["error"]) for one in reply["replicas"]}
    assert results[first.url] == (True, None) and results[second.url] == (False, None)
    for url in (silent.url, static.url, gone.url):
        assert not results[url][0] and results[url][1]
    metrics = live.http.get("/metrics").text
    for result, count in (("unloaded", 1), ("absent", 1), ("failed", 3)):
        assert f'v2l_replica_unloads_total{{result="{result}"}} {count}.0' in metrics
    assert live.http.delete(f"/v1/videos/{stored}").status_code == 404


def test_resident_adapters_are_a_metric(serve, videos):
    live = serve()
    stored = live.internalize(videos[0])["adapter_id"]
    line = (
        'vllm:lora_requests_info{max_lora="4",running_lora_adapters="%s",waiting_lora_adapters=""}'
    )
    assert line % "" in live.http.get("/metrics").text
    body = {"model": stored, "messages": [{"role": "user", "content": "?"}], "max_tokens": 2}
    assert live.http.post("/v1/chat/completions", json=body).status_code == 200
    assert line % stored in live.http.get("/metrics").text


def test_no_replicas_and_a_malformed_url():
    assert unload_everywhere([], "x") == []
    for url in ("replica:8000", "ftp://replica", "", "file:///x"):
        with pytest.raises(ConfigError, match="http"):
            Replica(url)


def test_log_probabilities_of_one_pass(shapes, adapters):
    """As the runner reports them token by token."""
    for adapter in (adapters[0], None):
        (answer,) = shapes.answer("What happens in the video?", adapter, logprobs=0)
        prompt = list(shapes.backbone.prompt_builder.question("What happens in the video?"))
        tokens = [one.token for one in answer.logprobs]
        values = completion_logprobs(shapes, adapter, prompt, tokens)
        assert values == pytest.approx([one.logprob for one in answer.logprobs], abs=1e-4)

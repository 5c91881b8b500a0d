"""``v2l serve``: parses options, puts a server together, runs it until it is told to stop."""

from __future__ import annotations

import ipaddress
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from v2l_fast.cli.options import Base, Device, Dtype, Model, load_model
from v2l_fast.console import say
from v2l_fast.errors import ConfigError


def serve(
    store: Annotated[
        Path, typer.Option(help="Folder for adapters and uploaded videos; made when missing.")
    ] = Path("v2l-store"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    model: Model = "shapes",
    base: Base = None,
    name: Annotated[
        str | None, typer.Option(help="What callers name the base model; from --model if omitted.")
    ] = None,
    served_base: Annotated[
        str | None,
        typer.Option(help="Base named in downloaded PEFT adapters: what vLLM serves it under."),
    ] = None,
    vllm_folder: Annotated[
        Path | None,
        typer.Option(help="Also write every adapter here as PEFT, for vLLM replicas to answer."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="V2L_API_KEY", help="Key callers must send; prefer the variable."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with a key on each line; # starts a comment.")
    ] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option(help="Serve other machines without a key: whoever reaches it, uses it.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name under which the server is reached, besides localhost and --host; "
            "repeat for more."
        ),
    ] = None,
    allowed_root: Annotated[
        Path | None,
        typer.Option(help="Folder from which callers may name videos; none if omitted."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 32,
    max_context: Annotated[int, typer.Option(min=16, help="Prompt and answer, in tokens.")] = 2048,
    adapter_slots: Annotated[
        int, typer.Option(min=1, help="Adapters kept on the device; others are loaded.")
    ] = 16,
    max_queue: Annotated[int, typer.Option(min=1, help="Questions waiting; more get 503.")] = 256,
    max_jobs: Annotated[int, typer.Option(min=1, help="Videos waiting; more get 503.")] = 64,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Size of a video, in MB.")] = 1024,
    max_duration: Annotated[float, typer.Option(min=0.1, help="Seconds of a video.")] = 7200.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a frame.")] = 7680 * 4320,
    max_frames: Annotated[int, typer.Option(min=1, help="Frames of one video.")] = 1024,
    max_decode_seconds: Annotated[
        float, typer.Option(min=1, help="Time for decoding one video.")
    ] = 600.0,
    max_decode_gb: Annotated[
        float, typer.Option(min=0.1, help="Memory for decoding one video on the CPU.")
    ] = 8.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer.")] = 1024,
    keep_videos_gb: Annotated[
        float,
        typer.Option(min=0, help="Uploaded videos kept to compare with; the oldest go first."),
    ] = 20.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time to finish answers and jobs when stopped.")
    ] = 30.0,
    merged: Annotated[
        str | None, typer.Option(help="Merge this one adapter into the weights; serve it alone.")
    ] = None,
    warm_up: Annotated[
        bool, typer.Option(help="Compile before the first question; /health says when it is done.")
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve videos and questions over HTTP: OpenAI's interface, a page at /, Prometheus metrics.

    \b
    v2l serve
    v2l serve --model hypernet-500m/ --store /data/store --host 0.0.0.0 --api-key-file keys.txt
    """
    from v2l_fast.interop.vllm import VllmFolder
    from v2l_fast.serving import http_server
    from v2l_fast.serving.api import create_app
    from v2l_fast.serving.engine import Engine
    from v2l_fast.serving.gate import AllowedHosts, ApiKeys
    from v2l_fast.serving.limits import ServerLimits
    from v2l_fast.serving.monitoring import configure_logging
    from v2l_fast.serving.sandbox import VideoReader
    from v2l_fast.serving.server import Server
    from v2l_fast.store.adapter_store import AdapterStore, PublishingStore

    levels = ("debug", "info", "warning", "error")
    if log_level not in levels:
        raise typer.BadParameter(f"--log-level is one of {', '.join(levels)}, not {log_level}")
    keys = ApiKeys.read(api_key, api_key_file)
    if allowed_root is not None and not allowed_root.is_dir():
        raise ConfigError(f"--allowed-root {allowed_root}: no such folder")
    if vllm_folder is not None:
        _check_writable(vllm_folder)
    hosts = AllowedHosts(allowed_host or (), host)
    bound = http_server.bind(host, port)
    address, bound_port = bound.getsockname()[:2]
    if not keys.required and not allow_unauthenticated and not _is_loopback(address):
        raise ConfigError(
            f"--host {host}: other machines could use this server without a key; set V2L_API_KEY, "
            "or give --allow-unauthenticated if everybody who reaches it may"
        )
    limits = ServerLimits(
        upload_bytes=max_upload_mb * 1_000_000,
        duration=max_duration,
        pixels=max_pixels,
        frames=max_frames,
        new_tokens=max_new_tokens,
        jobs=max_jobs,
        kept_video_bytes=int(keep_videos_gb * 1e9),
        decode_seconds=max_decode_seconds,
        decode_bytes=int(max_decode_gb * 1e9),
        connections=http_server.connection_limit(ServerLimits.connections),
    )
    VideoReader.preload()
    loaded = load_model(model, base, device, dtype)
    peft_base = served_base or loaded.config.base_model_name_or_path or loaded.backbone.name_or_path
    if vllm_folder is None:
        adapters = AdapterStore(store)
    else:
        adapters = PublishingStore(store, VllmFolder(vllm_folder, peft_base))
    reader = VideoReader(loaded, limits)
    engine = Engine(
        loaded,
        adapters,
        max_batch=max_batch,
        max_context=max_context,
        adapter_slots=adapter_slots,
        queue_limit=max_queue,
        merged=merged,
        warm_up=warm_up,
        load_clip=reader.load_clip,
    )
    server = Server(
        loaded,
        engine,
        adapters,
        reader,
        name or (Path(model).name if Path(model).exists() else model),
        limits,
        keys,
        None if allowed_root is None else allowed_root.resolve(),
        peft_base,
        hosts,
    )
    shown = f"[{host}]" if ":" in host else host
    say(f"v2l_fast serves {server.name} at http://{shown}:{bound_port}/")
    configure_logging(log_level)
    http_server.http_server(create_app(server, drain_seconds), limits, drain_seconds).run([bound])


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"--vllm-folder {folder}: no folder that can be written ({error.strerror})"
        ) from None


def _is_loopback(address: str) -> bool:
    # An IPv6 address may name its interface.
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback

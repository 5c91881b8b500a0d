"""``v2l convert`` and ``v2l export``: released checkpoints in, adapters out for other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument, Option

from v2l_fast.cli.options import FORCE, ModelOptions, with_options
from v2l_fast.console import note, say

if TYPE_CHECKING:
    from v2l_fast.serving.replicas import Replica

NAME = Option(None, help="Name of the adapter on the server. By default, the file's.")


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

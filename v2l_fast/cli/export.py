"""``v2l convert`` and ``v2l export``: released checkpoints in, adapters out for other programs."""

from __future__ import annotations

from pathlib import Path

import typer
from typer import Argument, Option

from v2l_fast.cli.options import FORCE, ModelOptions, with_options
from v2l_fast.console import say


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
    force: bool = FORCE,
) -> None:
    """Export for PEFT, vLLM and other servers.

    \b
    v2l export clip.safetensors --peft clip-peft/
    v2l export clip.safetensors --vllm adapters/ --served-base org/model
    v2l export --llama text-decoder/
    """
    from v2l_fast.interop.llama import export_text_decoder
    from v2l_fast.interop.peft import TEXT_LAYERS, VLM_LAYERS, save_peft
    from v2l_fast.interop.vllm import VllmFolder
    from v2l_fast.outputs import check_new_folder

    if peft is None and llama is None and vllm is None:
        raise typer.BadParameter("name --peft FOLDER, --vllm FOLDER or --llama FOLDER to write")
    if (peft is None and vllm is None) != (adapter is None):
        raise typer.BadParameter("--peft and --vllm export an adapter file: name it first")
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
    name = served_base or loading.base or model.backbone.name_or_path
    loaded = model.load_adapter(adapter)
    if vllm is not None:
        target = VllmFolder(vllm, name, text_only)
        target.write(adapter.stem, loaded)
        rank = next(iter(loaded.merged()[0].values())).shape[1]
        say(f"{vllm_adapter}: PEFT adapter for {name}. Serve and ask for it with:")
        say(target.command(rank))
        say(f'"model": "{adapter.stem}"')
    if peft is not None:
        save_peft(loaded, peft, name, layers=TEXT_LAYERS if text_only else VLM_LAYERS)
        say(f"{peft}: PEFT adapter for {name}")

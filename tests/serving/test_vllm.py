"""Adapters for vLLM: the folder that its filesystem resolver reads, and a replica's command."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.waiting import wait_until
from v2l_fast.cli import app
from v2l_fast.errors import AdapterError
from v2l_fast.interop.peft import VllmFolder, load_peft, validate_peft
from v2l_fast.store.adapter_store import PublishingStore


def test_export_prints_the_command(shapes, videos, tmp_path):
    shapes.internalize(videos[0]).save(tmp_path / "clip.safetensors")
    folder = tmp_path / "with space"
    arguments = ["export", str(tmp_path / "clip.safetensors"), "--vllm", str(folder)]
    done = CliRunner().invoke(
        app, [*arguments, "--served-base", "org/base", "--model", "shapes", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    config = json.loads((folder / "clip" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("org/base", config["lora_alpha"])
    assert (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_PLUGINS=lora_filesystem_resolver "
        f"VLLM_LORA_RESOLVER_CACHE_DIR='{folder}' vllm serve org/base --enable-lora "
        "--max-lora-rank 16 --language-model-only"
    ) in done.output
    validate_peft(folder / "clip", shapes.backbone.model, "org/base")


@pytest.mark.parametrize("arguments", [[], ["--vllm", "x"], ["a.safetensors"]])
def test_export_without_its_arguments(arguments):
    assert CliRunner().invoke(app, ["export", *arguments]).exit_code == 2


@pytest.mark.parametrize(("rank", "allowed"), [(32, 32), (33, 64), (48, 64), (512, 512)])
def test_the_rank_is_rounded_up_to_one_of_vllms(rank, allowed, tmp_path):
    text = VllmFolder(tmp_path, "base", text_only=True).command(rank)
    assert f"--max-lora-rank {allowed}" in text and "--language-model-only" not in text


def test_a_rank_beyond_vllm(tmp_path):
    with pytest.raises(AdapterError, match="prune"):
        VllmFolder(tmp_path, "base").command(513)


def test_stored_adapters_are_published(shapes, videos, tmp_path):
    published = tmp_path / "published"
    store = PublishingStore(tmp_path / "store", VllmFolder(published, "org/base"))
    adapter = shapes.internalize(videos[0])
    stored = store.put(adapter)
    assert load_peft(published / stored).rank == adapter.rank + 8
    assert store.put(adapter) == stored
    wait_until(lambda: [p.name for p in published.iterdir()] == [stored])
    store.delete(stored)
    assert not any(published.iterdir()) and store.list() == []

"""Mistakes of users, end to end: one clear line, and no half-written file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from v2l_fast import Video2LoRA
from v2l_fast.errors import AdapterError, CheckpointError, ConfigError, V2LError, VideoError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.tensor_files import load_tensors

M = "down_proj"


def check_one_line(caught: pytest.ExceptionInfo, *words: object) -> None:
    message = str(caught.value)
    assert isinstance(caught.value, V2LError)
    assert message and "\n" not in message
    for word in words:
        assert str(word) in message


def edit_tensors(path: Path, edit) -> None:
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


# --- hypernetwork and base ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 24}, ("hidden_size 24", "tiny/base has 32")),
        ({"num_layers": 4}, ("num_layers 4", "has 3")),
        ({"target_modules": {M: (40, 32)}}, ("(40, 32)", "(48, 32)")),
        ({"target_modules": {"fc2": (48, 32)}}, ("fc2",)),
    ],
)
def test_a_hypernetwork_for_another_base(change, words, backbone):
    network = tiny.hypernetwork(dataclasses.replace(tiny.CONFIG, **change))
    with pytest.raises(V2LError) as caught:
        Video2LoRA(backbone, network)
    check_one_line(caught, *words)


def break_hypernet(kind: str, folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "missing":
        for path in (weights, config):
            path.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "text":
        weights.write_bytes(b"not a tensor in sight")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "bits":
        weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    elif kind == "nan":
        edit_tensors(weights, lambda s: s["head.weight"].view(-1)[7].fill_(float("nan")))
    elif kind == "a tensor less":
        edit_tensors(weights, lambda s: s.pop("scaler_A.down_proj"))
    elif kind == "another shape":
        edit_tensors(weights, lambda s: s.update({"head.weight": torch.zeros(2, 2)}))
    elif kind == "another config":
        values = json.loads(config.read_text())
        config.write_text(json.dumps({**values, "rank": 9}))
    elif kind == "config of something else":
        config.write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "no weights",
        "text",
        "truncated",
        "bits",
        "nan",
        "a tensor less",
        "another shape",
        "another config",
        "config of something else",
    ],
)
def test_broken_hypernetworks(kind, pair):
    folder = pair / "hypernet"
    break_hypernet(kind, folder)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        Video2LoRA.from_pretrained(folder, base=pair / "base")
    check_one_line(caught, folder)


def test_unknown_names(pair, tmp_path):
    for name in (tmp_path / "nothing", "nobody/nothing", "not a name"):
        with pytest.raises(CheckpointError) as caught:
            Video2LoRA.from_pretrained(name)
        check_one_line(caught, name)
    with pytest.raises(CheckpointError) as caught:
        Video2LoRA.from_pretrained(pair / "hypernet", base=tmp_path / "no base")
    check_one_line(caught, tmp_path / "no base")
    path = tmp_path / "file.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError) as caught:
        Video2LoRA.from_pretrained(path, base=pair / "base")
    check_one_line(caught, path)


def test_a_hypernetwork_without_a_base(backbone, tmp_path):
    config = dataclasses.replace(tiny.CONFIG, base_model_name_or_path=None)
    tiny.hypernetwork(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Video2LoRA.from_pretrained(tmp_path)
    check_one_line(caught, tmp_path, "base=")


@pytest.mark.parametrize("where", ["vision", "embedding", "layer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_base_weights_that_are_not_finite(where, value, clips):
    """The features show it first; no adapter is produced."""
    backbone = tiny.backbone()
    text = backbone.model.model.text_model
    weight = {
        "vision": backbone.model.model.connector.modality_projection.proj.weight,
        "embedding": text.embed_tokens.weight,
        "layer": text.layers[1].mlp.up_proj.weight,
    }[where]
    with torch.no_grad():
        weight.fill_(value)
    model = Video2LoRA(backbone, tiny.hypernetwork())
    with pytest.raises(VideoError) as caught:
        model.internalize(clips[0])
    check_one_line(caught, "NaN or infinite")


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def file(adapters, tmp_path) -> Path:
    adapters[0].save(tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def rewrite(file: Path, edit) -> None:
    """Edit an adapter file's tensors and metadata in position; its format stays valid."""
    tensors, metadata = load_tensors(file, AdapterError)
    record = json.loads(metadata["v2l_adapter"])
    edit(tensors, record)
    save_file(tensors, file, metadata={**metadata, "v2l_adapter": json.dumps(record)})


def other_model(backbone, **change) -> Video2LoRA:
    return Video2LoRA(
        backbone, tiny.hypernetwork(dataclasses.replace(tiny.CONFIG, **change), seed=9)
    )


@pytest.mark.parametrize("change", [{}, {"rank": 2}, {"bias_adapter": False}, {"scale": 3.0}])
def test_adapters_of_another_hypernetwork(change, model, backbone, clips, tmp_path):
    """Same base, same sizes or another rank: only the fingerprint of the hypernetwork differs."""
    other = other_model(backbone, **change).internalize(clips[0])
    other.save(tmp_path / "clip.safetensors")
    with pytest.raises(AdapterError) as caught:
        model.load_adapter(tmp_path / "clip.safetensors")
    check_one_line(caught, tmp_path / "clip.safetensors", "hypernetwork", "internalize")
    with pytest.raises(AdapterError) as caught:
        model.ask("what happens?", other)
    check_one_line(caught, "hypernetwork")


def _fewer_layers(tensors: dict, record: dict) -> None:
    tensors.update({k: t[:2].contiguous() for k, t in tensors.items()})


def _narrower(tensors: dict, record: dict) -> None:
    tensors["down_proj.lora_A"] = tensors["down_proj.lora_A"][..., :40].contiguous()


def _other_module(tensors: dict, record: dict) -> None:
    tensors.update({k.replace("down", "up"): tensors.pop(k) for k in list(tensors)})


def _other_bias(tensors: dict, record: dict) -> None:
    record["bias_id"] = "0" * 16


def _no_bias(tensors: dict, record: dict) -> None:
    record["bias_id"] = None


def _other_hypernet(tensors: dict, record: dict) -> None:
    record["provenance"]["hypernetwork"] = "0" * 16


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_fewer_layers, ("2 layers", "3")),
        (_narrower, ("(40, 32)", "(48, 32)")),
        (_other_module, ("up_proj", "down_proj")),
        (_other_bias, ("bias adapter",)),
        (_no_bias, ("bias adapter",)),
        (_other_hypernet, ("hypernetwork",)),
    ],
)
def test_adapter_files_that_do_not_fit(edit, words, model, file):
    rewrite(file, edit)
    with pytest.raises(AdapterError) as caught:
        model.load_adapter(file)
    check_one_line(caught, file, *words)


def test_corrupted_headers(model, file):
    """A changed byte in the header gives an AdapterError or a valid adapter."""
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(0, header, 7):
        broken = bytearray(whole)
        broken[position] ^= 0x15
        file.write_bytes(bytes(broken))
        try:
            loaded = model.load_adapter(file)
        except AdapterError as error:
            assert "\n" not in str(error)
        else:
            assert loaded.A[M].shape == (3, 4, 48) and torch.isfinite(loaded.A[M]).all()


# --- nothing half-written -------------------------------------------------------------------------


def test_a_failed_save_leaves_no_file(adapters, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        adapters[0].save(tmp_path / "clip.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder(adapters, tmp_path):
    with pytest.raises(V2LError) as caught:
        adapters[0].save(tmp_path / "nowhere" / "clip.safetensors")
    check_one_line(caught, tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_sampling_out_of_range(model):
    with pytest.raises(ConfigError) as caught:
        model.ask("what happens?", top_p=2)
    check_one_line(caught, "top_p")


def test_composing_adapters_of_different_hypernetworks(model, backbone, clips, adapters):
    other = other_model(backbone).internalize(clips[0])
    with pytest.raises(AdapterError) as caught:
        Adapter.compose([adapters[0], other])
    check_one_line(caught, "only adapters of one hypernetwork compose")

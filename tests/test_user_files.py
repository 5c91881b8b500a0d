"""Every reader reports a wrong file in one bounded line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests import tiny
from v2l_fast.data.manifest import load_manifest
from v2l_fast.data.shards import Shards
from v2l_fast.errors import LINE_LENGTH, CheckpointError, V2LError
from v2l_fast.evaluation.benchmark_manifests import BENCHMARKS
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.interop import frames2lora
from v2l_fast.interop.peft import load_peft
from v2l_fast.outputs import Journal, ResumableFolder
from v2l_fast.serving.gate import ApiKeys
from v2l_fast.tensor_files import load_tensors, read_header
from v2l_fast.training.checkpoint import read_progress
from v2l_fast.training.config import load_config
from v2l_fast.vlm import load_backbone


def _read_record(path: Path):
    return ResumableFolder(path.parent, {}, shared=True).read("record")


DEEP = "[" * 100_000

# What reads a file, by the name it must have in its folder.
JSON_READERS = {
    "hypernetwork": ("config.json", lambda path: HypernetConfig.load(path.parent)),
    "base": ("config.json", lambda path: load_backbone(path.parent)),
    "PEFT": ("adapter_config.json", lambda path: load_peft(path.parent)),
    "manifest": ("manifest.jsonl", load_manifest),
    "journal": ("journal.jsonl", Journal),
    "record": ("record.json", _read_record),
    "shards": ("run.json", lambda path: Shards.open(path.parent, {}, 1, 1)),
    "training config": ("run.toml", lambda path: load_config(str(path))),
    **{
        f"benchmark {name}": (
            Path(benchmark.files[0]).name,
            lambda path, benchmark=benchmark: benchmark.items(*[path] * len(benchmark.files)),
        )
        for name, benchmark in BENCHMARKS.items()
        if not benchmark.files[0].endswith(".csv")
    },
}
TENSOR_READERS = {
    "adapter": ("clip.safetensors", Adapter.load),
    "checkpoint": ("step.safetensors", read_progress),
    "weights": ("model.safetensors", load_tensors),
    "released checkpoint": ("model.pt", frames2lora.load),
}
OTHER_READERS = {"keys": ("keys.txt", lambda path: ApiKeys.read(None, path))}
READERS = JSON_READERS | TENSOR_READERS | OTHER_READERS


def refused(read, path: Path) -> str:
    with pytest.raises(V2LError) as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert all(line.isprintable() and len(line) <= LINE_LENGTH + 10 for line in lines)
    assert len(lines) <= 10
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, V2LError)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing"])
@pytest.mark.parametrize("reader", READERS)
def test_paths_that_are_not_files(reader, kind, tmp_path):
    name, read = READERS[reader]
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif reader in ("journal", "shards"):
        # These files are created.
        return
    message = refused(read, path)
    assert kind in ("folder", "missing") or "not a regular file" in message


@pytest.mark.parametrize(
    "content",
    [
        DEEP.encode() + b"\n",
        b'{"x": ' + b"1" * 5000 + b"}\n",
        b'{"x": ' + DEEP.encode() + b"\n",
        b"x" * 3_000_000 + b"\n",
        b'{"' + b"x" * 3_000_000 + b'": 1}\n',
        b"\xff\xfe{\x00}\x00",
        b"\0" * 1000 + b"\n",
        b'"text"\n',
        b"3\n",
        b"null\n",
        b'[[1], "x", null, {"a": []}]\n',
        b'{"a": 1, "a": 2}\n',
    ],
    ids=["deep", "giant number", "deep in an object", "long", "long key", "UTF-16", "NUL", "text",
         "number", "null", "list", "repeated key"],
)  # fmt: skip
@pytest.mark.parametrize("reader", JSON_READERS)
def test_wrong_json(reader, content, tmp_path):
    name, read = JSON_READERS[reader]
    path = tmp_path / name
    path.write_bytes(content)
    if reader == "record" and content.startswith(b'{"' + b"xx"):
        # Any object will do.
        assert read(path)
        return
    refused(read, path)


def header(entries: object, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (1,), begin: object = 0, end: object = 4) -> dict:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_TENSORS = {
    "500,000 tensors": lambda: header(
        b"{"
        + b",".join(
            b'"%d":%s' % (i, json.dumps(entry(shape=(0,), end=0)).encode()) for i in range(500_000)
        )
        + b"}"
    ),
    "header of 100 MB": lambda: header(b"{" + b" " * 100_000_000 + b"}"),
    "header beyond the file": lambda: (2**40).to_bytes(8, "little") + b"{}",
    "deep header": lambda: header(DEEP.encode()),
    "header is a list": lambda: header([]),
    "giant number": lambda: header(b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"),
    "shape of 2 ** 63": lambda: header({"x": entry(shape=(2**62, 2, 1))}, b"\0" * 4),
    "negative shape": lambda: header({"x": entry(shape=(-1, -1))}, b"\0" * 4),
    "fractional shape": lambda: header({"x": entry(shape=(1.0,))}, b"\0" * 4),
    "shape is text": lambda: header({"x": entry(shape="1")}, b"\0" * 4),
    "true as a size": lambda: header({"x": entry(shape=(True,))}, b"\0" * 4),
    "many dimensions": lambda: header({"x": entry(shape=(1,) * 1000)}, b"\0" * 4),
    "overlapping": lambda: header({"x": entry(), "y": entry(begin=2, end=6)}, b"\0" * 6),
    "the same bytes": lambda: header({"x": entry(), "y": entry()}, b"\0" * 4),
    "a gap": lambda: header({"x": entry(begin=4, end=8)}, b"\0" * 8),
    "beyond the end": lambda: header({"x": entry(shape=(4,), end=16)}, b"\0" * 8),
    "bytes left": lambda: header({"x": entry()}, b"\0" * 8),
    "reversed": lambda: header({"x": entry(begin=4, end=0)}, b"\0" * 4),
    "unknown dtype": lambda: header({"x": entry("F99")}, b"\0" * 4),
    "dtype is a list": lambda: header({"x": entry(["F32"])}, b"\0" * 4),
    "float8": lambda: header({"x": entry("F8_E4M3", end=1)}, b"\0"),
    "complex": lambda: header({"x": entry("C64", end=8)}, b"\0" * 8),
    "no dtype": lambda: header({"x": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "entry is text": lambda: header({"x": "F32"}),
    "metadata is a list": lambda: header({"__metadata__": [], "x": entry()}, b"\0" * 4),
    "metadata holds a number": lambda: header({"__metadata__": {"a": 1}}),
    "repeated name": lambda: header(b'{"x": %s, "x": %s}' % ((json.dumps(entry()).encode(),) * 2)),
    "surrogate in a name": lambda: header(b'{"\\ud800": %s}' % json.dumps(entry()).encode()),
    "not UTF-8": lambda: header(b'{"\xff": 1}'),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_invalid_headers(kind, tmp_path):
    path = tmp_path / "clip.safetensors"
    path.write_bytes(BAD_TENSORS[kind]())
    for read in (Adapter.load, read_progress, read_header, load_tensors):
        assert str(path) in refused(read, path)


def test_headers_are_validated_before_anything_is_loaded(tmp_path, monkeypatch):
    path = tmp_path / "clip.safetensors"
    path.write_bytes(save({"m.lora_A": torch.ones(2, 3, 4)}, {"v2l_adapter": "{}"}))
    monkeypatch.setattr("v2l_fast.tensor_files.safe_open", None)
    monkeypatch.setattr("safetensors.torch.load", None)
    refused(Adapter.load, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 10**12}, "num_layers must be at most"),
        ({"num_blocks": 10**9}, "num_blocks must be at most"),
        ({"num_self_attn_per_block": 1000, "num_blocks": 1000}, "must be at most 1,024 layers"),
        ({"hidden_size": 2**62}, "hidden_size must be at most"),
        ({"rank": 2**62}, "rank must be at most"),
        ({"scale": True}, "scale must be a finite number"),
        ({"target_modules": {"down_proj": [True, True]}}, "target_modules"),
        ({"target_modules": {"x" * 1_000_000: [1]}}, "target_modules"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path must be text"),
        ({"instruction": {"a": "b" * 1_000_000}}, "instruction must be text"),
        ({"model_type": ["x" * 1_000_000]}, "model_type"),
        ({"rank": 3}, "the config says"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_hypernetwork_configs(change, words, tmp_path, monkeypatch):
    tiny.hypernetwork().save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**record, **change}))
    # Shapes are validated from the header.
    monkeypatch.setattr("v2l_fast.tensor_files.safe_open", None)
    assert words in refused(HyperNetwork.from_pretrained, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_base_folder_with_a_pipe_in_it(name, pair):
    (pair / "base" / name).unlink(missing_ok=True)
    os.mkfifo(pair / "base" / name)
    with pytest.raises(CheckpointError, match="named pipe"):
        load_backbone(pair / "base")


@pytest.mark.parametrize(
    "change",
    [{"model_type": []}, {"model_type": None}, {"text_config": 3}, {"vision_config": "x"}],
    ids=str,
)
def test_a_base_config_with_values_of_other_types(change, pair):
    path = pair / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError) as caught:
        load_backbone(pair / "base")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < LINE_LENGTH + 100

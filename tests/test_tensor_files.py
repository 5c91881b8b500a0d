"""Safetensors files: exact round trips, atomic writes, errors that name the file."""

from __future__ import annotations

import os

import pytest
import torch

from v2l_fast import tensor_files
from v2l_fast.errors import AdapterError, CheckpointError, V2LError
from v2l_fast.files import replacing, write_text
from v2l_fast.tensor_files import load_tensors, save_tensors


def test_round_trip(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "plain": base,
        "view": base[1:, ::2],
        "turned": base.T,
        "expanded": torch.ones(1, 3).expand(5, 3),
        "half": base.bfloat16(),
        "double": base.double(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "gradient": base.clone().requires_grad_(),
    }
    save_tensors(tensors, tmp_path / "file.safetensors", {"key": "value"})
    loaded, metadata = load_tensors(tmp_path / "file.safetensors", CheckpointError)
    assert metadata["key"] == "value"
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(7), tensor.nan_to_num(7)), name
        assert loaded[name].is_contiguous() and not loaded[name].requires_grad
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize("step", ["save_file", "os.replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    save_tensors({"x": torch.zeros(3)}, path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(*((tensor_files, step) if step == "save_file" else (os, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors({"x": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]


def test_a_failed_write_of_text_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(V2LError, match="cannot be written"):
        write_text(tmp_path / "none" / "a", "new")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as part:
        part.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_missing_folder(tmp_path):
    with pytest.raises(V2LError, match="does not exist"):
        save_tensors({"x": torch.zeros(3)}, tmp_path / "nowhere" / "file.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [AdapterError, CheckpointError])
def test_broken_files(error, tmp_path):
    path = tmp_path / "file.safetensors"
    with pytest.raises(error, match="no such file"):
        load_tensors(path, error)
    with pytest.raises(error, match="a folder, not a regular file"):
        load_tensors(tmp_path, error)
    save_tensors({"x": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    broken = {
        "empty": b"",
        "truncated in the header": whole[:20],
        "truncated in the data": whole[:-1],
        "longer than it says": whole + b"\0",
        "text": b"this is not a tensor file, just some words",
        "huge header": (2**62).to_bytes(8, "little") + whole[8:],
        "zip": b"PK\x03\x04" + whole,
    }
    for content in broken.values():
        path.write_bytes(content)
        with pytest.raises(error, match="make it again") as caught:
            load_tensors(path, error)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

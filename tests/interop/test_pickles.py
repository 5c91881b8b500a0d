"""The inert pickle reader: what it reads, and that everything else is refused without harm."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import os
import pickle
import struct
import subprocess
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftType

from tests.waiting import LIMIT
from v2l_fast.errors import CheckpointError
from v2l_fast.interop.pickles import MAX_STEPS, Record, quote, read_pickle


def read(program: bytes) -> Any:
    return read_pickle(io.BytesIO(program), "x.pt")[0]


def refused(program: bytes) -> str:
    """The message of a refusal: one printable line, after a bounded amount of work."""
    start = time.thread_time()
    with pytest.raises(CheckpointError) as error:
        read(program)
    assert time.thread_time() - start < LIMIT
    message = str(error.value)
    assert message.startswith("x.pt: ") and message.isprintable() and len(message) < 400
    return message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_plain_data(protocol: int) -> None:
    value = {
        "text": "ü\n",
        "number": [0, 255, 70000, -1, 1 << 40, 2.5, True, None],
        "set": {"a", "b"},
        "frozen": frozenset([1]),
        "nested": ({}, [()], (1, 2, 3, 4)),
        "range": range(1, 7, 2),
    }
    assert read(pickle.dumps(value, protocol)) == value


def test_reads_known_names_as_data() -> None:
    value = [OrderedDict(a=1), torch.Size([2, 3]), PeftType.LORA, torch.device("cuda", 1)]
    assert read(pickle.dumps(value, 2)) == [{"a": 1}, (2, 3), "LORA", "cuda:1"]
    record = b"\x80\x02cpeft.tuners.lora.config\nLoraConfig\n)\x81}X\x01\x00\x00\x00rK\x04sb."
    assert read(record) == Record("peft.tuners.lora.config.LoraConfig", {"r": 4})


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch PWNED",)),
        (builtins.exec, ("open('PWNED', 'w')",)),
        (builtins.eval, ("open('PWNED', 'w')",)),
        (builtins.getattr, ("text", "upper")),
        (subprocess.Popen, ("touch PWNED",)),
        (importlib.import_module, ("antigravity",)),
        (functools.partial, (print,)),
        (bytearray, (1 << 40,)),
        (torch.Tensor, (1 << 40,)),
        (torch.load, ("x",)),
    ],
    ids=lambda call: call[0].__name__,
)
def test_refuses_other_names(
    call: tuple, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, arguments = call

    class Payload:
        def __reduce__(self) -> tuple:
            return function, arguments

    message = refused(pickle.dumps({"weights": [Payload()]}, protocol))
    assert function.__name__ in message and "nothing was executed" in message
    assert not list(tmp_path.iterdir())


def test_state_and_slots_change_nothing() -> None:
    """BUILD on a class or function could rewrite it; here both are names."""
    for name in (b"ccollections\nOrderedDict\n", b"cpeft.tuners.lora.config\nLoraConfig\n"):
        refused(b"\x80\x02" + name + b"N}X\x01\x00\x00\x00xK\x01s\x86b.")
        refused(b"\x80\x02" + name + b"}X\x08\x00\x00\x00__init__K\x01sb.")


BOMBS = {
    "claimed bytes": b"\x80\x04B" + struct.pack("<I", 1 << 31) + b"x",
    "claimed text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x",
    "many steps": b"\x80\x02N" + b"q\x00" * MAX_STEPS + b".",
    # t = (t, t) forty times, then as a key: hashing would take 2**40 steps.
    "hash": b"\x80\x02}Nq\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"Ns.",
    "copies": b"\x80\x02](" + b"N" * 5000 + b"eq\x00"
    b"c__builtin__\ntuple\nq\x01" + b"h\x01h\x00\x85R" * 1000 + b".",
    "huge number": b"\x80\x02}" + b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b"NR.",
    "extension": b"\x80\x02\x82\x01.",
    "instance": b"(ios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\no.",
    "no stop": b"\x80\x02N",
    "pop": b"\x80\x02NN0.",
    "empty stack": b"\x80\x02R.",
    "unmarked": b"\x80\x02Nt.",
    "two results": b"\x80\x02NN.",
    "no memo": b"\x80\x02h\x07.",
    "name of no text": b"\x80\x04NN\x93.",
    "call of data": b"\x80\x02N)R.",
    "unpaired": b"\x80\x02}(Nu.",
    "append to text": b"\x80\x02X\x01\x00\x00\x00aNa.",
    "persistent": b"\x80\x02NQ.",
    "newline in name": b"\x80\x04\x8c\x02a\n\x8c\x03\x1b[H\x93.",
}


@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS.keys())
def test_refuses_bombs_and_nonsense(program: bytes) -> None:
    refused(program)


def test_what_harms_other_readers_is_harmless() -> None:
    """A memo index that pickle.Unpickler would allocate up to, and deep nesting."""
    assert read(b"\x80\x02K\x07r" + b"\xff" * 4 + b".") == 7
    value = read(b"\x80\x02N" + b"\x85" * 200_000 + b".")
    assert type(value) is tuple


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
)


def tensor_program(offset: int, shape: tuple, stride: tuple, storage: bytes = STORAGE) -> bytes:
    parts = b"".join(pickle.dumps(p, 2)[2:-1] for p in (offset, shape, stride))
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + parts + b"\x89NtR."


def test_reads_tensors_as_references() -> None:
    ref = read(tensor_program(1, (2, 2), (2, 1)))
    assert (ref.shape, ref.stride, ref.offset) == ((2, 2), (2, 1), 1)
    assert (ref.storage.numel, ref.storage.dtype) == (6, torch.float32)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (1 << 20, 1 << 20, 4), (0, 0, 0)),
        (0, (3, 3), (1, 1)),
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (3,), (3,)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (0, (1 << 62, 1 << 62), (1, 1)),
        (0, (True,), (1,)),
        (0, (1,) * 9, (1,) * 9),
        (0, [2], (1,)),
    ],
)
def test_refuses_tensors_outside_their_storage(offset: int, shape: tuple, stride: tuple) -> None:
    refused(tensor_program(offset, shape, stride))


def test_refuses_odd_storages() -> None:
    for old, new in (
        (b"storage", b"modules"),
        (b"FloatStorage", b"Size"),
        (b"K\x06", b"N"),
        (b"K\x06", b"J\xff\xff\xff\xff"),
        (b"X\x01\x00\x00\x000", b"N"),
        (b"K\x06", b"K\x06K\x01"),
    ):
        refused(tensor_program(0, (2,), (1,), STORAGE.replace(old, new)))
    twice = STORAGE + STORAGE.replace(b"K\x06", b"K\x07") + b"\x86."
    assert "two ways" in refused(b"\x80\x02" + twice)


def test_quote_is_one_short_line() -> None:
    assert quote("a\nb\x1b") == r"'a\nb\x1b'"
    assert quote(10**6000) == "an integer of more than 64 bits"
    assert len(quote("x" * 10**6)) <= 120 and quote([[]]) == "a list"


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(st.tuples(st.integers(0, 11_749), st.integers(0, 255)), max_size=8))
def test_damaged_programs_are_read_or_refused(data: Path, edits: list[tuple[int, int]]) -> None:
    with zipfile.ZipFile(data / "nano.pt") as archive:
        program = bytearray(archive.read("nano/data.pkl"))
    for place, value in edits:
        program[place] = value
    try:
        read(bytes(program))
    except CheckpointError as error:
        assert str(error).isprintable()

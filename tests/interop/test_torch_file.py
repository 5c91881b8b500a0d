"""Files of torch.save: whole ones are read, and all others are refused without harm."""

from __future__ import annotations

import builtins
import copy
import functools
import importlib
import os
import pickle
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftType

from tests.waiting import LIMIT
from v2l_fast.errors import CheckpointError
from v2l_fast.interop.frames2lora import MAX_STEPS, Record, load_torch_file


def refused(path: Path) -> str:
    """The message of a refusal: one printable line, after a bounded amount of work."""
    start = time.thread_time()
    with pytest.raises(CheckpointError) as error:
        load_torch_file(path)
    assert time.thread_time() - start < LIMIT
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 600
    return message


def rewrite(
    source: Path,
    target: Path,
    edit: Callable[[str, bytes], bytes | None],
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Copy a zip archive through ``edit(record, content)``; None drops the record."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = edit(name.split("/", 1)[1], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


@pytest.fixture
def with_program(data: Path, tmp_path: Path) -> Callable[[bytes], Path]:
    """``with_program(pickle)``: the path of a whole checkpoint with that pickle."""
    return lambda program: rewrite(
        data / "nano.pt",
        tmp_path / "x.pt",
        lambda name, content: program if name == "data.pkl" else content,
    )


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    saved = {
        "plain": base,
        "transposed": base.mT,
        "slice": base[1, :, 1:3],
        "parameter": torch.nn.Parameter(base.clone(), requires_grad=False),
        "scalar": base[1, 1, 1],
        "empty": base[:0],
        "none": torch.empty(0, dtype=dtype),
    }
    path = tmp_path / "x.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    loaded = load_torch_file(path)
    assert loaded.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(loaded[key], tensor) and loaded[key].dtype == dtype


def test_plain_data(tmp_path: Path) -> None:
    value = {
        "text": "ü\n",
        "numbers": [0, 255, 70000, -1, 1 << 40, 2.5, True, None],
        "sets": ({"a", "b"}, frozenset([1])),
        "nested": ({}, [()], (1, 2, 3, 4)),
        "range": range(1, 7, 2),
        "torch": (torch.Size([2, 3]), torch.device("cuda", 1), torch.bfloat16),
    }
    torch.save({**value, "enum": PeftType.LORA}, tmp_path / "x.pt")
    assert load_torch_file(tmp_path / "x.pt") == {**value, "enum": "LORA"}


def test_configurations_are_records(with_program: Callable) -> None:
    program = b"\x80\x02cpeft.tuners.lora.config\nLoraConfig\n)\x81}X\x01\x00\x00\x00rK\x04sb."
    record = load_torch_file(with_program(program))
    assert type(record) is Record and vars(record) == {"r": 4}


# --- what is refused: programs --------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
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
        (pickle.loads, (b"",)),
        (bytearray, (1 << 40,)),
        (torch.Tensor, (1 << 40,)),
        (torch.load, ("x",)),
    ],
    ids=lambda call: call[0].__name__ if isinstance(call, tuple) else None,
)
def test_other_names(
    call: tuple, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, arguments = call

    class Payload:
        def __reduce__(self) -> tuple:
            return function, arguments

    path = tmp_path / "x.pt"
    for protocol in (2, 4):
        torch.save(
            {"weights": [Payload()]},
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
        message = refused(path)
        assert "nothing was executed" in message
        assert protocol > 2 or function.__name__ in message
        assert [f.name for f in tmp_path.iterdir()] == ["x.pt"]


BOMBS = {
    "claimed bytes": b"\x80\x02T" + struct.pack("<I", 1 << 31) + b"x",
    "claimed text": b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"x",
    "many steps": b"\x80\x02N" + b"q\x00" * MAX_STEPS + b".",
    # t = (t, t) forty times, then as a key: hashing would take 2**40 steps.
    "hash": b"\x80\x02}Nq\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"Ns.",
    "hash of a renamed tuple": b"\x80\x02}Nq\x00"
    + b"h\x00h\x00\x86\x80\x02q\x01q\x00" * 40
    + b"Ns.",
    "huge number": b"\x80\x02}" + b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b"NR.",
    "extension": b"\x80\x02\x82\x01.",
    "instance": b"(ios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\no.",
    "no stop": b"\x80\x02N",
    "pop": b"\x80\x02NN0.",
    "empty stack": b"\x80\x02R.",
    "unmarked": b"\x80\x02Nt.",
    "no memo": b"\x80\x02h\x07.",
    "name on the stack": b"\x80\x04NN\x93.",
    "call of data": b"\x80\x02N)R.",
    "append to text": b"\x80\x02X\x01\x00\x00\x00aNa.",
    "persistent": b"\x80\x02NQ.",
    "newline in name": b"\x80\x04\x8c\x02a\n\x8c\x03\x1b[H\x93.",
    "state of a class": b"\x80\x02cpeft.tuners.lora.config\nLoraConfig\n"
    b"}X\x08\x00\x00\x00__init__K\x01sb.",
    "slots of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor\n"
    b"N}X\x01\x00\x00\x00xK\x01s\x86b.",
    "enum of a tuple": b"\x80\x02cpeft.utils.peft_types\nPeftType\n)\x85R.",
}


@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_and_nonsense(program: bytes, with_program: Callable) -> None:
    refused(with_program(program))


def test_what_harms_other_readers_is_harmless(with_program: Callable) -> None:
    """A memo index that pickle.Unpickler would allocate up to, and deep nesting."""
    assert load_torch_file(with_program(b"\x80\x02K\x07r" + b"\xff" * 4 + b".")) == 7
    value = load_torch_file(with_program(b"\x80\x02N" + b"\x85" * 200_000 + b"."))
    assert type(value) is tuple


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuM\x00\x04tQ"
)


def tensor_program(offset: int, shape: tuple, stride: tuple, storage: bytes = STORAGE) -> bytes:
    parts = b"".join(pickle.dumps(p, 2)[2:-1] for p in (offset, shape, stride))
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + parts + b"\x89" + hooks + b"tR."
    )


def test_tensor_program(with_program: Callable) -> None:
    """The first storage of the file holds 1,024 numbers."""
    tensor = load_torch_file(with_program(tensor_program(1, (2, 2), (2, 1))))
    assert (tensor.shape, tensor.stride(), tensor.storage_offset()) == ((2, 2), (2, 1), 1)
    assert tensor.untyped_storage().nbytes() == 4096


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (33, 33), (32, 1)),
        (0, (1025,), (1,)),
        (1, (1024,), (1,)),
        (0, (513,), (2,)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (0, (1 << 62, 1 << 62), (1, 1)),
    ],
)
def test_tensors_outside_their_storage(
    offset: int, shape: tuple, stride: tuple, with_program: Callable
) -> None:
    refused(with_program(tensor_program(offset, shape, stride)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"storage", b"modules"),
        (b"FloatStorage", b"Size"),
        (b"FloatStorage", b"UntypedStorage"),
        (b"M\x00\x04", b"N"),
        (b"M\x00\x04", b"J\xff\xff\xff\xff"),
        (b"M\x00\x04", b"J\xff\xff\xff\x7f"),
        (b"M\x00\x04", b"M\x01\x04"),
        (b"X\x01\x00\x00\x000", b"N"),
        (b"M\x00\x04", b"M\x00\x04K\x01"),
    ],
)
def test_odd_storages(old: bytes, new: bytes, with_program: Callable) -> None:
    refused(with_program(tensor_program(0, (2,), (1,), STORAGE.replace(old, new))))


# --- what is refused: containers ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nano.pt", "nano_legacy_format.pt"])
def test_truncation_anywhere(data: Path, tmp_path: Path, name: str) -> None:
    content = (data / name).read_bytes()
    path = tmp_path / "cut.pt"
    for share in (0.0001, 0.01, 0.05, 0.3, 0.9, 0.99999):
        path.write_bytes(content[: int(len(content) * share) + 1])
        refused(path)


def test_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    assert "no such file" in refused(path)
    assert "not a regular file" in refused(tmp_path)
    for content, text in (
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "truncated"),
        (bytes(range(256)) * 8, "not a file that torch.save wrote"),
        (b"\x80\x02K\x01.", "truncated"),
        (b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00x\x85R.", "posix.system"),
    ):
        path.write_bytes(content)
        assert text in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "hello")
    assert "not one that torch.save wrote" in refused(path)


@pytest.mark.parametrize(
    ("record", "change", "text"),
    [
        ("data/0", lambda old: None, "truncated"),
        ("data/0", lambda old: old[:-4], "truncated"),
        ("byteorder", lambda old: b"big", "byte order"),
        ("byteorder", lambda old: b"little" * 9, "byte order"),
        ("data.pkl", lambda old: bytes(9 << 20), "too large"),
    ],
)
def test_lying_zip(data: Path, tmp_path: Path, record: str, change: Callable, text: str) -> None:
    path = rewrite(
        data / "nano.pt",
        tmp_path / "x.pt",
        lambda name, old: change(old) if name == record else old,
    )
    assert text in refused(path)


def test_compressed_records(data: Path, tmp_path: Path) -> None:
    path = rewrite(data / "nano.pt", tmp_path / "x.pt", lambda name, old: old, zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)


@pytest.mark.parametrize("name", ["nano/../../evil", "/etc/evil", "other/data/0"])
def test_records_elsewhere(data: Path, tmp_path: Path, name: str) -> None:
    path = rewrite(data / "nano.pt", tmp_path / "x.pt", lambda name, old: old)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    assert "evil" in refused(path) or "other" in refused(path)
    assert [f.name for f in tmp_path.iterdir()] == ["x.pt"]


def test_records_of_one_name(data: Path, tmp_path: Path) -> None:
    path = rewrite(data / "nano.pt", tmp_path / "x.pt", lambda name, old: old)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("nano/data/0", bytes(4096))
    assert "share a name" in refused(path)


def test_flipped_bit(data: Path, tmp_path: Path) -> None:
    content = bytearray((data / "nano.pt").read_bytes())
    with zipfile.ZipFile(data / "nano.pt") as archive:
        info = archive.getinfo("nano/data/0")
        content[info.header_offset + 30 + 2048] ^= 1
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert "corrupt" in refused(path)


def test_claims_beyond_the_file(tmp_path: Path) -> None:
    """Storages that each have a record of their size, but all of them the same record."""
    path, lying = tmp_path / "x.pt", tmp_path / "lying.pt"
    torch.save([torch.full((50_000,), float(i)) for i in range(20)], path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(lying, "w") as new:
        for name in ("x/data.pkl", "x/byteorder", "x/data/0"):
            new.writestr(name, old.read(name))
        for index in range(1, 20):
            info = copy.copy(new.getinfo("x/data/0"))
            info.filename = f"x/data/{index}"
            new.filelist.append(info)
    assert "bytes" in refused(lying)


def test_huge_directory(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    size = 64 << 20
    with open(path, "wb") as handle:
        handle.write(b"PK\x03\x04")
        handle.truncate(size)
        handle.seek(size)
        handle.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, size, 0, 0))
    assert "truncated or corrupt" in refused(path)


def test_legacy_storage_list_must_match(data: Path, tmp_path: Path) -> None:
    content = (data / "nano_legacy_format.pt").read_bytes()
    path = tmp_path / "x.pt"
    start = content.rindex(b"\x80\x02]q\x00")
    for other in (b"\x80\x02].", b"\x80\x02}."):
        path.write_bytes(content[:start] + other + content[start:])
        assert "list of storages" in refused(path)

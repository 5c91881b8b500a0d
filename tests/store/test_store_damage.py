"""Damaged, foreign and exchanged files in a store do not affect other adapters."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.store.test_adapter_store import SETTINGS, random_adapter, served
from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.store.adapter_store import AdapterStore, StoreError, content_id


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:-9] + b"\xff" * 9,
        lambda data: b"",
        lambda data: b"\xff" * len(data),
        lambda data: data.replace(b"bias", b"bigs"),
        lambda data: data.replace(b'\\"rules 1\\"', b'\\"rules 2\\"'),
    ],
)
def test_a_damaged_file_is_never_served(store, damage):
    sound, broken = store.put(random_adapter(0)), store.put(random_adapter(1))
    path = store.file(broken)
    data = damage(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    other = AdapterStore(store.folder)
    for one in (store, other):
        with pytest.raises(AdapterError, match=f"{broken}"):
            one.get(broken)
        assert [r.id for r in one.list()] == [sound]
    assert len(list((store.folder / "corrupt").iterdir())) == 1
    # Internalizing again heals it.
    assert store.put(random_adapter(1)) == broken
    assert torch.equal(other.get(broken).A["down_proj"], random_adapter(1).A["down_proj"])


def test_a_foreign_file_is_left_alone(store):
    stored = store.put(random_adapter(0))
    (store.folder / "adapters" / "README.txt").write_text("mine")
    (store.folder / "adapters" / "x.safetensors").write_text("mine")
    assert [r.id for r in AdapterStore(store.folder).list()] == [stored]
    assert len(served(store.folder)) == 3


def test_an_adapter_under_another_name_is_refused(store):
    first, second = store.put(random_adapter(0)), store.put(random_adapter(1))
    os.replace(store.file(first), store.file(second))
    with pytest.raises(AdapterError, match="does not match its name"):
        store.get(second)


def test_out_of_descriptors_is_not_damage(store, monkeypatch):
    stored = store.put(random_adapter(0))

    def refuse(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("v2l_fast.files.os.open", refuse)
    for read in (store.get, store.open):
        with pytest.raises(StoreError, match="Too many open files"):
            read(stored)
    monkeypatch.undo()
    assert store.get(stored).rank == 4


# --- a folder that others write to --------------------------------------------------------------

ID = "0123456789abcdef" * 2


def stranger(record: object = None, tensors: dict | None = None, **provenance: object) -> bytes:
    """An adapter file with any content."""
    tensors = tensors or {"m.lora_A": torch.ones(2, 3, 4), "m.lora_B": torch.ones(2, 3, 5)}
    if record is None:
        record = {"version": 1, "scale": 1.0, "bias_id": None, "provenance": provenance}
    return save(tensors, {"v2l_adapter": record if isinstance(record, str) else json.dumps(record)})


def deep(levels: int) -> str:
    return '{"version": 1, "provenance": ' + '{"a":' * levels + "1" + "}" * (levels + 1)


def many_tensors() -> bytes:
    entry = '"%d.lora_A":{"dtype":"F32","shape":[1,0,1],"data_offsets":[0,0]}'
    header = "{" + ",".join(entry % i for i in range(100_000)) + "}"
    return len(header).to_bytes(8, "little") + header.encode()


BAD_FILES = {
    "deep JSON": lambda: stranger(deep(100_000)),
    "deep JSON that Python reads": lambda: stranger(deep(500)),
    "giant number": lambda: stranger('{"version": ' + "1" * 5000 + "}"),
    "not JSON": lambda: stranger("{"),
    "a list": lambda: stranger("[]"),
    "duration is text": lambda: stranger(source={"duration": "long"}),
    "duration is true": lambda: stranger(source={"duration": True}),
    "duration is infinite": lambda: stranger(source={"duration": float("inf")}),
    "name is a list": lambda: stranger(source={"name": ["a"]}),
    "name is an object": lambda: stranger(source={"name": {}}),
    "name is a number": lambda: stranger(source={"name": 3}),
    "long name": lambda: stranger(source={"name": "x" * 1_000_000}),
    "surrogate in the name": lambda: stranger(source={"name": "\ud800"}),
    "source is a list": lambda: stranger(source=[1]),
    "source is text": lambda: stranger(source="x"),
    "frames are a number": lambda: stranger(source={"frame_indices": 3}),
    "frames are text": lambda: stranger(source={"frame_indices": ["a"]}),
    "sha256 is a path": lambda: stranger(source={"sha256": "../../etc/passwd"}),
    "hypernetwork is a list": lambda: stranger(hypernetwork=[]),
    "edge is giant": lambda: stranger(preprocessing={"longest_edge": 10**9}),
    "chunks are text": lambda: stranger(chunks="abc"),
    "a chunk is wrong": lambda: stranger(chunks=[{"source": {"duration": "x"}}]),
    "provenance is a list": lambda: stranger({"version": 1, "scale": 1.0, "provenance": []}),
    "scale is text": lambda: stranger({"version": 1, "scale": "1.0", "provenance": {}}),
    "scale is NaN": lambda: stranger({"version": 1, "scale": float("nan"), "provenance": {}}),
    "float8": lambda: stranger(
        tensors={
            "m.lora_A": torch.ones(2, 3, 4).to(torch.float8_e4m3fn),
            "m.lora_B": torch.ones(2, 3, 5).to(torch.float8_e4m3fn),
        }
    ),
    "complex": lambda: stranger(
        tensors={
            "m.lora_A": torch.ones(2, 3, 4, dtype=torch.complex64),
            "m.lora_B": torch.ones(2, 3, 5, dtype=torch.complex64),
        }
    ),
    "flat": lambda: stranger(tensors={"m.lora_A": torch.ones(4), "m.lora_B": torch.ones(4)}),
    "no A": lambda: stranger(tensors={"m.lora_B": torch.ones(2, 3, 4)}),
    "billions of layers": lambda: stranger(
        tensors={"m.lora_A": torch.ones(2**40, 0, 4), "m.lora_B": torch.ones(2**40, 0, 4)}
    ),
    "another's model": lambda: save({"x": torch.ones(3)}),
    "many tensors": many_tensors,
    "empty": lambda: b"",
    "text": lambda: b"root:x:0:0:root:/root:/bin/sh\n" * 50,
    "huge header": lambda: (2**62).to_bytes(8, "little") + b"x" * 100,
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_does_not_affect_others(store, kind, caplog):
    sound = store.put(random_adapter(0))
    path = store.folder / "adapters" / f"{ID}.safetensors"
    path.write_bytes(BAD_FILES[kind]())
    for one in (store, AdapterStore(store.folder)):
        for _ in range(3):
            assert [record.id for record in one.list()] == [sound]
        assert one.find(f"{0:064x}", SETTINGS) == sound
        assert one.get(sound).rank == 4
        with pytest.raises(AdapterError, match="no adapter"):
            one.get(ID)
        with pytest.raises(AdapterError, match="no adapter"):
            one.describe(ID)
        assert ID not in one
    # It is moved away with one log line that names it and the reason.
    (line,) = [r.getMessage() for r in caplog.records if ID in r.getMessage()]
    assert str(path) in line and len(line) < 2000 and line.isprintable()
    (aside,) = (store.folder / "corrupt").iterdir()
    assert aside.name.startswith(ID)


def put_special(kind: str, path: Path, elsewhere: Path, other: Path) -> None:
    """Put something other than a regular file at ``path``."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    elif kind == "link to a secret":
        elsewhere.write_text("secret")
        path.symlink_to(elsewhere)
    elif kind == "link to an adapter elsewhere":
        random_adapter(3).save(elsewhere)
        path.symlink_to(elsewhere)
    elif kind == "link to another adapter":
        path.symlink_to(other)
    elif kind == "link to nothing":
        path.symlink_to(elsewhere)
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "kind",
    ["pipe", "folder", "socket", "link to a secret", "link to an adapter elsewhere",
     "link to another adapter", "link to nothing", "link to itself", "link to a device"],
)  # fmt: skip
def test_only_regular_files_are_adapters(store, tmp_path, kind, caplog):
    sound = store.put(random_adapter(0))
    # Even under the id of its content.
    name = content_id(random_adapter(3)) if kind == "link to an adapter elsewhere" else ID
    path = store.folder / "adapters" / f"{name}.safetensors"
    put_special(kind, path, tmp_path / "elsewhere", store.file(sound))
    for one in (store, AdapterStore(store.folder)):
        for _ in range(3):
            assert [record.id for record in one.list()] == [sound]
        assert name not in one and sound in one
        for read in (one.get, one.open):
            with pytest.raises(AdapterError, match="not a regular file"):
                read(name)
    lines = [r.getMessage() for r in caplog.records if name in r.getMessage()]
    assert len(lines) == 2 and all("not a regular file" in line for line in lines)
    assert os.path.lexists(path)
    assert not any((store.folder / "corrupt").iterdir())


@pytest.mark.parametrize("how", ["renamed over", "copied over", "linked over", "cut", "changed"])
def test_a_file_replaced_while_running_is_never_another_adapter(store, how, caplog):
    first, second = store.put(random_adapter(0)), store.put(random_adapter(1))
    with store.open(first) as handle:
        whole = handle.read()
    path, other = store.file(first), store.file(second)
    if how == "renamed over":
        shutil.copy(other, store.folder / "copy")
        os.replace(store.folder / "copy", path)
    elif how == "copied over":
        # In place: the same inode, and the times of another.
        shutil.copy2(other, path)
    elif how == "linked over":
        path.unlink()
        os.link(other, path)
    elif how == "cut":
        os.truncate(path, 100)
    else:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AdapterError, match="does not match its name|not a whole|adapter"):
        store.open(first)
    assert first not in store and second in store
    assert [record.id for record in store.list()] == [second]
    assert sum(str(path) in r.getMessage() for r in caplog.records) == 1
    # Internalizing again heals it.
    assert store.put(random_adapter(0)) == first
    with store.open(first) as handle:
        assert torch.equal(
            Adapter.read(handle, "a").A["down_proj"], random_adapter(0).A["down_proj"]
        )


def test_a_record_never_describes_another_adapter(store):
    first, second = (
        store.put(random_adapter(0, name="a.mp4")),
        store.put(random_adapter(1, name="b.mp4")),
    )
    assert {r.name for r in store.list()} == {"a.mp4", "b.mp4"}
    shutil.copy(store.file(second), store.file(first))
    os.utime(store.file(first), (1, 1))
    os.utime(store.folder / "adapters")
    assert [(r.id, r.name) for r in store.list()] == [(second, "b.mp4")]


def test_a_file_is_verified_once(store, monkeypatch):
    stored = store.put(random_adapter(0))
    os.utime(store.file(stored), (1, 1))
    monkeypatch.setattr("v2l_fast.store.adapter_store.settled", lambda status: True)
    with store.open(stored) as handle:
        whole = handle.read()
    monkeypatch.setattr("v2l_fast.store.adapter_store.content_id", None)
    with store.open(stored) as handle:
        assert handle.read() == whole
    os.utime(store.file(stored), (2, 2))
    with pytest.raises(TypeError):
        store.open(stored)


def test_an_open_file_stays_the_adapter(store):
    stored = store.put(random_adapter(0))
    with store.open(stored) as handle:
        shutil.copy(store.file(stored), store.folder / "copy")
        store.delete(stored)
        assert handle.read() == (store.folder / "copy").read_bytes()


def test_a_file_that_may_not_be_read(store, monkeypatch, caplog):
    """Refused by a patched open: permissions do not apply to root."""
    sound, closed = store.put(random_adapter(0)), store.put(random_adapter(1))
    opened = os.open

    def refuse(path, *args, **kwargs):
        if closed in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    (store.folder / "index.jsonl").unlink()
    monkeypatch.setattr("v2l_fast.files.os.open", refuse)
    other = AdapterStore(store.folder)
    for _ in range(3):
        assert [record.id for record in other.list()] == [sound]
    (line,) = [r.getMessage() for r in caplog.records if closed in r.getMessage()]
    assert "Permission denied" in line
    with pytest.raises(StoreError, match="Permission denied"):
        other.get(closed)


def test_a_temporary_failure_is_not_remembered(store, monkeypatch, caplog):
    stored = store.put(random_adapter(0))
    (store.folder / "index.jsonl").unlink()
    opened = os.open

    def refuse(path, *args, **kwargs):
        if stored in os.fspath(path):
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("v2l_fast.files.os.open", refuse)
        other = AdapterStore(store.folder)
        for _ in range(20):
            assert other.list() == []
    assert sum(stored in r.getMessage() for r in caplog.records) == 1
    assert [record.id for record in other.list()] == [stored]


@pytest.mark.parametrize("name", ["index.jsonl", "lock"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a secret"])
def test_special_files_in_place_of_the_index_and_lock(store, tmp_path, name, kind):
    sound = store.put(random_adapter(0))
    store.close()
    (store.folder / name).unlink()
    put_special(kind, store.folder / name, tmp_path / "elsewhere", store.file(sound))
    if name == "lock":
        other = AdapterStore(store.folder)
        assert [record.id for record in other.list()] == [sound]
        with contextlib.suppress(StoreError):
            other.put(random_adapter(1))
    else:
        other = AdapterStore(store.folder)
        new = other.put(random_adapter(1))
        assert {r.id for r in AdapterStore(store.folder).list()} == {sound, new}
    if kind == "link to a secret":
        assert (tmp_path / "elsewhere").read_text() == "secret"


@pytest.mark.parametrize(
    "change",
    [
        {"duration": "long"},
        {"name": ["a"]},
        {"bytes": "1"},
        {"bytes": True},
        {"created": "now"},
        {"rank": 1.5},
        {"frames": []},
        {"video": {}},
        {"hypernetwork": 3},
        {"id": ["x"]},
        {"extra": 1},
    ],
    ids=str,
)
def test_an_index_with_values_of_other_types(store, change):
    store.put(random_adapter(0))
    before = store.list()
    index = store.folder / "index.jsonl"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}) + "\n")
    assert AdapterStore(store.folder).list() == before


@pytest.mark.parametrize(
    "content",
    [b"[" * 50_000, b"1" * 5000, b"\xff\xfe", b"\0" * 1_000_000, b"{}\n" * 100_000],
    ids=["deep", "giant number", "not UTF-8", "one long line", "many lines"],
)
def test_an_index_of_something_else(store, content):
    store.put(random_adapter(0))
    before = store.list()
    (store.folder / "index.jsonl").write_bytes(content)
    for _ in range(2):
        assert AdapterStore(store.folder).list() == before

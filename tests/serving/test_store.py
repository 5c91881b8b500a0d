"""The adapter store: what is put is there, whole, whatever happens to the process or the disk."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from v2l_fast.adapter import Adapter
from v2l_fast.errors import AdapterError
from v2l_fast.serving.settings import InternalizeSettings
from v2l_fast.serving.store import AdapterStore, StoreError, content_id
from v2l_fast.video import sample_indices

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.serving.test_store"])
SETTINGS = InternalizeSettings("hyper", "rules 1", "remember", 64, 4, 1.0, False)


def made(seed: int, size: int = 48, video: str | None = None, name: str = "a.mp4") -> Adapter:
    """A random adapter as internalizing 10 seconds at 5 frames/s with SETTINGS gives it."""
    generator = torch.Generator().manual_seed(seed)
    indices = sample_indices(50, 5.0, 10.0, SETTINGS.max_frames, SETTINGS.target_fps)
    return Adapter(
        {"down_proj": torch.randn(3, 4, size, generator=generator)},
        {"down_proj": torch.randn(3, 4, 32, generator=generator).bfloat16()},
        16.0,
        None,
        "bias",
        {
            "source": {
                "name": name,
                "sha256": video or f"{seed:064x}",
                "frame_indices": indices.tolist(),
                "fps": 5.0,
                "duration": 10.0,
                "num_frames": 50,
            },
            "preprocessing": {
                "version": SETTINGS.version,
                "longest_edge": SETTINGS.longest_edge,
                "exact_frames": SETTINGS.exact_frames,
                "instruction": SETTINGS.instruction,
            },
            "hypernetwork": SETTINGS.hypernetwork,
        },
    )


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def served(folder: Path) -> list[Path]:
    return sorted((folder / "adapters").iterdir())


def test_what_is_put_is_got(store):
    adapter = made(0)
    stored = store.put(adapter)
    back = store.get(stored)
    assert torch.equal(back.A["down_proj"], adapter.A["down_proj"])
    assert torch.equal(back.B["down_proj"], adapter.B["down_proj"])
    assert (back.scale, back.bias_id) == (adapter.scale, adapter.bias_id)
    assert dict(back.provenance) == dict(adapter.provenance)
    assert stored in store and store.list()[0].id == stored


def test_the_id_is_the_content(store):
    first, again = store.put(made(0)), store.put(made(0))
    renamed = store.put(made(0, name="other.mp4"))
    assert first == again == renamed and len(store.list()) == 1
    assert store.put(made(1)) != first
    half = made(0).to(dtype=torch.float16)
    assert content_id(half) != first


def test_what_the_index_knows(store):
    # The clock of a file's times may be some milliseconds behind.
    begun = time.time() - 1
    stored = store.put(made(5))
    (record,) = store.list()
    assert record == store.describe(stored)
    assert (record.name, record.video, record.frames) == ("a.mp4", f"{5:064x}", 4)
    assert (record.rank, record.duration, record.hypernetwork) == (4, 10.0, "hyper")
    assert record.bytes == served(store.folder)[0].stat().st_size
    assert begun <= record.created <= time.time()


def test_deleted_is_gone(store):
    stored = store.put(made(0))
    other = AdapterStore(store.folder)
    store.delete(stored)
    for one in (store, other):
        assert stored not in one and one.list() == []
        with pytest.raises(AdapterError, match="no adapter"):
            one.get(stored)
        with pytest.raises(AdapterError, match="no adapter"):
            one.delete(stored)


@pytest.mark.parametrize(
    "bad", ["", "../../etc/passwd", "a" * 31, "A" * 32, "a" * 32 + "\n", "a" * 31 + "/", "é" * 32]
)
def test_only_ids_are_ids(store, bad):
    (store.folder / "secret.safetensors").write_bytes(b"")
    assert bad not in store
    for call in (store.get, store.delete, store.describe, store.file):
        with pytest.raises(AdapterError, match="is no adapter id"):
            call(bad)


# --- finding a video's adapter ------------------------------------------------------------------


def test_find_knows_the_video_and_the_settings(store):
    video = "ab" * 32
    stored = store.put(made(0, video=video))
    assert store.find(video, SETTINGS) == stored
    assert store.find("cd" * 32, SETTINGS) is None
    for change in (
        {"hypernetwork": "other"},
        {"version": "rules 2"},
        {"instruction": "forget"},
        {"longest_edge": 32},
        {"max_frames": 3},
        {"exact_frames": True},
        {"target_fps": 0.2},
    ):
        other = InternalizeSettings(**{**vars(SETTINGS), **change})
        assert store.find(video, other) is None, change
    store.delete(stored)
    assert store.find(video, SETTINGS) is None


def test_limits_that_give_the_same_frames_are_the_same(store):
    # 10 s at one a second: no limit above 10 changes anything.
    adapter = made(0, video="ab" * 32)
    source = {**adapter.provenance["source"]}
    source["frame_indices"] = sample_indices(50, 5.0, 10.0, 12, 1.0).tolist()
    wide = Adapter(
        adapter.A, adapter.B, 16.0, None, "bias", {**adapter.provenance, "source": source}
    )
    stored = store.put(wide)
    for limit in (10, 12, 500):
        settings = InternalizeSettings(**{**vars(SETTINGS), "max_frames": limit})
        assert store.find("ab" * 32, settings) == stored


# --- the index ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index.unlink(),
        lambda index: index.write_text(""),
        lambda index: index.write_text(index.read_text()[:-20]),
        lambda index: index.write_bytes(b"\xff\x00{not json}\n[]\n3\n" + index.read_bytes()),
        lambda index: index.write_text('{"id": "' + "0" * 32 + '"}\n' * 3),
        lambda index: index.write_text(index.read_text() * 100),
    ],
)
def test_the_index_is_made_anew(store, damage):
    ids = {store.put(made(i)) for i in range(3)}
    before = store.list()
    damage(store.folder / "index.jsonl")
    after = AdapterStore(store.folder)
    assert after.list() == before and {r.id for r in before} == ids
    # And another start reads no file.
    assert index_alone(store.folder) == ids


def test_a_stale_index_does_not_matter(store):
    gone, kept = store.put(made(0)), store.put(made(1))
    index = (store.folder / "index.jsonl").read_text()
    store.file(gone).unlink()
    other = AdapterStore(store.folder)
    new = other.put(made(2))
    (store.folder / "index.jsonl").write_text(index)
    assert {r.id for r in AdapterStore(store.folder).list()} == {kept, new}
    assert {r.id for r in store.list()} == {kept, new}


def index_alone(folder: Path) -> set[str]:
    """Ids of a store that is opened while no adapter file can be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("v2l_fast.serving.index.read_record", None)
        return {r.id for r in AdapterStore(folder).list()}


def test_many_adapters_start_fast_from_the_index(store):
    ids = {store.put(made(seed)) for seed in range(20)}
    assert index_alone(store.folder) == ids


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
    sound, broken = store.put(made(0)), store.put(made(1))
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
    assert store.put(made(1)) == broken
    assert torch.equal(other.get(broken).A["down_proj"], made(1).A["down_proj"])


def test_a_foreign_file_is_left_alone(store):
    stored = store.put(made(0))
    (store.folder / "adapters" / "README.txt").write_text("mine")
    (store.folder / "adapters" / "x.safetensors").write_text("mine")
    assert [r.id for r in AdapterStore(store.folder).list()] == [stored]
    assert len(served(store.folder)) == 3


def test_an_adapter_under_another_name_is_refused(store):
    first, second = store.put(made(0)), store.put(made(1))
    os.replace(store.file(first), store.file(second))
    with pytest.raises(AdapterError, match="not what its name says"):
        store.get(second)


def test_out_of_descriptors_is_not_damage(store, monkeypatch):
    stored = store.put(made(0))

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
    """An adapter's file as anyone may write it."""
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
def test_a_bad_file_costs_only_itself(store, kind, caplog):
    sound = store.put(made(0))
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
    # It was moved away with one line that names it and the reason.
    (line,) = [r.getMessage() for r in caplog.records if ID in r.getMessage()]
    assert str(path) in line and len(line) < 2000 and line.isprintable()
    (aside,) = (store.folder / "corrupt").iterdir()
    assert aside.name.startswith(ID)


def put_special(kind: str, path: Path, elsewhere: Path, other: Path) -> None:
    """Something at ``path`` that is no file of the store's own."""
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
        made(3).save(elsewhere)
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
def test_only_files_of_the_store_are_adapters(store, tmp_path, kind, caplog):
    sound = store.put(made(0))
    # Even under the name that its content would have.
    name = content_id(made(3)) if kind == "link to an adapter elsewhere" else ID
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
    first, second = store.put(made(0)), store.put(made(1))
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
    with pytest.raises(AdapterError, match="not what its name says|not a whole|adapter"):
        store.open(first)
    assert first not in store and second in store
    assert [record.id for record in store.list()] == [second]
    assert sum(str(path) in r.getMessage() for r in caplog.records) == 1
    # Internalizing again heals it.
    assert store.put(made(0)) == first
    with store.open(first) as handle:
        assert torch.equal(Adapter.read(handle, "a").A["down_proj"], made(0).A["down_proj"])


def test_a_list_never_describes_an_adapter_by_another(store):
    first, second = store.put(made(0, name="a.mp4")), store.put(made(1, name="b.mp4"))
    assert {r.name for r in store.list()} == {"a.mp4", "b.mp4"}
    shutil.copy(store.file(second), store.file(first))
    os.utime(store.file(first), (1, 1))
    os.utime(store.folder / "adapters")
    assert [(r.id, r.name) for r in store.list()] == [(second, "b.mp4")]


def test_a_file_is_verified_once(store, monkeypatch):
    stored = store.put(made(0))
    os.utime(store.file(stored), (1, 1))
    monkeypatch.setattr("v2l_fast.serving.store.settled", lambda status: True)
    with store.open(stored) as handle:
        whole = handle.read()
    monkeypatch.setattr("v2l_fast.serving.store.content_id", None)
    with store.open(stored) as handle:
        assert handle.read() == whole
    os.utime(store.file(stored), (2, 2))
    with pytest.raises(TypeError):
        store.open(stored)


def test_an_open_file_stays_the_adapter(store):
    stored = store.put(made(0))
    with store.open(stored) as handle:
        shutil.copy(store.file(stored), store.folder / "copy")
        store.delete(stored)
        assert handle.read() == (store.folder / "copy").read_bytes()


def test_a_file_that_may_not_be_read(store, monkeypatch, caplog):
    """Permissions do not bind every user that runs the tests."""
    sound, closed = store.put(made(0)), store.put(made(1))
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


def test_a_passing_failure_is_not_remembered(store, monkeypatch, caplog):
    stored = store.put(made(0))
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
def test_what_is_in_place_of_the_stores_own_files(store, tmp_path, name, kind):
    sound = store.put(made(0))
    store.close()
    (store.folder / name).unlink()
    put_special(kind, store.folder / name, tmp_path / "elsewhere", store.file(sound))
    if name == "lock":
        other = AdapterStore(store.folder)
        assert [record.id for record in other.list()] == [sound]
        with contextlib.suppress(StoreError):
            other.put(made(1))
    else:
        other = AdapterStore(store.folder)
        new = other.put(made(1))
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
    store.put(made(0))
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
    store.put(made(0))
    before = store.list()
    (store.folder / "index.jsonl").write_bytes(content)
    for _ in range(2):
        assert AdapterStore(store.folder).list() == before


# --- the disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", ["v2l_fast.files.save_file", "os.fsync", "v2l_fast.serving.store.os.replace"]
)
def test_a_full_disk_leaves_nothing(store, monkeypatch, step):
    kept = store.put(made(0))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    with pytest.raises(StoreError, match="No space left on device.*free space"):
        store.put(made(1))
    monkeypatch.undo()
    assert [r.id for r in store.list()] == [kept] and len(served(store.folder)) == 1
    assert list(store.staging.folder.iterdir()) == []
    assert store.put(made(1)) in store


def fill(folder: Path) -> None:
    """The limit on a file's size is how a process without privileges runs out of space."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = AdapterStore(folder)
    store.put(made(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    with pytest.raises(StoreError, match="not stored"):
        store.put(made(1, size=1 << 16))
    assert len(store.list()) == 1 and not any(store.staging.folder.iterdir())


def test_a_disk_that_fills_while_writing(tmp_path):
    process = PROCESSES.Process(target=fill, args=(tmp_path / "store",))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(AdapterStore(tmp_path / "store").list()) == 1


# --- several at once ----------------------------------------------------------------------------


def test_threads_share_a_store(store):
    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(lambda i: store.put(made(i % 5)), range(40)))
    assert len(set(ids)) == 5 == len(store.list())
    assert list(store.staging.folder.iterdir()) == []


def write(folder: Path, log: Path, seeds: range, size: int) -> None:
    """What a writing process does: put adapters, note each id once it is promised to be there."""
    store = AdapterStore(folder)
    with open(log, "a", buffering=1) as reported:
        reported.write("ready\n")
        for seed in seeds:
            reported.write(store.put(made(seed, size=size)) + "\n")


def test_processes_share_a_store(store, tmp_path):
    """Two write overlapping halves while a third reads and lists."""
    log = tmp_path / "log"
    writers = [
        PROCESSES.Process(target=write, args=(store.folder, log, range(first, first + 30), 48))
        for first in (0, 15)
    ]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        for record in store.list():
            store.get(record.id)
    assert [process.exitcode for process in writers] == [0, 0]
    ids = set(log.read_text().split()) - {"ready"}
    assert len(ids) == 45 and {r.id for r in store.list()} == ids
    assert {r.id for r in AdapterStore(store.folder).list()} == ids
    assert not any((store.folder / "corrupt").iterdir())


def test_kill_at_any_moment(store, tmp_path):
    """What a killed process had reported as stored is there; nothing half-written is."""
    rng = random.Random(0)
    log = tmp_path / "log"
    for life in range(12):
        seeds = range(1000 * life, 1000 * life + 999)
        args = (store.folder, log, seeds, 1 << 12)
        process = PROCESSES.Process(target=write, args=args)
        process.start()
        # After some adapters, somewhere in the next ones.
        enough = log.read_text().count("\n") + life % 4 if log.exists() else 1
        while not log.exists() or log.read_text().count("\n") < enough:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    reported = set(log.read_text().split()) - {"ready"}
    after = AdapterStore(store.folder)
    stored = {r.id for r in after.list()}
    assert reported and reported <= stored
    # At most one of each life was complete and not yet reported.
    assert len(stored - reported) <= 12
    for adapter_id in stored:
        assert after.get(adapter_id).rank == 4
    assert not any((store.folder / "corrupt").iterdir())
    # What the dead left under construction is gone, what the living have is not.
    staging = {p.name for p in (store.folder / "staging").iterdir() if p.is_dir()}
    assert staging == {store.staging.folder.name, after.staging.folder.name}


def test_a_living_process_keeps_its_staging(store):
    part = store.staging.new_path()
    part.write_text("half an upload")
    for _ in range(3):
        AdapterStore(store.folder).close()
    assert part.read_text() == "half an upload"
    store.close()
    assert not part.exists()
    with contextlib.closing(AdapterStore(store.folder)) as last:
        assert [p.name for p in (store.folder / "staging").iterdir() if p.is_dir()] == [
            last.staging.folder.name
        ]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used"):
        AdapterStore(tmp_path / "file")

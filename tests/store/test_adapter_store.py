"""The adapter store keeps every adapter it has stored, whatever happens to the process or disk."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.store.adapter_store import AdapterStore, InternalizeSettings, StoreError, content_id
from v2l_fast.video import FrameSampling, sample_indices

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.store.test_adapter_store"])
SETTINGS = InternalizeSettings("hyper", "rules 1", "remember", FrameSampling(4, 64))


def random_adapter(
    seed: int, size: int = 48, video: str | None = None, name: str = "a.mp4"
) -> Adapter:
    """A random adapter with the provenance of 10 s at 5 frames/s internalized with SETTINGS."""
    generator = torch.Generator().manual_seed(seed)
    indices = SETTINGS.sampling.indices(50, 5.0, 10.0)
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
                "longest_edge": SETTINGS.sampling.longest_edge,
                "exact_frames": SETTINGS.sampling.exact_frames,
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


def test_put_and_get(store):
    adapter = random_adapter(0)
    stored = store.put(adapter)
    back = store.get(stored)
    assert torch.equal(back.A["down_proj"], adapter.A["down_proj"])
    assert torch.equal(back.B["down_proj"], adapter.B["down_proj"])
    assert (back.scale, back.bias_id) == (adapter.scale, adapter.bias_id)
    assert dict(back.provenance) == dict(adapter.provenance)
    assert stored in store and store.list()[0].id == stored


def test_the_id_is_the_content(store):
    first, again = store.put(random_adapter(0)), store.put(random_adapter(0))
    renamed = store.put(random_adapter(0, name="other.mp4"))
    assert first == again == renamed and len(store.list()) == 1
    assert store.put(random_adapter(1)) != first
    half = random_adapter(0).to(dtype=torch.float16)
    assert content_id(half) != first


def test_records(store):
    # The clock of file times may be a few milliseconds behind.
    begun = time.time() - 1
    stored = store.put(random_adapter(5))
    (record,) = store.list()
    assert record == store.describe(stored)
    assert (record.name, record.video, record.frames) == ("a.mp4", f"{5:064x}", 4)
    assert (record.rank, record.duration, record.hypernetwork) == (4, 10.0, "hyper")
    assert record.bytes == served(store.folder)[0].stat().st_size
    assert begun <= record.created <= time.time()


def test_deleting(store):
    stored = store.put(random_adapter(0))
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
def test_malformed_ids(store, bad):
    (store.folder / "secret.safetensors").write_bytes(b"")
    assert bad not in store
    for call in (store.get, store.delete, store.describe, store.file):
        with pytest.raises(AdapterError, match="invalid adapter id"):
            call(bad)


# --- finding a video's adapter ------------------------------------------------------------------


def test_find_by_video_and_settings(store):
    video = "ab" * 32
    stored = store.put(random_adapter(0, video=video))
    assert store.find(video, SETTINGS) == stored
    assert store.find("cd" * 32, SETTINGS) is None
    for change in (
        {"hypernetwork": "other"},
        {"version": "rules 2"},
        {"instruction": "forget"},
        {"sampling": FrameSampling(4, 32)},
        {"sampling": FrameSampling(3, 64)},
        {"sampling": FrameSampling(4, 64, exact_frames=True)},
        {"sampling": FrameSampling(4, 64, target_fps=0.2)},
    ):
        other = replace(SETTINGS, **change)
        assert store.find(video, other) is None, change
    store.delete(stored)
    assert store.find(video, SETTINGS) is None


def test_limits_that_select_the_same_frames_are_equivalent(store):
    # 10 s at one a second: no limit above 10 changes anything.
    adapter = random_adapter(0, video="ab" * 32)
    source = {**adapter.provenance["source"]}
    source["frame_indices"] = sample_indices(50, 5.0, 10.0, 12, 1.0).tolist()
    wide = Adapter(
        adapter.A, adapter.B, 16.0, None, "bias", {**adapter.provenance, "source": source}
    )
    stored = store.put(wide)
    for limit in (10, 12, 500):
        settings = replace(SETTINGS, sampling=FrameSampling(limit, 64))
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
def test_a_damaged_index_is_rebuilt(store, damage):
    ids = {store.put(random_adapter(i)) for i in range(3)}
    before = store.list()
    damage(store.folder / "index.jsonl")
    after = AdapterStore(store.folder)
    assert after.list() == before and {r.id for r in before} == ids
    # The next start reads no adapter file.
    assert index_alone(store.folder) == ids


def test_a_stale_index_does_not_matter(store):
    gone, kept = store.put(random_adapter(0)), store.put(random_adapter(1))
    index = (store.folder / "index.jsonl").read_text()
    store.file(gone).unlink()
    other = AdapterStore(store.folder)
    new = other.put(random_adapter(2))
    (store.folder / "index.jsonl").write_text(index)
    assert {r.id for r in AdapterStore(store.folder).list()} == {kept, new}
    assert {r.id for r in store.list()} == {kept, new}


def index_alone(folder: Path) -> set[str]:
    """Ids in a store that is opened without reading adapter files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("v2l_fast.store.folder.read_record", None)
        return {r.id for r in AdapterStore(folder).list()}


def test_many_adapters_start_fast_from_the_index(store):
    ids = {store.put(random_adapter(seed)) for seed in range(20)}
    assert index_alone(store.folder) == ids


# --- the disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    ["v2l_fast.tensor_files.save_file", "os.fsync", "v2l_fast.store.adapter_store.os.replace"],
)
def test_a_full_disk_leaves_nothing(store, monkeypatch, step):
    kept = store.put(random_adapter(0))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    with pytest.raises(StoreError, match="No space left on device.*free space"):
        store.put(random_adapter(1))
    monkeypatch.undo()
    assert [r.id for r in store.list()] == [kept] and len(served(store.folder)) == 1
    assert list(store.staging.folder.iterdir()) == []
    assert store.put(random_adapter(1)) in store


def fill(folder: Path) -> None:
    """Run out of space through the limit on a file's size, which needs no privileges."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = AdapterStore(folder)
    store.put(random_adapter(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    with pytest.raises(StoreError, match="not stored"):
        store.put(random_adapter(1, size=1 << 16))
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
        ids = list(threads.map(lambda i: store.put(random_adapter(i % 5)), range(40)))
    assert len(set(ids)) == 5 == len(store.list())
    assert list(store.staging.folder.iterdir()) == []


def write(folder: Path, log: Path, seeds: range, size: int) -> None:
    """Put adapters, and log each id after it is stored."""
    store = AdapterStore(folder)
    with open(log, "a", buffering=1) as reported:
        reported.write("ready\n")
        for seed in seeds:
            reported.write(store.put(random_adapter(seed, size=size)) + "\n")


def test_processes_share_a_store(store, tmp_path):
    """Two processes write overlapping ranges while a third one reads and lists."""
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


@pytest.mark.parametrize("lives", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_kill_at_any_moment(store, tmp_path, lives):
    """Every adapter that a killed process reported is there, and nothing is half-written."""
    rng = random.Random(0)
    log = tmp_path / "log"
    for life in range(lives):
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
    # At most one per process was complete and not reported.
    assert len(stored - reported) <= lives
    for adapter_id in stored:
        assert after.get(adapter_id).rank == 4
    assert not any((store.folder / "corrupt").iterdir())
    # The staging folders of dead processes are gone.
    staging = {p.name for p in (store.folder / "staging").iterdir() if p.is_dir()}
    assert staging == {store.staging.folder.name, after.staging.folder.name}


def test_a_living_process_keeps_its_staging_folder(store):
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


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used"):
        AdapterStore(tmp_path / "file")

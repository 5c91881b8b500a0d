"""Two servers on one store folder do not remove what the other one uses."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from tests.serving.checks import QUESTION, refused
from tests.serving.conftest import Running
from tests.waiting import LIMIT, wait_until
from v2l_fast.serving.videos import VIDEO_FILE, ReceivedVideo, VideoFolder
from v2l_fast.store.adapter_store import AdapterStore, StoreError


@pytest.fixture
def two(serve, tmp_path):
    """Two servers, and an event that the first one's jobs and answers wait for."""
    hold = threading.Event()
    first = serve(folder=tmp_path / "store", stand_in={"hold": hold})
    yield first, serve(folder=tmp_path / "store", stand_in={}), hold
    hold.set()


def kept(live: Running) -> list[str]:
    return sorted(path.name for path in live.server.videos.folder.iterdir())


def test_a_video_stays_while_the_other_reads_it(two, videos):
    first, second, hold = two
    with open(videos[0], "rb") as file:
        job = first.http.post("/v1/videos", files={"file": file}, data={"max_frames": 3}).json()
    other = second.internalize(videos[0])["adapter_id"]
    assert second.http.delete(f"/v1/videos/{other}").is_success
    assert len(kept(first)) == 1
    hold.set()
    video = first.completed(job)["adapter_id"]
    assert second.http.get(f"/v1/videos/{video}").json()["in_context"]
    # The last adapter's deletion takes the video along, whichever server it reaches; while the job
    # still holds the video, the end of the job does.
    assert second.http.delete(f"/v1/videos/{video}").is_success
    wait_until(lambda: kept(first) == [])
    refused(first.http.get(f"/v1/videos/{job['id']}"), 404)
    refused(first.http.post("/v1/chat/completions", json={**QUESTION, "model": video}), 404)


def test_an_adapter_deleted_by_the_other_is_made_again(two, videos, monkeypatch):
    """Even if its job has not been collected yet."""
    first, second, hold = two
    hold.set()
    monkeypatch.setattr(first.server.jobs, "collect", lambda: None)
    video = first.internalize(videos[0])["adapter_id"]
    assert second.internalize(videos[0])["cached"]
    assert second.http.delete(f"/v1/videos/{video}").is_success
    again = first.internalize(videos[0])
    assert again["adapter_id"] == video and not again["cached"]
    # Any other process may delete it, too.
    other = AdapterStore(first.server.store.folder)
    other.delete(video)
    assert first.http.get("/v1/videos").json()["data"] == []
    other.close()


def test_servers_that_keep_and_delete_at_once(tmp_path):
    """A kept video has its file until it is released, however often others delete it."""
    store = AdapterStore(tmp_path / "store")
    folders = [VideoFolder(tmp_path / "store" / "videos", store.staging, 1 << 20) for _ in range(3)]
    sha256, ended = "0" * 64, threading.Event()
    failures: list[BaseException] = []

    def keep(folder: VideoFolder) -> None:
        try:
            for _ in range(20):
                part = store.staging.new_path()
                part.write_bytes(b"video")
                video = folder.keep(ReceivedVideo(sha256, part, "a.mp4"))
                assert video.path.read_bytes() == b"video"
                folder.release(sha256)
                store.staging.remove(part)
        except BaseException as error:
            failures.append(error)

    def delete(folder: VideoFolder) -> None:
        while not ended.is_set():
            folder.delete(sha256)

    keepers = [threading.Thread(target=keep, args=(folder,)) for folder in folders[:2]]
    deleter = threading.Thread(target=delete, args=(folders[2],))
    for thread in (*keepers, deleter):
        thread.start()
    for thread in keepers:
        thread.join(LIMIT)
    ended.set()
    deleter.join(LIMIT)
    assert not failures
    folders[2].delete(sha256)
    assert not os.listdir(folders[2].folder) and not os.listdir(store.staging.folder)


def test_a_video_in_use_or_needed_is_not_deleted(tmp_path):
    store = AdapterStore(tmp_path / "store")
    folder = VideoFolder(tmp_path / "store" / "videos", store.staging, 1 << 20)
    part = store.staging.new_path()
    part.write_bytes(b"video")
    sha256 = "1" * 64
    kept = folder.keep(ReceivedVideo(sha256, part, "a.mp4"))
    folder.delete(sha256)
    assert kept.path.exists()
    folder.release(sha256)
    folder.delete(sha256, lambda: True)
    assert kept.path.exists()
    folder.delete(sha256)
    assert not folder.has(sha256)


def test_a_removal_waits_for_one_that_decides(tmp_path):
    """The first removal sees an adapter of the video that the second one's caller has deleted."""
    store = AdapterStore(tmp_path / "store")
    first, second = (
        VideoFolder(tmp_path / "store" / "videos", store.staging, 1 << 20) for _ in range(2)
    )
    part, sha256 = store.staging.new_path(), "2" * 64
    part.write_bytes(b"video")
    first.keep(ReceivedVideo(sha256, part, "a.mp4"))
    first.release(sha256)
    removal = threading.Thread(target=second.delete, args=(sha256,))

    def needed() -> bool:
        removal.start()
        # Time to give up, which it must not do.
        removal.join(0.2)
        return True

    first.delete(sha256, needed)
    removal.join(LIMIT)
    assert not first.has(sha256)


def test_the_remains_of_a_dead_process_are_removed_at_start(serve, videos, tmp_path):
    """A video whose job was lost; staging folders with and without a lock file."""
    live = serve(stand_in={})
    video = live.internalize(videos[0])["adapter_id"]
    wait_until(lambda: not live.server.videos._in_use)
    folder = live.server.videos.folder
    (sound,) = kept(live)
    for name in ("3" * 64, "4" * 64):
        (folder / name).mkdir()
        (folder / name / VIDEO_FILE).write_bytes(b"video")
    staging = live.server.store.folder / "staging"
    for name in ("a" * 32, "b" * 32):
        (staging / name).mkdir()
        (staging / name / "part").write_bytes(b"half")
    (staging / f"{'a' * 32}.lock").touch()
    # Used by a living server.
    assert live.server.videos.use("4" * 64)
    again = serve(stand_in={})
    assert kept(live) == sorted([sound, "4" * 64])
    assert {path.name for path in staging.iterdir() if path.is_dir()} == {
        live.server.store.staging.folder.name, again.server.store.staging.folder.name
    }  # fmt: skip
    assert again.http.get(f"/v1/videos/{video}").json()["in_context"]
    live.server.videos.release("4" * 64)


@pytest.mark.parametrize("name", ["adapters", "corrupt", "staging", "videos"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_refused_at_start(tmp_path, monkeypatch, name, number):
    make = Path.mkdir

    def mkdir(path: Path, *args: object, **options: object) -> None:
        if name in path.parts:
            raise OSError(number, os.strerror(number))
        make(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(StoreError, match=f"cannot be used .{os.strerror(number)}.; check its free"):
        store = AdapterStore(tmp_path / "store")
        VideoFolder(store.folder / "videos", store.staging, 1 << 20)


@pytest.mark.parametrize("leftover", ["file", "empty folder", "dead link", "name alone"])
def test_leftovers_are_replaced_by_the_video(tmp_path, leftover):
    """The remains of a crash, or a link to a file that was moved."""
    store = AdapterStore(tmp_path / "store")
    folder = VideoFolder(tmp_path / "store" / "videos", store.staging, 1 << 20)
    sha256 = "2" * 64
    place = folder.folder / sha256
    if leftover == "file":
        place.write_text("not a folder")
    else:
        place.mkdir()
        if leftover == "dead link":
            (place / VIDEO_FILE).symlink_to(tmp_path / "gone.mp4")
        if leftover == "name alone":
            (place / "name").write_text("old")
    part = store.staging.new_path()
    part.write_bytes(b"video")
    assert folder.keep(ReceivedVideo(sha256, part, "a.mp4")).path.read_bytes() == b"video"
    assert folder.name(sha256) == "a.mp4"
    assert not os.listdir(store.staging.folder)

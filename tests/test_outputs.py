"""Outputs never destroy inputs, devices, links or existing files; runs resume in their folder."""

from __future__ import annotations

import json
import os
import pickle
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.tiny import clip
from v2l_fast.errors import AdapterError, ConfigError, V2LError, WriteError
from v2l_fast.files import replacing, write_text
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.outputs import (
    Journal,
    ResumableFolder,
    check_folder,
    check_new_folder,
    check_output,
    replacing_folder,
)
from v2l_fast.tensor_files import load_tensors, save_tensors


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"a video")
    return path


@pytest.mark.parametrize("force", [False, True])
def test_an_output_must_not_be_an_input_under_any_name(video, tmp_path, force, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.mp4").symlink_to(video)
    (tmp_path / "chain.mp4").symlink_to(tmp_path / "link.mp4")
    os.link(video, tmp_path / "hard.mp4")
    monkeypatch.chdir(tmp_path)
    names = "clip.mp4", "./clip.mp4", "folder/../clip.mp4", "link.mp4", "chain.mp4", "hard.mp4"
    for name in names:
        for a, b in ((name, video), (video, name), (tmp_path / name, "clip.mp4")):
            with pytest.raises(WriteError, match="is the input"):
                check_output(a, ["other", b], force)
    assert video.read_bytes() == b"a video"


def test_an_existing_file_needs_force(video, tmp_path):
    with pytest.raises(WriteError, match="exists already; name another output, or use --force"):
        check_output(video)
    check_output(video, force=True)
    check_output(tmp_path / "new.safetensors")
    check_output(tmp_path / "new" / "deep" / "a.safetensors")
    # mktemp creates an empty file, which holds nothing to lose.
    (tmp_path / "empty").touch()
    check_output(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "empty"]


def test_an_unwritable_output_is_refused_before_the_work(video, tmp_path, monkeypatch):
    with pytest.raises(WriteError, match="is a folder; name a file in it"):
        check_output(tmp_path)
    with pytest.raises(WriteError, match="File name too long; choose a shorter name"):
        check_output(tmp_path / ("a" * 300))
    with pytest.raises(WriteError, match="Not a directory"):
        check_output(video / "a.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(WriteError, match="symbolic links"):
        check_output(tmp_path / "loop")

    def refuse(dir):
        raise PermissionError(1, "Operation not permitted")

    # The superuser may write everywhere except on immutable and read-only file systems.
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for path in (tmp_path / "a", tmp_path / "new" / "a"):
        with pytest.raises(WriteError, match=r"a: cannot be written: Operation not permitted; ch"):
            check_output(path)


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("a" * 243 + ".safetensors")
    save_tensors({"x": torch.ones(2)}, path)
    assert load_tensors(path, V2LError)[0]["x"].tolist() == [1, 1]


def test_a_link_is_written_through(video, tmp_path):
    link, ahead = tmp_path / "link", tmp_path / "ahead"
    link.symlink_to("clip.mp4")
    ahead.symlink_to("made")
    write_text(link, "new")
    write_text(ahead, "first")
    assert link.is_symlink() and video.read_text() == "new"
    assert ahead.is_symlink() and (tmp_path / "made").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_device_stays(tmp_path):
    for path in ("/dev/null", "/dev/zero"):
        check_output(path)
        write_text(path, "gone")
        assert stat.S_ISCHR(os.stat(path).st_mode)
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    save_tensors({"x": torch.ones(2)}, link)
    assert link.is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(WriteError, match="No space left on device; free some space"):
        write_text("/dev/full", "text")


def test_content_is_written_to_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output(pipe)
    with pytest.raises(WriteError, match="nothing reads from this pipe"):
        write_text(pipe, "text")
    # One descriptor for both ends: the pipe has a reader before anything is written.
    with open(os.open(pipe, os.O_RDWR), "rb", buffering=0) as reader:
        text = "line\n" * 50_000
        writer = threading.Thread(target=write_text, args=(pipe, text))
        writer.start()
        content = b""
        while len(content) < len(text):
            content += reader.read(65536)
        writer.join()
    assert content.decode() == text
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_an_open_file_of_the_process_is_written_to(tmp_path):
    """As /dev/stdout if the shell redirects it to a file."""
    with open(tmp_path / "out", "w") as handle:
        write_text(f"/dev/fd/{handle.fileno()}", "first\n")
        inode = os.stat(handle.fileno()).st_ino
    assert (tmp_path / "out").stat().st_ino == inode


def test_a_disk_and_a_socket_are_refused(tmp_path, monkeypatch):
    import socket

    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(tmp_path)
        bound.bind("socket")
        with pytest.raises(WriteError, match="neither a file"):
            check_output("socket")
        with pytest.raises(WriteError, match="neither a file"):
            write_text("socket", "text")


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from v2l_fast import tensor_files

    def fail(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    with pytest.raises(WriteError, match="a: cannot be written: No space left") as caught:
        save_tensors({"x": torch.ones(2)}, tmp_path / "a")
    assert caught.value.errno == 28 and list(tmp_path.iterdir()) == []
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_folders(video, tmp_path):
    with pytest.raises(WriteError, match="clip.mp4: is not a folder"):
        check_folder(video)
    with pytest.raises(WriteError, match="clip.mp4: exists already"):
        check_folder(tmp_path, ["a.json", "clip.mp4"])
    with pytest.raises(WriteError, match="is the input"):
        check_folder(tmp_path, ["clip.mp4"], [video], force=True)
    check_folder(tmp_path, ["a.json"], [video])
    check_folder(tmp_path / "new" / "deep", ["a.json"])
    assert not (tmp_path / "new").exists()


def test_a_new_folder_must_not_contain_an_input(video, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        for force in (False, True):
            with pytest.raises(WriteError, match="contains the input"):
                check_new_folder(folder, [video], force)
            with pytest.raises(WriteError, match="contains the input"):
                check_new_folder(folder, [tmp_path], force)
        with pytest.raises(WriteError, match="is not empty; name another folder, or use --force"):
            check_new_folder(folder, ["shapes"])
    check_new_folder(tmp_path, ["shapes"], force=True)


def test_a_linked_folder_is_replaced_and_its_link_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with replacing_folder(tmp_path / "link", V2LError) as part:
        (part / "a").write_text("text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "text"


def test_an_adapter_replaces_adapters_only(model, video, tmp_path):
    adapter: Adapter = model.internalize(clip(2, 0))
    path = tmp_path / "a.safetensors"
    adapter.save(path)
    adapter.save(path)
    with pytest.raises(WriteError, match="clip.mp4: holds something other than an adapter"):
        adapter.save(video)
    assert video.read_bytes() == b"a video"
    weights = tmp_path / "model.safetensors"
    save_tensors({"x": torch.ones(2)}, weights)
    with pytest.raises(WriteError, match="other than an adapter"):
        adapter.save(weights)
    adapter.save(video, overwrite=True)
    assert Adapter.load(video).rank == adapter.rank
    with pytest.raises(WriteError, match="is a folder"):
        adapter.save(tmp_path)


def test_a_failing_block_does_not_write_to_a_device():
    with pytest.raises(RuntimeError), replacing("/dev/null") as part:
        part.write_text("half")
        raise RuntimeError
    assert not part.exists()


def test_writing_to_an_open_pipe_by_its_path():
    read, write = os.pipe()
    write_text(f"/proc/self/fd/{write}", "text")
    os.close(write)
    with open(read) as handle:
        assert handle.read() == "text"


def test_a_folder_resumes_the_same_run_only(tmp_path):
    folder = tmp_path / "new" / "run"
    fingerprint = {"model": {"name": "a", "rank": 8}, "budgets": (1, 2)}
    calls = []

    def compute():
        calls.append(1)
        return {"score": float("nan")}

    for _ in range(2):
        record = ResumableFolder(folder, fingerprint).record("piece", compute)
        assert list(record) == ["score"] and len(calls) == 1
    changed = {"model": {"name": "b", "rank": 9}, "budgets": (1, 2)}
    with pytest.raises(
        AdapterError,
        match=r"run: made with model.name=\"a\", now it is \"b\" \(and 1 more settings",
    ):
        ResumableFolder(folder, changed, AdapterError)
    with pytest.raises(ConfigError, match="made with budgets=.*repeat that run's settings or name"):
        ResumableFolder(folder, fingerprint | {"budgets": [1]})
    with pytest.raises(ConfigError, match="made with seed=null, now it is 1;"):
        ResumableFolder(folder, fingerprint | {"seed": 1})
    (folder / "piece.json").write_text("[]")
    with pytest.raises(ConfigError, match="piece.json: must hold a JSON object.*delete it"):
        ResumableFolder(folder, fingerprint).record("piece", compute)


def test_a_folder_of_other_files_is_not_a_run(video, tmp_path):
    with pytest.raises(ConfigError, match="is not empty and holds no earlier run"):
        ResumableFolder(tmp_path, {})
    ResumableFolder(tmp_path, {}, shared=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "run.json"]
    with pytest.raises(WriteError, match="cannot be written"):
        ResumableFolder(video, {})


# --- journals -------------------------------------------------------------------------------------


def test_entries_are_there_when_opened_again(tmp_path):
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path)
    journal.append({"a": {"text": "ä\n"}, "b": 2})
    journal.append({"b": 3})
    again = Journal(path)
    assert len(again) == 2 and again["a"] == {"text": "ä\n"} and again["b"] == 3
    assert "c" not in again


@pytest.mark.parametrize("torn", [1, 5, 20])
def test_a_torn_last_line_is_dropped_and_the_rest_goes_on(tmp_path, torn):
    path = tmp_path / "journal.jsonl"
    Journal(path).append({"a": "first", "b": "the second entry"})
    path.write_bytes(path.read_bytes()[:-torn])
    journal = Journal(path)
    assert "a" in journal and "b" not in journal
    journal.append({"b": "again"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_other_damage_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a", "value": 1}\nnonsense\n{"key": "b", "value": 1}\n')
    with pytest.raises(ConfigError, match=r"journal\.jsonl: line 2: not JSON .* delete the line"):
        Journal(path)
    path.write_text("[]\n")
    with pytest.raises(ConfigError, match="line 1"):
        Journal(path)


def test_threads_write_whole_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: journal.append({str(i): "x" * 1000}), range(100)))
    assert len(Journal(path)) == 100


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    journal.append({"a": 1})
    assert journal["a"] == 1 and list(tmp_path.iterdir()) == []

"""The containers of torch.save: damaged, lying and oversized files."""

from __future__ import annotations

import copy
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from v2l_fast.errors import CheckpointError
from v2l_fast.interop.pickles import TensorRef
from v2l_fast.interop.torch_archive import TorchArchive


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with TorchArchive(path) as archive:
        tensors = {k: v for k, v in archive.root.items() if isinstance(v, TensorRef)}
        return {key: archive.read(ref) for key, ref in tensors.items()}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_all(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
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


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_reads_what_torch_saves(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
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
    loaded = read_all(path)
    assert loaded.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(loaded[key], tensor) and loaded[key].dtype == dtype
        assert loaded[key].is_contiguous()


@pytest.mark.parametrize("name", ["nano.pt", "nano_legacy_format.pt"])
def test_truncation_anywhere_is_refused(data: Path, tmp_path: Path, name: str) -> None:
    content = (data / name).read_bytes()
    path = tmp_path / "cut.pt"
    for share in (0.0001, 0.01, 0.05, 0.3, 0.9, 0.99999):
        path.write_bytes(content[: int(len(content) * share) + 1])
        refused(path)


def test_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    assert "no such file" in refused(path)
    assert "not a regular file" in refused(tmp_path)
    for content, says in (
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "truncated"),
        (bytes(range(256)) * 8, "not a file that torch.save wrote"),
        (b"\x80\x02K\x01.", "not a file that torch.save wrote"),
        (b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00x\x85R.", "posix.system"),
    ):
        path.write_bytes(content)
        assert says in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "hello")
    assert "not one that torch.save wrote" in refused(path)


def test_lying_zip_is_refused(data: Path, tmp_path: Path) -> None:
    source, path = data / "nano.pt", tmp_path / "x.pt"

    def check(says: str, record: str, change: Callable[[bytes], bytes | None]) -> None:
        rewrite(source, path, lambda name, old: change(old) if name == record else old)
        assert says in refused(path)

    check("holds no record 'data/0'", "data/0", lambda old: None)
    check("holds 4100 bytes, not 4096", "data/0", lambda old: old + b"more")
    check("byte order", "byteorder", lambda old: b"big")
    check("too large", "data.pkl", lambda old: bytes(9 << 20))
    rewrite(source, path, lambda name, old: old, zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)


def test_flipped_bit_is_refused(data: Path, tmp_path: Path) -> None:
    content = bytearray((data / "nano.pt").read_bytes())
    with zipfile.ZipFile(data / "nano.pt") as archive:
        info = archive.getinfo("nano/data/0")
        content[info.header_offset + 30 + 2048] ^= 1
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert "corrupt" in refused(path)


def test_claims_beyond_the_file_are_refused(tmp_path: Path) -> None:
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
    assert "its tensors need 4000000" in refused(lying)


def test_huge_directory_is_refused(tmp_path: Path) -> None:
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
    place = content.rindex(b"\x80\x02]q\x00")
    path.write_bytes(content[:place] + b"\x80\x02]." + content[place:])
    assert "list of storages" in refused(path)
    path.write_bytes(content[:place] + b"\x80\x02}." + content[place:])
    assert "list of storages" in refused(path)

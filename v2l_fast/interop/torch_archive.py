"""The two containers ``torch.save`` writes (zip, and the stream used before PyTorch 1.6).

Finds the pickle and the storages in the file, checks their sizes against the file's and reads
tensors on demand, on the CPU whatever device they were saved from. The pickle itself is read by
``pickles``; what a checkpoint means is left to ``frames2lora``.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from v2l_fast.errors import CheckpointError
from v2l_fast.files import open_regular
from v2l_fast.interop.pickles import MAX_PICKLE_BYTES, StorageRef, TensorRef, quote, read_pickle

ZIP_START = b"PK\x03\x04"
PICKLE_START = b"\x80"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
CHUNK = 1 << 20
DAMAGED = "truncated or corrupt; get it again and compare its size and checksum"


class TorchArchive:
    """A ``torch.save`` file opened for reading; use it as a context manager.

    Args:
        path: the file.

    Attributes:
        root: the saved object as inert data, see :mod:`v2l_fast.interop.pickles`.

    Raises:
        CheckpointError: the file is missing, not a ``torch.save`` file, truncated, or names
            something that is not on the list of known names.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._cached: dict[str, Tensor] = {}
        # Opening a named pipe by its name would wait for a writer.
        open_regular(path, CheckpointError).close()
        try:
            self._file = _BoundedFile(self.path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            # Streams with readinto, which typing.BinaryIO does not have.
            self._open: Callable[[StorageRef], Any]
            start = self._file.read(4)
            if not start:
                raise CheckpointError(f"{path}: the file is empty; get it again")
            if start == ZIP_START:
                self.root, storages = self._read_zip()
            else:
                self.root, storages = self._read_legacy(start)
            self._check_total(storages)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TorchArchive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, tensor: TensorRef) -> Tensor:
        """The tensor's values on the CPU, contiguous; a storage is read once.

        Raises:
            CheckpointError: the file does not hold the storage whole.
        """
        storage = tensor.storage
        if storage.key not in self._cached:
            self._cached[storage.key] = self._read_storage(storage)
        flat = self._cached[storage.key]
        return flat.as_strided(tensor.shape, tensor.stride, tensor.offset).contiguous()

    # --- containers ---------------------------------------------------------------------------

    def _read_zip(self) -> tuple[Any, dict[str, StorageRef]]:
        archive = self._guarded(lambda: zipfile.ZipFile(self._file))
        members = {info.filename: info for info in archive.infolist()}
        folders = [name.split("/")[0] for name in members if name.count("/") == 1]
        prefix = next((f for f in folders if f"{f}/data.pkl" in members), None)
        if prefix is None:
            raise CheckpointError(f"{self.path}: a zip file, but not one that torch.save wrote")

        def member(name: str, size: int | None = None, limit: int | None = None) -> BinaryIO:
            info = members.get(f"{prefix}/{name}")
            if info is None:
                raise CheckpointError(f"{self.path}: holds no record {quote(name)}; {DAMAGED}")
            plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            if not plain or info.file_size != info.compress_size:
                raise CheckpointError(
                    f"{self.path}: record {quote(name)} is compressed, which torch.save never "
                    "does; give the file as it was released"
                )
            if info.file_size != (info.file_size if size is None else size):
                raise CheckpointError(
                    f"{self.path}: record {quote(name)} holds {info.file_size} bytes, not {size}; "
                    f"{DAMAGED}"
                )
            if limit is not None and info.file_size > limit:
                raise CheckpointError(
                    f"{self.path}: record {quote(name)} of {info.file_size} bytes is too large; "
                    "not a checkpoint, do not use it"
                )
            return archive.open(info)

        if f"{prefix}/byteorder" in members:
            order = self._guarded(lambda: member("byteorder", limit=16).read())
            if order != b"little":
                raise CheckpointError(
                    f"{self.path}: byte order is {quote(order)}; save it again on a little-endian "
                    "machine"
                )
        program = self._guarded(lambda: member("data.pkl", limit=MAX_PICKLE_BYTES).read())
        self._open = lambda storage: member(f"data/{storage.key}", storage.nbytes)
        return read_pickle(io.BytesIO(program), self.path)

    def _read_legacy(self, start: bytes) -> tuple[Any, dict[str, StorageRef]]:
        self._file.seek(0)
        head = io.BytesIO(self._file.read(MAX_PICKLE_BYTES))
        magic = None
        if start.startswith(PICKLE_START):
            magic, _ = read_pickle(head, self.path)
        if type(magic) is not int or magic != LEGACY_MAGIC:
            raise CheckpointError(f"{self.path}: not a file that torch.save wrote")
        protocol, _ = read_pickle(head, self.path)
        system, _ = read_pickle(head, self.path)
        if protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
            raise CheckpointError(f"{self.path}: torch.save protocol {quote(protocol)} is unknown")
        if system.get("little_endian") is not True:
            raise CheckpointError(
                f"{self.path}: byte order is big; save it again on a little-endian machine"
            )
        root, storages = read_pickle(head, self.path)
        keys, _ = read_pickle(head, self.path)
        places, place = {}, head.tell()
        named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not named or sorted(keys) != sorted(storages):
            raise CheckpointError(f"{self.path}: its list of storages is wrong; {DAMAGED}")
        for key in keys:
            self._file.seek(place)
            header = self._file.read(8)
            if len(header) < 8 or struct.unpack("<q", header)[0] != storages[key].numel:
                raise CheckpointError(f"{self.path}: storage {quote(key)} is missing; {DAMAGED}")
            places[key] = place + 8
            place += 8 + storages[key].nbytes
        if place > self._size:
            raise CheckpointError(f"{self.path}: {self._size} bytes of at least {place}; {DAMAGED}")

        def open_storage(storage: StorageRef) -> BinaryIO:
            self._file.seek(places[storage.key])
            return self._file

        self._open = open_storage
        return root, storages

    # --- bytes --------------------------------------------------------------------------------

    def _check_total(self, storages: dict[str, StorageRef]) -> None:
        """Together the storages fit the file, so reading all of them is bounded by its size."""
        claimed = sum(storage.nbytes for storage in storages.values())
        if claimed > self._size:
            raise CheckpointError(
                f"{self.path}: {self._size} bytes, its tensors need {claimed}; {DAMAGED}"
            )

    def _read_storage(self, storage: StorageRef) -> Tensor:
        data = torch.empty(storage.nbytes, dtype=torch.uint8)
        view = data.numpy()

        def fill() -> int:
            stream, done = self._open(storage), 0
            while done < storage.nbytes:
                count = stream.readinto(view[done : done + CHUNK])
                if not count:
                    break
                done += count
            return done

        if self._guarded(fill) < storage.nbytes:
            raise CheckpointError(f"{self.path}: storage {quote(storage.key)} is {DAMAGED}")
        return data.view(storage.dtype)

    def _guarded(self, read: Callable[[], Any]) -> Any:
        """Run a read; what zipfile and the system say about damage becomes one line.

        zipfile's own words are left out: of an archive that lost its end, where the directory
        stands, it says that the file is no zip file.
        """
        try:
            return read()
        except CheckpointError:
            raise
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error):
            raise CheckpointError(f"{self.path}: {DAMAGED}") from None


class _BoundedFile(io.FileIO):
    """A file that refuses to read more at once than a checkpoint's directory can need.

    ``zipfile`` reads the archive's directory in one piece, of the length the file claims.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return super().read(MAX_PICKLE_BYTES)
        if size > MAX_PICKLE_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes is too large")
        return super().read(size)

"""Adapters on disk: content-addressed, immutable, durable, shared by any number of processes.

Each adapter is one safetensors file, named by a hash of its content and visible only when it is
complete and on the disk. ``folder`` has the index of the files' headers and the files under
construction.

Layout of the folder::

    adapters/<id>.safetensors   the adapters
    staging/                    files being written; those of a dead process are removed at start
    corrupt/                    files that failed their check, kept for inspection, never served
    index.jsonl                 one line per adapter, for a fast start
    lock                        held while a name appears or disappears
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError
from torch import Tensor, uint8

from v2l_fast.errors import AdapterError, V2LError
from v2l_fast.files import open_regular
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_files import read_record
from v2l_fast.store.folder import (
    ID,
    SUFFIX,
    Index,
    Staging,
    Stamp,
    StoredAdapter,
    exclusive,
    settled,
    stamp,
    sync_folder,
)
from v2l_fast.video import FrameSampling

if TYPE_CHECKING:
    from v2l_fast.interop.peft import VllmFolder
    from v2l_fast.model import Video2LoRA

log = logging.getLogger(__name__)

INDEX_NAME = "index.jsonl"


class StoreError(V2LError):
    """The store's folder cannot be read or written."""


@dataclass(frozen=True)
class InternalizeSettings:
    """Settings that, with the file's bytes, determine the adapter; used to match stored adapters.

    Attributes:
        hypernetwork: its fingerprint.
        version: of the backbone's preprocessing.
        instruction: text that follows the video in the context pass.
        sampling: frames and size.
    """

    hypernetwork: str
    version: str
    instruction: str
    sampling: FrameSampling

    @classmethod
    def of(cls, model: Video2LoRA, sampling: FrameSampling | None = None) -> InternalizeSettings:
        """The settings of ``model.internalize``; sampling as in training by default."""
        config = model.config
        return cls(
            model.hypernet.fingerprint,
            model.backbone.preprocessing,
            config.instruction,
            sampling or config.sampling,
        )

    def matches(self, provenance: Mapping[str, Any]) -> bool:
        """Whether an adapter with this provenance was made with equivalent settings.

        Frames are compared, not their limit: many limits select the same frames of a short clip.
        """
        expected = {
            "version": self.version,
            "longest_edge": self.sampling.longest_edge,
            "exact_frames": self.sampling.exact_frames,
            "instruction": self.instruction,
        }
        if provenance.get("hypernetwork") != self.hypernetwork:
            return False
        if provenance.get("preprocessing") != expected:
            return False
        try:
            source = provenance["source"]
            indices = self.sampling.indices(source["num_frames"], source["fps"], source["duration"])
            return indices.tolist() == source["frame_indices"]
        except (LookupError, TypeError, ValueError, ArithmeticError, V2LError):
            return False


class AdapterStore:
    """The adapters of one or several models in a folder.

    Threads and processes, also of several machines, may use one folder at the same time.

    Args:
        folder: created if missing.

    Raises:
        StoreError: the folder cannot be created or written.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._adapters = self.folder / "adapters"
        self._corrupt = self.folder / "corrupt"
        self._lock_path = self.folder / "lock"
        self._mutex = threading.RLock()
        # Stamps of the files whose content was checked against their name.
        self._verified: dict[str, Stamp] = {}
        try:
            for path in (self._adapters, self._corrupt):
                path.mkdir(parents=True, exist_ok=True)
            self.staging = Staging(self.folder / "staging")
        except OSError as error:
            raise self._failure("cannot be used", error) from None
        self._index = Index(
            self.folder / INDEX_NAME,
            self._adapters,
            self._lock_path,
            self._set_aside,
            self._is_sound,
        )
        self._records()

    def close(self) -> None:
        """Remove this process's staging folder; the store must not be written to afterwards."""
        self.staging.close()

    # --- writing ------------------------------------------------------------------------------

    def put(self, adapter: Adapter) -> str:
        """Store an adapter; it is on the disk when this returns.

        The file names its shared bias and does not contain it.

        Returns:
            Its id; equal adapters have one id and one file.

        Raises:
            AdapterError: a factor is not finite.
            StoreError: the disk is full or the folder is not writable; nothing is left behind.
        """
        adapter_id = content_id(adapter)
        path = self._path(adapter_id)
        part = self.staging.new_path(SUFFIX)
        try:
            adapter.save(part)
            with exclusive(self._lock_path):
                os.replace(part, path)
                sync_folder(self._adapters)
        except (OSError, SafetensorError) as error:
            raise self._failure("the adapter was not stored", error) from None
        finally:
            with suppress(OSError):
                self.staging.remove(part)
        with self._mutex:
            self._index.update(adapter_id)
        return adapter_id

    def delete(self, adapter_id: str) -> None:
        """Remove an adapter.

        Raises:
            AdapterError: no adapter has this id.
            StoreError: the folder cannot be written.
        """
        path = self._path(adapter_id)
        try:
            with exclusive(self._lock_path):
                path.unlink()
                sync_folder(self._adapters)
        except FileNotFoundError:
            raise _unknown(adapter_id) from None
        except OSError as error:
            raise self._failure("the adapter was not deleted", error) from None
        finally:
            with self._mutex:
                self._index.forget(adapter_id)
                self._verified.pop(adapter_id, None)

    # --- reading ------------------------------------------------------------------------------

    def get(self, adapter_id: str) -> Adapter:
        """Read an adapter (on the CPU, its bias not attached) and check it against its id.

        Raises:
            AdapterError: the id is malformed or unknown, or the file is damaged. A damaged file is
                moved to ``corrupt/``, and internalizing the video again replaces it.
        """
        with self._open(adapter_id) as handle:
            return self._read(adapter_id, handle)

    def open(self, adapter_id: str) -> BinaryIO:
        """Open an adapter's file for reading and check its content against its id.

        Raises:
            AdapterError: as :meth:`get`.
        """
        handle = self._open(adapter_id)
        try:
            with self._mutex:
                known = self._verified.get(adapter_id)
            if known != stamp(os.fstat(handle.fileno())):
                self._read(adapter_id, handle)
                handle.seek(0)
            return handle
        except BaseException:
            handle.close()
            raise

    def _is_sound(self, adapter_id: str) -> bool:
        """Whether a file's content matches its name, or cannot be checked now."""
        try:
            self.open(adapter_id).close()
        except StoreError:
            # It says nothing about the content.
            return True
        except AdapterError:
            return not stat.S_ISREG(_mode(self._path(adapter_id)))
        return True

    def _open(self, adapter_id: str) -> BinaryIO:
        """Open an adapter's file, without following a link."""
        path = self._path(adapter_id)
        try:
            return open_regular(path, AdapterError, follow=False)
        except AdapterError as error:
            cause = error.__context__
            if isinstance(cause, FileNotFoundError):
                raise _unknown(adapter_id) from None
            if isinstance(cause, OSError):
                raise self._failure(f"{path.name} cannot be read", cause) from None
            raise

    def _read(self, adapter_id: str, handle: BinaryIO) -> Adapter:
        """Read the adapter in an open file and check its content against its id."""
        path = self._path(adapter_id)
        status = os.fstat(handle.fileno())
        try:
            adapter = Adapter.read(handle, path)
            sound = content_id(adapter) == adapter_id
            reason = f"{path}: its content does not match its name"
        except AdapterError as error:
            if isinstance(error.__context__, OSError):
                # A network failure says nothing about the content.
                raise self._failure(f"{path.name} cannot be read", error.__context__) from None
            sound, reason = False, str(error)
        if not sound:
            self._set_aside(adapter_id, status.st_ino, reason)
            raise AdapterError(f"{reason}; moved to {self._corrupt}; internalize the video again")
        if settled(status):
            with self._mutex:
                self._verified[adapter_id] = stamp(status)
        return adapter

    def list(self) -> list[StoredAdapter]:
        """All adapters, the newest first."""
        return sorted(self._records().values(), key=lambda r: (-r.created, r.id))

    def describe(self, adapter_id: str) -> StoredAdapter:
        """The index's record of an adapter.

        Raises:
            AdapterError: no adapter has this id.
        """
        self._path(adapter_id)
        record = self._records().get(adapter_id)
        if record is None:
            raise _unknown(adapter_id)
        return record

    def __contains__(self, adapter_id: str) -> bool:
        if ID.fullmatch(adapter_id) is None:
            return False
        return stat.S_ISREG(_mode(self._path(adapter_id)))

    def file(self, adapter_id: str) -> Path:
        """Path of an adapter's file, which must not be changed.

        Raises:
            AdapterError: the id is malformed.
        """
        return self._path(adapter_id)

    def find(self, video: str, settings: InternalizeSettings) -> str | None:
        """Id of the stored adapter of a video for these settings, or None.

        Args:
            video: sha256 of the file's bytes, hexadecimal.
        """
        for record in self.list():
            if record.video == video and record.hypernetwork == settings.hypernetwork:
                with suppress(AdapterError):
                    stored = read_record(self._path(record.id), follow=False)
                    if settings.matches(stored.provenance):
                        return record.id
        return None

    def _records(self) -> dict[str, StoredAdapter]:
        with self._mutex:
            try:
                return dict(self._index.records())
            except OSError as error:
                raise self._failure("cannot be read", error) from None

    # --- files --------------------------------------------------------------------------------

    def _path(self, adapter_id: str) -> Path:
        if not isinstance(adapter_id, str) or not ID.fullmatch(adapter_id):
            raise AdapterError(
                f"invalid adapter id {str(adapter_id)[:80]!r}: expected 32 hexadecimal digits"
            )
        return self._adapters / f"{adapter_id}{SUFFIX}"

    def _set_aside(self, adapter_id: str, inode: int, why: str) -> None:
        """Move a damaged file away unless another one has replaced it in the meantime."""
        path = self._path(adapter_id)
        log.error("%s; moved to %s", why, self._corrupt)
        try:
            with exclusive(self._lock_path):
                if os.lstat(path).st_ino == inode:
                    os.replace(path, self._corrupt / f"{path.stem}.{uuid.uuid4().hex[:8]}{SUFFIX}")
                    sync_folder(self._adapters)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.error("%s: cannot be moved (%s); delete it", path, error.strerror)
        with self._mutex:
            self._index.forget(adapter_id)
            self._verified.pop(adapter_id, None)

    def _failure(self, what: str, error: Exception) -> StoreError:
        reason = getattr(error, "strerror", None) or str(error)
        return StoreError(f"{self.folder}: {what} ({reason}); check its free space and permissions")


class PublishingStore(AdapterStore):
    """A store that also writes every adapter to a :class:`~v2l_fast.interop.peft.VllmFolder`.

    An adapter is published before it is stored, so that replicas know every stored id.
    """

    def __init__(self, folder: str | os.PathLike, published: VllmFolder) -> None:
        super().__init__(folder)
        self._published = published

    def put(self, adapter: Adapter) -> str:
        """As :meth:`AdapterStore.put`; the adapter's bias must be attached."""
        self._published.write(content_id(adapter), adapter)
        return super().put(adapter)

    def delete(self, adapter_id: str) -> None:
        """As :meth:`AdapterStore.delete`."""
        super().delete(adapter_id)
        self._published.remove(adapter_id)


def _mode(path: Path) -> int:
    """``st_mode`` of a path, without following a link; 0 if nothing is there."""
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


def content_id(adapter: Adapter) -> str:
    """Hash of an adapter's factors, scale, bias and provenance, without the video's file name."""
    provenance: dict[str, Any] = dict(adapter.provenance)
    if "source" in provenance:
        provenance["source"] = {k: v for k, v in provenance["source"].items() if k != "name"}
    record = {"scale": adapter.scale, "bias": adapter.bias_id, "provenance": provenance}
    digest = hashlib.sha256(_canonical(record).encode())
    for letter, factors in (("A", adapter.A), ("B", adapter.B)):
        for module in sorted(factors):
            digest.update(_canonical([letter, module]).encode())
            _update(digest, factors[module])
    return digest.hexdigest()[:32]


def _update(digest: Any, factor: Tensor) -> None:
    factor = factor.detach().cpu().contiguous()
    digest.update(f"{factor.dtype}{list(factor.shape)}".encode())
    # NumPy has no bfloat16; the bytes are the same.
    digest.update(factor.flatten().view(uint8).numpy().data)


def _canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _unknown(adapter_id: str) -> AdapterError:
    return AdapterError(f"no adapter {adapter_id}; internalize its video first")

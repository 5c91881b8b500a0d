"""Output files and folders: checked before the work, written whole, and never over an input.

Errors name the file, the fault and the remedy. Reading is ``files``'.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from v2l_fast.errors import V2LError, WriteError, os_error_reason
from v2l_fast.files import NOFOLLOW, NONBLOCK, refuse_special

# Safetensors reports errors of the operating system as text.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

# --- before the work ------------------------------------------------------------------------------


def check_output(
    path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), force: bool = False
) -> None:
    """Refuse an output file before the work for it begins.

    An empty file counts as absent; a device or pipe is written to, never replaced.

    Args:
        inputs: files that the work reads. The output is none of them, under whatever name.
        force: replace a file that exists already.

    Raises:
        WriteError: the output is an input, a folder, exists already, or cannot be written.
    """
    path = Path(path)
    for source in inputs:
        if _same_file(path, source):
            raise WriteError(f"{path}: is the input {source}; name another output")
    target = _destination(path)
    if target is None:
        if not os.access(path, os.W_OK):
            raise WriteError(f"{path}: cannot be written; check its permissions")
        return
    with _write_errors(path):
        size = target.stat().st_size if target.exists() else 0
    if size and not force:
        raise WriteError(f"{path}: exists already; name another output, or use --force")
    _check_writable(path, target.parent)


def check_folder(
    folder: str | os.PathLike,
    names: Iterable[str] = (),
    inputs: Iterable[str | os.PathLike] = (),
    force: bool = False,
) -> None:
    """Refuse a folder of outputs, which may exist, before the work for it begins.

    Args:
        names: files that will be written in it, each as in :func:`check_output`.

    Raises:
        WriteError: the folder is a file or cannot be written, or a file in it is refused.
    """
    folder, inputs = Path(folder), list(inputs)
    with _write_errors(folder):
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise WriteError(f"{folder}: is not a folder; name another one")
    _check_writable(folder, folder)
    for name in names:
        check_output(folder / name, inputs, force)


def check_new_folder(
    folder: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), force: bool = False
) -> None:
    """Refuse a folder that will be written as a whole, before the work for it begins.

    Args:
        inputs: files and folders that the work reads; none may be the output or lie in it.
        force: replace what an earlier run of the same command wrote.

    Raises:
        WriteError: the folder is or holds an input, is not empty, or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    real = Path(os.path.realpath(folder))
    for source in inputs:
        held = Path(os.path.realpath(source))
        # A hub id or a preset's name is no path: what does not exist cannot be overwritten.
        if held.exists() and (held.is_relative_to(real) or _same_file(folder, source)):
            raise WriteError(f"{folder}: holds the input {source}; name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise WriteError(f"{folder}: is not empty; name another folder, or use --force")


def _same_file(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    try:
        # A device that is written to is not changed by it.
        regular = stat.S_ISREG(os.stat(path).st_mode) or stat.S_ISDIR(os.stat(path).st_mode)
        return regular and os.path.samefile(path, other)
    except (OSError, ValueError):
        return False


def _check_writable(path: Path, folder: Path) -> None:
    """Make a file in the folder, or where the folder would be made: permissions alone do not say
    what a file system allows."""
    with _write_errors(path):
        while not folder.exists():
            # A link to nowhere: the folder would be made behind it.
            folder = Path(os.path.realpath(folder)).parent
        with tempfile.TemporaryFile(dir=folder):
            pass


# --- writing --------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | os.PathLike, suffix: str = ".part") -> Iterator[Path]:
    """Write the yielded file, and ``path`` becomes it when the block ends, never a part of it.

    The file is on the disk before it takes its place; when the block raises, it is removed. A
    symbolic link stays: the file it points to is replaced. A device or pipe stays, too: the
    content is written into it.

    Args:
        suffix: of the yielded file, for writers that go by it.

    Raises:
        WriteError: the path is a folder, a disk or a socket, or cannot be written.
    """
    path = Path(path)
    target = _destination(path)
    # The name itself may already be as long as the file system allows.
    name = f".{path.name[:50]}.{uuid.uuid4().hex}{suffix}"
    with _write_errors(path):
        if target is None:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / name
                _copy_into(Path(folder) / name, path)
            return
        part = target.with_name(name)
        try:
            yield part
            with open(part, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file (UTF-8) so that ``path`` is either the old file or the whole new one.

    Raises:
        WriteError: its folder does not exist, is not writable, or the disk is full.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def append_text(path: str | os.PathLike, text: str, *, fsync: bool = False) -> None:
    """Add text (UTF-8) at the end of a regular file in one write; make the file when missing.

    Other processes may append to the same file. A symbolic link is not followed.

    Args:
        fsync: the text is on the disk when this returns.

    Raises:
        V2LError: the file cannot be written, or is no regular file. An OSError is its
            ``__context__``.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | NONBLOCK | NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o666)
        try:
            refuse_special(path, os.fstat(descriptor).st_mode, V2LError)
            data = memoryview(text.encode("utf-8"))
            while data:
                data = data[os.write(descriptor, data) :]
            if fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as cause:
        raise V2LError(
            f"{path}: cannot be written ({cause.strerror}); "
            "check its folder, its permissions and the free space"
        ) from None


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file so that ``path`` is either the old file or the whole new one.

    Raises:
        WriteError: its folder does not exist, is not writable, or the disk is full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise WriteError(f"{path}: there is no folder {path.parent}; make it first")
    # Clones of views and of tensors that share storage (shared weights) are independent.
    ready = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with replacing(path) as part:
        # save_file makes its file private; adapters and weights follow the user's umask.
        part.touch()
        mode = part.stat().st_mode
        try:
            save_file(ready, part, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            code = _OS_ERROR.search(str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
        os.chmod(part, mode)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """The operating system's errors as one that names what was to be written."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = os_error_reason(error)
        raise WriteError(f"{path}: cannot be written: {reason}", error) from None


def _destination(path: Path) -> Path | None:
    """The file that a write to ``path`` replaces or makes; None for a device or pipe, which is
    written into.

    Raises:
        WriteError: the path is a folder, a disk or a socket.
    """
    with _write_errors(path):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            # Behind a link there may be nothing yet.
            return Path(os.path.realpath(path)) if path.is_symlink() else path
    if stat.S_ISDIR(mode):
        raise WriteError(f"{path}: is a folder; name a file in it")
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return None
    if not stat.S_ISREG(mode):
        raise WriteError(f"{path}: is neither a file, a pipe nor a character device; name a file")
    link = path
    while link.is_symlink():
        if os.path.realpath(link.parent).startswith("/proc/"):
            # An open file of this process, as /dev/stdout is: its owner goes on writing to it.
            return None
        link = link.parent / os.readlink(link)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _copy_into(source: Path, path: Path) -> None:
    """Write a file's bytes into a device or pipe."""
    try:
        # Without O_NONBLOCK, opening a pipe that nothing reads from waits for ever.
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            line = f"{path}: nothing reads from this pipe; start its reader first"
            raise WriteError(line) from None
        raise
    os.set_blocking(handle, True)
    with open(handle, "wb") as sink, open(source, "rb") as content:
        shutil.copyfileobj(content, sink)

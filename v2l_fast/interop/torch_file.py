"""Reads untrusted ``torch.save`` files.

``torch.load(weights_only=True)`` does the reading, with inert stand-ins for the classes that
released checkpoints pickle. What it does not check is checked here first: that the container is
whole (checksums, sizes, byte order), that the pickle names nothing outside of a short list
(``weights_only`` itself lets a file of 100 bytes ask for a terabyte), and that reading it takes
bounded work. What a checkpoint means is left to ``frames2lora``.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from v2l_fast.errors import CheckpointError, excerpt
from v2l_fast.files import open_regular

ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"
# A checkpoint of 32 layers needs 10 thousand instructions.
MAX_STEPS = 500_000
MAX_REUSED = 32
MAX_PICKLE_BYTES = 8 << 20
CHUNK = 1 << 20
DAMAGED = "truncated or corrupt; get it again and compare its size and checksum"
UNSAFE = "nothing was executed, do not use this file"


class Record:
    """Stands in for a configuration class: its attributes are the pickled object's."""


def _value(value: str | int) -> str | int:
    """Stands in for an enum: a member is the value it is defined by."""
    if not isinstance(value, (str, int)):
        raise TypeError(value)
    return value


STAND_INS: dict[str, Callable] = {
    "ctx_to_lora.configs.CtxEncoderArguments": Record,
    "ctx_to_lora.modeling.aggregator.AggregatorConfig": Record,
    "ctx_to_lora.modeling.hypernet.HypernetConfig": Record,
    "peft.tuners.lora.config.LoraConfig": Record,
    "peft.tuners.lora.config.LoraRuntimeConfig": Record,
    "ctx_to_lora.modeling.aggregator.AGGREGATOR_TYPE": _value,
    "ctx_to_lora.modeling.ctx_encoder.CTX_ENCODER_TYPE": _value,
    "ctx_to_lora.pooling.POOL_FN": _value,
    "peft.utils.peft_types.PeftType": _value,
    "peft.utils.peft_types.TaskType": _value,
    "builtins.frozenset": frozenset,
    "builtins.range": range,
}
# Protocol 2 writes the names that Python 2 had.
KNOWN = STAND_INS.keys() | {
    "__builtin__.frozenset",
    "__builtin__.set",
    "__builtin__.xrange",
    "builtins.set",
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch.device",
}
_DTYPES = "Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool"
TENSOR_NAMES = re.compile(rf"torch\.(({_DTYPES})Storage|b?float\d+|u?int\d+|bool)")
# Allowed names are state of the process.
_LOCK = threading.Lock()


def load_torch_file(path: str | os.PathLike) -> Any:
    """The object that ``torch.save`` wrote, on the CPU, with records for configurations.

    Raises:
        CheckpointError: the file is missing, damaged, not one that ``torch.save`` writes, or names
            something that no released checkpoint does; one line that names the file.
    """
    with open_regular(path, CheckpointError) as handle:
        try:
            start = handle.read(4)
            if not start:
                raise CheckpointError(f"{path}: the file is empty; get it again")
            if start == ZIP_START:
                _check_zip(handle, path)
            elif start.startswith(PICKLE_START):
                _check_stream(handle, path)
            else:
                raise CheckpointError(f"{path}: not a file that torch.save wrote")
            handle.seek(0)
            with _LOCK, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.serialization.safe_globals([(f, n) for n, f in STAND_INS.items()]):
                    root = torch.load(handle, map_location="cpu", weights_only=True, mmap=False)
            if start != ZIP_START and handle.read(1):
                raise CheckpointError(f"{path}: its list of storages is wrong; {DAMAGED}")
        except CheckpointError:
            raise
        except Exception:
            # Every error of a reader means the same here, and its words may quote the file.
            raise CheckpointError(f"{path}: {DAMAGED}") from None
    return root


def _check_zip(handle: BinaryIO, path: str | os.PathLike) -> None:
    """Check that every record is stored once, whole and uncompressed, and what the pickle does."""
    with zipfile.ZipFile(handle) as archive:
        records = archive.infolist()
        names = archive.namelist()
        folder = names[0].partition("/")[0]
        program = f"{folder}/data.pkl"
        if program not in names:
            raise CheckpointError(f"{path}: a zip file, but not one that torch.save wrote")
        size = sum(record.file_size for record in records)
        if len(set(names)) < len(names) or size > os.fstat(handle.fileno()).st_size:
            raise CheckpointError(f"{path}: its records share a name or bytes; {DAMAGED}")
        for name, record in zip(names, records, strict=True):
            if name.partition("/")[0] != folder or ".." in name.split("/"):
                raise CheckpointError(
                    f"{path}: torch.save writes no record {excerpt(name)}; {UNSAFE}"
                )
            if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
                raise CheckpointError(
                    f"{path}: record {excerpt(name)} is compressed, which torch.save never does; "
                    "use the file as it was released"
                )
        if archive.getinfo(program).file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: its pickle is too large for a checkpoint; {UNSAFE}")
        _check_pickle(io.BytesIO(archive.read(program)), path)
        order = f"{folder}/byteorder"
        if order in names and archive.open(order).read(16) != b"little":
            raise CheckpointError(
                f"{path}: its byte order is not little; save it again on a little-endian machine"
            )
        for record in records:
            with archive.open(record) as content:
                # The checksum is compared at the end.
                while content.read(CHUNK):
                    pass


def _check_stream(handle: BinaryIO, path: str | os.PathLike) -> None:
    """Check what the pickles do in the format before PyTorch 1.6; its storages follow them."""
    handle.seek(0)
    pickles = io.BytesIO(handle.read(MAX_PICKLE_BYTES))
    # Magic number, protocol, system, the saved object, and its list of storages.
    for _ in range(5):
        _check_pickle(pickles, path)


def _check_pickle(stream: BinaryIO, path: str | os.PathLike) -> None:
    """Check what a pickle names, and how much work it takes to run; nothing is run.

    ``weights_only`` finds names by the instruction GLOBAL alone, which states them openly.
    """
    tuples: set[Any] = set()
    reused, previous = 0, ""
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".", 1)
            if name not in KNOWN and not TENSOR_NAMES.fullmatch(name):
                raise CheckpointError(
                    f"{path}: refused, it names {excerpt(name)}, which no released checkpoint "
                    f"does; {UNSAFE}"
                )
        elif opcode.proto > 2:
            raise CheckpointError(
                f"{path}: refused, its pickle is of protocol {opcode.proto} ({opcode.name}), and "
                "only protocol 2, torch.save's default, is read, as by torch.load(weights_only="
                "True); save it again without pickle_protocol; nothing was executed"
            )
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            # Hashing (t, t) of (t, t) of ... takes time exponential in the nesting.
            if previous.startswith("TUPLE"):
                tuples.add(argument)
            continue
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            reused += argument in tuples
        if step > MAX_STEPS or reused > MAX_REUSED:
            raise CheckpointError(f"{path}: its pickle takes too much work to read; {UNSAFE}")
        if opcode.name != "PROTO":
            previous = opcode.name

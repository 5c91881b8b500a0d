"""Released Frames2LoRA / Video2LoRA checkpoints as a :class:`HyperNetwork`.

Reads untrusted ``torch.save`` files, and knows what the pickled configuration of a released
checkpoint means and which of its variants this package implements. The network's own format is
``HyperNetwork.save_pretrained``.

``torch.load(weights_only=True)`` does the reading, with inert stand-ins for the classes that
released checkpoints pickle. What it does not check is checked here first: that the container is
whole (checksums, sizes, byte order), that the pickle names nothing outside of a short list
(``weights_only`` itself lets a file of 100 bytes ask for a terabyte), and that reading it takes
bounded work.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from v2l_fast.errors import CheckpointError, ConfigError, excerpt
from v2l_fast.files import open_regular
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.outputs import replacing_folder

# torch.compile puts this in front of the names of what it wraps.
COMPILED_PREFIX = "_orig_mod."
EXTRAS = ("hypernet_config", "base_model_name_or_path", "ctx_encoder_args")
# Wider than any model: products of sizes stay far from 64-bit overflow.
MAX_SIZE = 1 << 17
MAX_MODULES = 64
MAX_DEPTH = 512
MAX_KEY = 256


def load(path: str | os.PathLike) -> HyperNetwork:
    """A hypernetwork from a released checkpoint (``.pt``) or a converted directory.

    Returns:
        The network on the CPU in float32, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, broken, unsafe, inconsistent, or uses a variant of
            the released architecture that is not implemented; the message names what.
        ConfigError: a converted directory's config.json is missing or wrong.
    """
    if Path(path).is_dir():
        return HyperNetwork.from_pretrained(path)
    state, extras = _split(load_torch_file(path), path)
    fields = _Fields(path, extras["hypernet_config"], "hypernet_config")
    config = _config(fields, extras["base_model_name_or_path"])
    network = _empty_network(config, state, path)
    if not config.bias_adapter:
        # With use_bias off the released code keeps the bias parameters but never applies them.
        state = {k: v for k, v in state.items() if not k.startswith(("bias_A.", "bias_B."))}
    _check_sharing(network, state, path)
    tensors = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    network.load_checked(tensors, path)
    return network.float().eval()


def convert(checkpoint: str | os.PathLike, directory: str | os.PathLike) -> HyperNetwork:
    """Write a released checkpoint as ``config.json`` and ``model.safetensors``, atomically.

    Returns:
        The network that was written.

    Raises:
        CheckpointError: as :func:`load`, or ``directory`` cannot be written or holds other files.
    """
    network = load(checkpoint)
    with replacing_folder(directory, CheckpointError) as part:
        network.save_pretrained(part)
    return network


def _split(root: Any, path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by their plain names, and the entries of ``EXTRAS``."""
    if not isinstance(root, dict) or not isinstance(root.get("hypernet_config"), Record):
        raise CheckpointError(
            f"{path}: holds no hypernet_config, so it is not a Frames2LoRA checkpoint; "
            "give one as released, or a directory that convert wrote"
        )
    state: dict[str, Tensor] = {}
    for key, value in root.items():
        if key in EXTRAS:
            continue
        if not isinstance(key, str) or not key.isprintable() or len(key) > MAX_KEY:
            raise CheckpointError(f"{path}: {excerpt(key)} is not a parameter name")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {excerpt(key)} is {excerpt(value)}, not a tensor")
        plain = key.replace(COMPILED_PREFIX, "")
        if plain in state:
            raise CheckpointError(f"{path}: {excerpt(plain)} is there twice, compiled and not")
        state[plain] = value
    return state, {name: root.get(name) for name in EXTRAS}


class _Fields:
    """Typed access to a record's fields; errors name the file and the field."""

    def __init__(self, path: str | os.PathLike, record: Any, name: str) -> None:
        if not isinstance(record, Record):
            raise CheckpointError(f"{path}: {name} is {excerpt(record)}, not a configuration")
        self.path, self.name, self.values = path, name, vars(record)

    def error(self, field: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.name}.{field} {problem}")

    def get(self, field: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The field's value; ``default`` stands in for a field that is absent or None."""
        value = self.values.get(field)
        value = default if value is None else value
        if value is None:
            raise self.error(field, "is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(field, f"is {excerpt(value)}, which has the wrong type")
        return value

    def size(self, field: str, default: int | None = None) -> int:
        value = self.get(field, int, default)
        if not 0 <= value <= MAX_SIZE:
            raise self.error(field, f"is {excerpt(value)}, out of range")
        return value

    def same(self, field: str, value: Any, other: str) -> None:
        """Require a redundant field to agree with where its value was read."""
        actual = self.values.get(field, value)
        if type(actual) is not type(value) or actual != value:
            raise self.error(field, f"is {excerpt(actual)}, but {other} says {excerpt(value)}")

    def only(self, field: str, supported: Any, default: Any) -> None:
        """Refuse a variant of the architecture by its field."""
        value = self.values.get(field, default)
        if type(value) is not type(supported) or value != supported:
            raise self.error(
                field, f"is {excerpt(value)}; only {supported!r} is supported (as in all releases)"
            )

    def record(self, field: str) -> _Fields:
        return _Fields(self.path, self.values.get(field), f"{self.name}.{field}")


def _config(fields: _Fields, base: Any) -> HypernetConfig:
    """Translate the pickled configuration, checking it against itself."""
    for name, supported in (
        ("per_layer_processing", False),
        ("use_token_mixing", False),
        ("use_light_weight_lora", False),
        ("per_rank_gen", True),
    ):
        fields.only(name, supported, supported)
    if fields.values.get("extra_modules"):
        raise fields.error("extra_modules", "names modules; only None is supported")
    aggregator, lora = fields.record("aggregator_config"), fields.record("lora_config")
    for field, value in (
        ("aggregator_type", "perceiver"),
        ("layer_to_layer_ctx_encoder", True),
        ("per_rank_gen", True),
        ("num_extra_modules", 0),
    ):
        aggregator.only(field, value, value)

    modules = _target_modules(fields, lora)
    rank, latent_size = lora.size("r"), fields.size("latent_size")
    num_layers = _num_layers(fields)
    aggregator.same("lora_r", rank, "lora_config.r")
    aggregator.same("output_size", latent_size, "latent_size")
    aggregator.same("num_layers", num_layers, "layer_indices")
    aggregator.same("num_modules", len(modules), "lora_config.target_modules")
    base = base or lora.values.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise CheckpointError(
            f"{fields.path}: base_model_name_or_path must be text, got {excerpt(base)}"
        )
    try:
        return HypernetConfig(
            hidden_size=aggregator.size("feature_size"),
            num_layers=num_layers,
            target_modules=modules,
            rank=rank,
            latent_size=latent_size,
            num_latents=aggregator.size("n_latent_queries"),
            num_blocks=aggregator.size("num_blocks"),
            num_self_attn_per_block=aggregator.size("num_self_attn_per_block"),
            shared_weights=aggregator.get("shared_weights", bool),
            # The released loader puts these two in for checkpoints older than the fields.
            num_pre_head_layers=fields.size("num_pre_head_layers", 4),
            bias_adapter=fields.get("use_bias", bool, True),
            scale=float(lora.get("lora_alpha", (int, float))),
            base_model_name_or_path=base,
        )
    except (ConfigError, OverflowError) as error:
        raise CheckpointError(f"{fields.path}: {fields.name}: {error}") from None


def _target_modules(fields: _Fields, lora: _Fields) -> dict[str, tuple[int, int]]:
    """Module name -> (d_in, d_out) of every adapted module."""
    names = lora.get("target_modules", (set, frozenset, list, tuple))
    sizes = fields.get("feature_sizes", (tuple, list))
    if len(sizes) != 2 or not all(isinstance(side, Mapping) for side in sizes):
        raise fields.error("feature_sizes", "is not a pair of tables of input and output sizes")
    if not 0 < len(names) <= MAX_MODULES:
        raise lora.error("target_modules", f"names {len(names)} modules")
    modules = {}
    for name in names:
        # Parameters are stored under these names.
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ParameterDict, name):
            raise lora.error("target_modules", f"names {excerpt(name)}, which is not a module name")
        pair = tuple(side.get(name) for side in sizes)
        if any(type(size) is not int or not 0 < size <= MAX_SIZE for size in pair):
            raise fields.error(
                "feature_sizes", f"gives {name} the sizes {excerpt(pair[0])} and {excerpt(pair[1])}"
            )
        modules[name] = pair
    return modules


def _num_layers(fields: _Fields) -> int:
    """Number of adapted layers; they must be the decoder's layers 0 to L - 1."""
    indices = fields.get("layer_indices", (Tensor, range, list, tuple))
    if isinstance(indices, Tensor):
        if indices.dtype not in (torch.int64, torch.int32) or indices.dim() != 1:
            raise fields.error("layer_indices", "is not a list of integers")
        indices = indices[: MAX_SIZE + 1].tolist()
    if indices[MAX_SIZE:] or list(indices) != list(range(len(indices))):
        raise fields.error("layer_indices", "is not 0, 1, 2, ...; only all layers are supported")
    return len(indices)


def _empty_network(
    config: HypernetConfig, state: Mapping[str, Tensor], path: str | os.PathLike
) -> HyperNetwork:
    """The network without memory for its weights, once ``state`` can be what fills it."""
    layers = config.num_blocks * (1 + config.num_self_attn_per_block) + config.num_pre_head_layers
    if layers > min(len(state), MAX_DEPTH):
        raise CheckpointError(
            f"{path}: its configuration describes {layers} layers, too many for its {len(state)} "
            f"tensors or for the limit of {MAX_DEPTH}"
        )
    with torch.device("meta"):
        network = HyperNetwork(config)
    for key, expected in network.state_dict().items():
        # Keys and values are left to load_checked.
        if key in state and state[key].shape != tuple(expected.shape):
            raise CheckpointError(
                f"{path}: {key} is {list(state[key].shape)}, the configuration says "
                f"{list(expected.shape)}"
            )
    return network


def _check_sharing(
    network: HyperNetwork, state: Mapping[str, Tensor], path: str | os.PathLike
) -> None:
    """Check that the names of a shared layer hold one value, and other parameters do not overlap.

    A view of stride 0 takes no space in the file, and a full copy in the network.
    """
    first: dict[int, str] = {}
    needed: Counter[int] = Counter()
    for key, parameter in network.state_dict(keep_vars=True).items():
        if key not in state:
            continue
        tensor, name = state[key], first.setdefault(id(parameter), key)
        storage = tensor.untyped_storage()
        if name == key:
            needed[storage.data_ptr()] += tensor.numel() * tensor.itemsize
            if needed[storage.data_ptr()] > storage.nbytes():
                raise CheckpointError(
                    f"{path}: its parameters overlap in memory ({key} and others need more bytes "
                    "than they have); do not use it"
                )
        elif not torch.equal(tensor, state[name]):
            raise CheckpointError(
                f"{path}: {key} differs from {name}, but shared_weights says that they are one "
                "parameter"
            )


# --- reading a file without executing it ----------------------------------------------------------

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

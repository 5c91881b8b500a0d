"""Adapters as PEFT directories, which PEFT, vLLM and SGLang read.

PEFT's B is [d_out, r], and its scaling is lora_alpha / r. Ours is s whatever the rank, so s goes
into B (in float32) and lora_alpha = r: the one encoding that all three servers read alike. The
bias adapter is concatenated in rank, so a directory needs nothing else of this project.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from v2l_fast.errors import AdapterError
from v2l_fast.files import read_json, write_json
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_files import check_provenance
from v2l_fast.outputs import replacing_folder
from v2l_fast.tensor_files import load_tensors, save_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# PEFT warns about config keys it does not know and vLLM drops them, so ours are stored with them.
SIDECAR_NAME = "v2l.json"
KEY_START = "base_model.model."
VLM_LAYERS = "model.text_model.layers"
TEXT_LAYERS = "model.layers"
# Where a Llama decoder layer keeps the modules an adapter may name.
SUBMODULES = {
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Variants of LoRA that save_peft never writes and load_peft does not read.
PLAIN_ONLY = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def save_peft(
    adapter: Adapter,
    directory: str | os.PathLike,
    base_model_name_or_path: str,
    dtype: torch.dtype = torch.float32,
    layers: str = VLM_LAYERS,
) -> None:
    """Write ``adapter`` with its bias as a PEFT directory, atomically.

    Args:
        adapter: rank r and bias rank R give a PEFT adapter of rank r + R.
        directory: created; an earlier export there is replaced.
        base_model_name_or_path: exactly the name or path the base model is served under: vLLM's
            resolver compares the strings.
        dtype: of the stored factors. s·B is computed in float32 first.
        layers: name of the decoder's list of layers in the base model; ``TEXT_LAYERS`` for the
            text-only export.

    Raises:
        AdapterError: as :func:`peft_tensors`, or the directory cannot be written.
    """
    tensors, config = peft_tensors(adapter, base_model_name_or_path, dtype, layers)
    sidecar = {
        "rank": config["r"],
        "generated_rank": adapter.rank,
        "scale_in_B": adapter.scale,
        "bias_id": adapter.bias_id,
        "provenance": dict(adapter.provenance),
    }
    with replacing_folder(directory, AdapterError) as part:
        save_tensors(tensors, part / WEIGHTS_NAME)
        for name, record in ((CONFIG_NAME, config), (SIDECAR_NAME, sidecar)):
            write_json(part / name, record)


def peft_tensors(
    adapter: Adapter,
    base_model_name_or_path: str,
    dtype: torch.dtype = torch.float32,
    layers: str = VLM_LAYERS,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration that :func:`save_peft` writes.

    Raises:
        AdapterError: the bias is not attached, the ranks differ between modules, a module is not
            one of a Llama layer, or a value overflows ``dtype``.
    """
    factors_a, factors_b = adapter.merged()
    ranks = {factor.shape[1] for factor in factors_a.values()}
    if len(ranks) > 1 or 0 in ranks:
        raise AdapterError(f"PEFT needs one rank above 0 for all modules, got {sorted(ranks)}")
    (rank,) = ranks
    tensors = {}
    for module, a in factors_a.items():
        if module not in SUBMODULES:
            raise AdapterError(
                f"{module} is not a linear module of a Llama layer: {', '.join(sorted(SUBMODULES))}"
            )
        b = (adapter.scale * factors_b[module].detach().float()).mT
        for index in range(adapter.num_layers):
            key = f"{KEY_START}{layers}.{index}.{SUBMODULES[module]}"
            tensors[f"{key}.lora_A.weight"] = a[index].detach()
            tensors[f"{key}.lora_B.weight"] = b[index]
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{key} is not finite in {dtype}; export in float32 or bfloat16")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(factors_a),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    return tensors, config


def load_peft(directory: str | os.PathLike) -> Adapter:
    """What :func:`save_peft` wrote, as an adapter of scale lora_alpha / r without a bias.

    Raises:
        AdapterError: the directory is incomplete or not of this layout.
    """
    config, factors = _read(directory)
    sidecar = Path(directory) / SIDECAR_NAME
    provenance: Any = _read_json(sidecar).get("provenance", {}) if sidecar.exists() else {}
    if problem := check_provenance(provenance):
        raise AdapterError(f"{sidecar}: {problem}; export the adapter again")
    by_layer: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for site, pair in factors.items():
        parts = site.split(".")
        place = next((i for i, part in enumerate(parts) if re.fullmatch("[0-9]{1,6}", part)), None)
        module = parts[-1]
        if place is None or SUBMODULES.get(module) != ".".join(parts[place + 1 :]):
            raise AdapterError(f"{directory}: {site} is not a linear module of a Llama layer")
        by_layer.setdefault(module, {})[int(parts[place])] = pair
    a, b = {}, {}
    try:
        for module, pairs in by_layer.items():
            if sorted(pairs) != list(range(len(pairs))):
                raise AdapterError(f"{directory}: {module} lacks layers; export the adapter again")
            a[module] = torch.stack([pairs[i][0] for i in range(len(pairs))])
            b[module] = torch.stack([pairs[i][1].mT for i in range(len(pairs))])
    except RuntimeError:
        raise AdapterError(
            f"{directory}: {module} has layers of different shapes; export the adapter again"
        ) from None
    return Adapter(a, b, config["lora_alpha"] / config["r"], provenance=provenance)


def validate_peft(directory: str | os.PathLike, model: nn.Module, base: str | None = None) -> None:
    """Check that a PEFT directory adapts ``model``, whole: PEFT itself only warns.

    With a wrong prefix PEFT finds none of its keys, says so in a warning, and the "adapted" model
    answers as the base does.

    Args:
        model: the base model, without PEFT.
        base: the name the base model is served under; ``model.name_or_path`` when omitted, not
            compared when that is empty.

    Raises:
        AdapterError: naming the first thing that does not fit, and what to do.
    """
    config, factors = _read(directory)
    base = base or getattr(model, "name_or_path", "")
    written_for = config["base_model_name_or_path"]
    if base and written_for != base:
        raise AdapterError(
            f"{directory}: written for the base model {written_for!r}, this one is {base!r}; "
            "export it again with that name, or pass the written name as base if they are the same"
        )
    # PEFT matches whole names or ends of names, in every part of the model.
    ends = tuple(f".{name}" for name in config["target_modules"])
    targets = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f".{name}".endswith(ends)
    }
    for site, (a, b) in factors.items():
        if site not in targets:
            example = next(iter(targets), "no matching module")
            raise AdapterError(
                f"{directory}: the model has no linear module {site} (it has {example}); export "
                "again with the layers prefix of this base"
            )
        linear = targets[site]
        expected = ((config["r"], linear.in_features), (linear.out_features, config["r"]))
        if (tuple(a.shape), tuple(b.shape)) != expected:
            raise AdapterError(
                f"{directory}: {site} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, this "
                f"base and rank need {list(expected[0])} and {list(expected[1])}; export it from "
                "an adapter of this base model"
            )
    # Elsewhere (a vision tower) what PEFT adds is zero.
    decoders = {_stem(site) for site in factors}
    missing = sorted(n for n in targets if n not in factors and _stem(n) in decoders)
    if missing:
        raise AdapterError(
            f"{directory}: lacks {missing[0]}, in all {len(missing)} modules that the model has; "
            "it belongs to another base model, export it for this one"
        )


def _stem(site: str) -> str:
    """The part of a module's name before its layer's number."""
    return re.split(r"\.\d+\.", site, maxsplit=1)[0]


def _read(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """adapter_config.json and module name in the base model -> (lora_A, lora_B)."""
    directory = Path(directory)
    config = _read_json(directory / CONFIG_NAME)
    path = directory / CONFIG_NAME
    targets, rank, alpha = (config.get(k) for k in ("target_modules", "r", "lora_alpha"))
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise AdapterError(f"{path}: target_modules must be a list of names, got {targets!r}")
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"{path}: r must be a positive integer, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterError(f"{path}: lora_alpha must be a finite number, got {alpha!r}")
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise AdapterError(f"{path}: names no base_model_name_or_path; export the adapter again")
    if any(config.get(key) for key in PLAIN_ONLY):
        raise AdapterError(f"{path}: only plain LoRA of one rank is read here")
    tensors, _ = load_tensors(directory / WEIGHTS_NAME, AdapterError)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        site, _, factor = key.removesuffix(".weight").rpartition(".")
        if not key.startswith(KEY_START) or factor not in ("lora_A", "lora_B"):
            raise AdapterError(
                f"{directory}: unexpected key {key}; keys are "
                f"{KEY_START}<module>.lora_A.weight and .lora_B.weight, export the adapter again"
            )
        if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise AdapterError(f"{directory}: {key} is not a finite matrix; export it again")
        pairs.setdefault(site.removeprefix(KEY_START), {})[factor] = tensor
    for site, pair in pairs.items():
        if len(pair) != 2:
            raise AdapterError(f"{directory}: {site} has only {next(iter(pair))}; export it again")
    if not pairs:
        raise AdapterError(f"{directory}: holds no factors; export the adapter again")
    return config, {site: (pair["lora_A"], pair["lora_B"]) for site, pair in pairs.items()}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(
        path,
        error=AdapterError,
        kind=dict,
        missing="name a PEFT directory",
        remedy="export the adapter again",
    )


class VllmFolder:
    """A folder of PEFT directories where vLLM's filesystem resolver finds them.

    vLLM looks up an unknown model name in that folder, so nothing is registered and any number of
    replicas of one base model share it.

    Args:
        folder: value of the replicas' ``VLLM_LORA_RESOLVER_CACHE_DIR``.
        base: exact name under which the replicas serve the base: the resolver compares strings.
        text_only: whether the base is the exported text decoder.
    """

    def __init__(self, folder: str | os.PathLike, base: str, text_only: bool = False) -> None:
        self.folder = Path(folder)
        self._base = base
        self._text_only = text_only

    def write(self, name: str, adapter: Adapter) -> Path:
        """Write an adapter, atomically, to be asked for as ``model=name``; its directory.

        Raises:
            AdapterError: its bias is not attached, or the folder cannot be written.
        """
        layers = TEXT_LAYERS if self._text_only else VLM_LAYERS
        save_peft(adapter, self.folder / name, self._base, layers=layers)
        return self.folder / name

    def remove(self, name: str) -> None:
        """Remove an adapter if it is there. Replicas that have loaded it keep it for now."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def command(self, rank: int) -> str:
        """The shell command that starts a replica.

        Args:
            rank: largest rank of the adapters, including the bias adapter's.

        Raises:
            AdapterError: vLLM does not serve this rank.
        """
        max_rank = next((r for r in VLLM_RANKS if r >= rank), None)
        if max_rank is None:
            raise AdapterError(
                f"rank {rank} exceeds vLLM's limit of {VLLM_RANKS[-1]}; prune the adapter or "
                "compose fewer chunks"
            )
        words = [
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
            "VLLM_PLUGINS=lora_filesystem_resolver",
            f"VLLM_LORA_RESOLVER_CACHE_DIR={shlex.quote(str(self.folder.resolve()))}",
            f"vllm serve {shlex.quote(self._base)} --enable-lora --max-lora-rank {max_rank}",
        ]
        if not self._text_only:
            # Questions have no pixels, so the vision tower need not take memory.
            words.append("--language-model-only")
        return " ".join(words)

"""What is installed, what each missing part would add, and how to install it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

# (distribution names, extra that installs it, purpose). The import name does not identify a
# distribution: flash-attn 2 and 4 share theirs, and nvidia-dali is a placeholder package.
PARTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("torch",), "core", "tensors, autograd, compilation"),
    (("triton",), "core", "GPU kernels"),
    (("transformers",), "core", "the frozen VLM"),
    (("safetensors",), "core", "weights and adapters on disk"),
    (("av",), "core", "video decoding on the CPU, all codecs"),
    (("rich",), "core", "progress and tables"),
    (("typer",), "core", "the command line"),
    (("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "dali", "video decoding on the GPU"),
    (("flash-attn",), "flash", "FlashAttention 2; PyTorch's own attention is used without it"),
    (("torchcodec",), "codec", "an alternative video decoder"),
    (("accelerate",), "train", "training on several GPUs"),
    (("pydantic",), "train", "settings of training runs"),
    (("tensorboard",), "train", "training curves"),
    (("fastapi",), "serve", "the HTTP server"),
    (("uvicorn",), "serve", "its HTTP listener"),
    (("prometheus-client",), "serve", "its metrics"),
    (("python-multipart",), "serve", "its uploads"),
    (("fastapi-offline",), "serve", "its API documentation without a network"),
    (("scipy",), "eval", "confidence intervals"),
    (("matplotlib",), "eval", "plots"),
    (("openai",), "eval", "the judge's client"),
    (("ray",), "ray", "teacher generation and internalizing on a cluster"),
    (("peft",), "dev", "tests of the PEFT export"),
)


# From this version on, ptxas assembles pipelined wgmma products rightly (triton#9433).
PTXAS = (13, 3)


@dataclass(frozen=True)
class Finding:
    """One part of the installation.

    Attributes:
        detail: its versions, or how to install it.
    """

    part: str
    present: bool
    detail: str
    purpose: str


def remedy(module: str) -> str | None:
    """How to install a part, from its import name; None if it is not one of ours."""
    for names, extra, _ in PARTS:
        if module.split(".")[0] in (name.replace("-", "_") for name in names):
            return _install(extra)
    return None


def examine() -> list[Finding]:
    """Examine this machine without changing anything."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores, {memory:.0f} GB"
    findings = [Finding("machine", True, machine, "runs everything"), _gpu(), *_ptxas()]
    for names, extra, purpose in PARTS:
        versions = {name: version for name in names if (version := _version(name))}
        if versions:
            detail = ", ".join(f"{name} {version}" for name, version in versions.items())
            findings.append(Finding(names[0], True, detail, purpose))
        else:
            findings.append(Finding(names[0], False, _install(extra), purpose))
    return findings


def _install(extra: str) -> str:
    return "reinstall v2l_fast" if extra == "core" else f"pip install 'v2l_fast[{extra}]'"


def _gpu() -> Finding:
    purpose = "bfloat16, Triton kernels, decoding on the GPU"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        return Finding("GPU", True, f"{name}, compute capability {major}.{minor}", purpose)
    if torch.version.cuda is None:
        return Finding("GPU", False, "this torch is a CPU build", purpose)
    return Finding("GPU", False, "torch finds no GPU; check the driver with nvidia-smi", purpose)


def _ptxas() -> list[Finding]:
    """The assembler of the Triton kernels; an old one is a finding on Hopper GPUs."""
    try:
        from triton import knobs

        tool = knobs.nvidia.ptxas
        version, path = tool.version, tool.path
    except Exception:
        # Without triton, or without an assembler, which the kernels' own errors report.
        return []
    detail = f"{version}, {path}"
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    sound = not hopper or tuple(map(int, version.split(".")[:2])) >= PTXAS
    if not sound:
        detail += (
            "; before 13.3 it may miscompile pipelined products on this GPU (triton#9433): install "
            "CUDA 13.3 or later and set TRITON_PTXAS_PATH to its bin/ptxas"
        )
    return [Finding("ptxas", sound, detail, "assembles the Triton kernels")]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

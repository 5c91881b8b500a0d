"""Imports point one way, and importing the package costs and needs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import csrc_triton
import v2l_fast

PACKAGES = {"csrc_triton": csrc_triton, "v2l_fast": v2l_fast}

# From the bottom up: a module imports from lower lines only, or from its own entry. Entries name
# a module of v2l_fast or a package with all its modules. What is imported inside a function is
# loaded when it is needed and may point anywhere.
LAYERS = (
    ("csrc_triton", "errors", "compiling", "padding", "hub", "work_units"),
    ("files",),
    ("outputs",),
    ("video", "console"),
    ("tensor_files",),
    ("hypernet",),
    ("interop",),
    ("vlm", "loading"),
    ("generation", "internalizing"),
    ("effect",),
    ("model",),
    ("store",),
    ("data",),
    ("training", "serving"),
    ("evaluation",),
    ("shapes", "doctor"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def sources() -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of everything the packages hold."""
    for module in PACKAGES.values():
        root = Path(module.__file__).parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def entry(module: str) -> str:
    """The line of LAYERS a dotted name belongs to; "" is ``v2l_fast`` itself."""
    top, _, rest = module.partition(".")
    return top if top == "csrc_triton" else rest.partition(".")[0]


def top_level_imports(path: Path) -> Iterator[str]:
    """Our own modules that a file imports when it is itself imported."""
    pending: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import module` may name a module or something inside the package.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                pending.extend(ast.iter_child_nodes(node))
        yield from (name for name in names if name.partition(".")[0] in PACKAGES)


MODULES = list(sources())
NAMES = {name for name, _ in MODULES}


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_down(module, path):
    own = entry(module)
    assert own in LEVEL or module == "v2l_fast", f"{module} has no place in LAYERS"
    for name in top_level_imports(path):
        target = entry(name)
        if name not in NAMES or name == "v2l_fast" or target == own:
            continue
        assert LEVEL[target] < LEVEL.get(own, 0), f"{module} imports {name}"


def test_video_stands_alone():
    for module, path in MODULES:
        if entry(module) == "video":
            used = {entry(name) for name in top_level_imports(path) if name in NAMES}
            assert used <= {"video", "errors", "files", ""}, module


def test_only_vlm_names_a_model_family():
    """Elsewhere no class of a family is imported, but for the type of what is passed around."""
    for module, path in MODULES:
        if entry(module) in ("vlm", "shapes", "interop"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert not any("SmolVLM" in alias.name for alias in node.names), module


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(v2l_fast.__file__).parents[1],
    )
    return set(done.stdout.split())


HEAVY = {
    "transformers", "triton", "av", "safetensors", "huggingface_hub", "tokenizers", "peft",
    "accelerate", "fastapi", "uvicorn", "pydantic", "prometheus_client", "tensorboard", "wandb",
    "scipy", "matplotlib", "openai", "ray", "nvidia", "torchcodec", "typer", "rich", "PIL",
    "num2words", "pytest", "hypothesis",
}  # fmt: skip


def test_importing_the_package_is_instant():
    assert not loaded_by("import v2l_fast; dir(v2l_fast)") & (HEAVY | {"torch", "numpy"})


def test_importing_the_ops_needs_torch_alone():
    extra = loaded_by("import csrc_triton") - loaded_by("import torch, torch.library")
    assert not extra & (HEAVY | {"v2l_fast"})


def test_using_a_model_needs_the_core_dependencies_alone():
    # transformers brings what happens to be installed.
    brought = loaded_by("from transformers import AutoConfig, SmolVLMForConditionalGeneration")
    found = loaded_by("from v2l_fast import *")
    assert not (found - brought) & (HEAVY - {"av", "safetensors"})


def test_every_export_exists():
    for name in v2l_fast.__all__:
        assert getattr(v2l_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        getattr(v2l_fast, "nothing")  # noqa: B009

"""Imports point one way, and importing the package costs and needs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import csrc_triton
import v2l_fast
from v2l_fast._deprecated import RENAMED, new_path

PACKAGES = {"csrc_triton": csrc_triton, "v2l_fast": v2l_fast}

# From the bottom up: a module imports from lower lines only, or from its own entry. Entries name
# a module of v2l_fast or a package with all its modules. What is imported inside a function is
# loaded when it is needed and may point anywhere.
LAYERS = (
    (
        "_deprecated",
        "csrc_triton",
        "errors",
        "device",
        "work_units",
    ),
    ("files",),
    ("outputs",),
    ("video", "console"),
    ("tensor_files",),
    ("hypernet",),
    ("interop",),
    ("loading",),
    ("vlm",),
    ("generation", "pipeline"),
    ("model",),
    ("store", "conversation"),
    ("data",),
    ("training", "serving"),
    ("evaluation",),
    ("shapes",),
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


def imported_names(node: ast.AST) -> list[str]:
    """Dotted names of our own that an import statement may name: modules, or what is in them."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import of {node.module}"
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    else:
        names = []
    return [name for name in names if name.partition(".")[0] in PACKAGES]


def top_level_imports(path: Path) -> Iterator[str]:
    """What a file imports when it is itself imported, or for type checkers."""
    pending: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        yield from imported_names(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(ast.iter_child_nodes(node))


MODULES = list(sources())
NAMES = {name for name, _ in MODULES}
ROOT = Path(v2l_fast.__file__).parents[1]
FOLDERS = ("v2l_fast", "csrc_triton", "bench", "profiling")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_imports_point_down():
    upward = []
    for module, path in MODULES:
        own = entry(module)
        if own not in LEVEL and module != "v2l_fast":
            upward.append(f"{module} is missing in LAYERS")
        for name in top_level_imports(path):
            target = entry(name)
            if name not in NAMES or name == "v2l_fast" or target == own:
                continue
            if LEVEL.get(target, 99) >= LEVEL.get(own, 1):
                upward.append(f"{module} imports {name}")
    assert not upward, "\n".join(upward)


def test_modules_import_each_other_in_no_circle():
    """Imports inside functions and for type checkers count, too."""
    graph = {}
    for module, path in MODULES:
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {name for node in nodes for name in imported_names(node)} & NAMES
        if module == "v2l_fast.hypernet.adapter":
            # Adapter.save_peft, which is deprecated, calls what replaced it.
            names.remove("v2l_fast.interop")
        # `from package import module` imports the module; that the package comes first is no edge.
        graph[module] = {n for n in names if not any(o.startswith(f"{n}.") for o in names)}
    circles, done = [], set()

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            circles.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for name in sorted(graph[module]):
                visit(name, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    assert not circles, "\n".join(circles)


def test_imported_names_exist():
    """Also of imports inside functions, which only a test of the function would find."""
    defined = {}
    for module, path in MODULES:
        names = {name.removeprefix(f"{module}.") for name in NAMES if name.startswith(f"{module}.")}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in node.names}
        defined[module] = names
    defined["v2l_fast"] |= set(v2l_fast.__all__)
    absent = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {name} from {node.module}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in PACKAGES
        for name in (alias.name for alias in node.names)
        if name not in defined.get(node.module, ())
    ]
    assert not absent, "\n".join(absent)


def test_class_names_are_unique():
    places = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    repeated = [f"{name}: {', '.join(files)}" for name, files in places.items() if len(files) > 1]
    assert not repeated, "\n".join(repeated)


def test_no_module_uses_a_deprecated_path():
    old = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imported_names(node)
        if path.name != "test_deprecated.py"
        and (new_path(name) or name.partition(".")[2] in RENAMED)
    ]
    assert not old, "\n".join(old)


def test_video_stands_alone():
    for module, path in MODULES:
        if entry(module) == "video":
            used = {entry(name) for name in top_level_imports(path) if name in NAMES}
            assert used <= {"video", "errors", "files", "_deprecated", ""}, module


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
        cwd=ROOT,
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
    loaded = loaded_by("from v2l_fast import *")
    assert not (loaded - brought) & (HEAVY - {"av", "safetensors"})


def test_every_export_exists():
    for name in v2l_fast.__all__:
        assert getattr(v2l_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        getattr(v2l_fast, "nothing")  # noqa: B009

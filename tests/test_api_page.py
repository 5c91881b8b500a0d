"""``docs/api.md`` shows every public name with its signature and summary, as they are now.

``python -m tests.test_api_page`` writes the page.
"""

import importlib
import inspect
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
INTRODUCTION = """# Public interface

Signatures and summaries; the docstrings have shapes, units and errors. Errors that a user can act
on are subclasses of `v2l_fast.V2LError`. `python -m tests.test_api_page` writes this page, and a
test compares it with the code.
"""
# Section -> module -> names; a class with the methods that users call.
SECTIONS = {
    "Videos, adapters, answers": {
        "v2l_fast": {
            "Video2LoRA": (
                "from_pretrained", "internalize", "internalize_each", "ask", "ask_direct",
                "answer", "answer_direct", "load_clip", "load_adapter", "attach", "effect",
                "compile",
            ),
            "Adapter": (
                "load", "save", "compose", "prune", "without_layers", "norms", "with_bias",
                "merged",
            ),
            "AdapterBatch": (),
            "adapted_linear": (),
        },
        "v2l_fast.video": {
            "load_video": (), "Clip": ("from_frames",), "FrameSampling": ("override",),
            "Limits": (),
        },
        "v2l_fast.generation": {"SamplingParams": ()},
    },
    "Hypernetwork": {
        "v2l_fast": {
            "HypernetConfig": ("from_dict", "to_dict"),
            "HyperNetwork": ("forward", "from_pretrained", "save_pretrained", "bias_adapter"),
        },
    },
    "Interchange": {
        "v2l_fast.interop": {"save_peft": ()},
        "v2l_fast.interop.frames2lora": {"load": (), "convert": ()},
        "v2l_fast.interop.llama": {"export_text_decoder": ()},
    },
    "Ops": {
        "csrc_triton": {
            "lora_linear": (), "perceiver_attention": (), "rank_projection": (),
            "gated_projection": (),
        },
    },
    "Training and many videos": {
        "v2l_fast.training.config": {"load_config": ()},
        "v2l_fast.training.trainer": {"train": ()},
        "v2l_fast.data.internalize": {"internalize_corpus": ()},
    },
    "Conversations that ask": {
        "v2l_fast.conversation": {
            "cper_turn": (), "CperSettings": ("faithful",), "Models": (),
            "State": ("forget",), "Persona": ("update", "forget", "select", "save", "load"),
            "Schema": ("load",), "EndpointModel": (), "TransformersModel": (), "VideoModel": (),
            "load_encoder": (),
        },
    },
}  # fmt: skip


def rendered() -> str:
    parts = [INTRODUCTION]
    for title, modules in SECTIONS.items():
        parts.append(f"## {title}\n")
        for module, names in modules.items():
            for name, methods in names.items():
                item = getattr(importlib.import_module(module), name)
                parts.append(f"### `{module}.{name}`\n\n{described(name, item)}")
                parts += [described(f".{method}", getattr(item, method)) for method in methods]
    return "\n".join(parts)


def described(name: str, item: object) -> str:
    summary = inspect.getdoc(item).partition("\n\n")[0].replace("\n", " ")
    summary = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", summary).replace("``", "`")
    return f"```python\n{signature(name, item)}\n```\n\n{summary}\n"


def signature(name: str, item: object) -> str:
    """One line, or one parameter a line where that is too long."""
    found = inspect.signature(item)
    parameters, keyword_only = [], False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parameters.append("*")
        text = str(parameter.replace(default=parameter.empty)).replace("'", "")
        if parameter.default is not parameter.empty:
            # Objects are shown as "...": their text says nothing, or where they lie in memory.
            plain = isinstance(parameter.default, str | int | float | tuple | None)
            text += f" = {parameter.default!r}" if plain else " = ..."
        parameters.append(text)
    result = "" if inspect.isclass(item) else f" -> {found.return_annotation}".replace("'", "")
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= 96:
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in parameters) + f"){result}"


def test_the_page_shows_the_code_as_it_is():
    assert PAGE.read_text() == rendered(), "run: python -m tests.test_api_page"


if __name__ == "__main__":
    PAGE.write_text(rendered())

"""The examples and the README's Python blocks run as they are printed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import sample_scenes

ROOT = Path(__file__).parents[1]
ARGUMENTS = {
    "ask_about_a_video": ["clip.mp4", "What happens in the video?"],
    "one_batch_many_videos": ["clip.mp4", "other.mp4", "How many objects are there?"],
    "adapters_in_any_decoder": [],
    "hypernetwork_alone": [],
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, scene in zip(("clip.mp4", "other.mp4"), sample_scenes("test", 2, 0), strict=True):
        write_clip(scene, folder / name)
    return folder


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == ARGUMENTS.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example(name, clips, monkeypatch, capsys):
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 40
    monkeypatch.chdir(clips)
    monkeypatch.setattr("sys.argv", [str(path), *ARGUMENTS[name]])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.count("\n") >= 2


def test_python_in_the_readme(clips, tmp_path, monkeypatch):
    """The blocks are run in order, in one namespace; what they leave to the reader is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_bytes((clips / "clip.mp4").read_bytes())
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    namespace: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), namespace)
    adapter = namespace["adapter"]
    config = LlamaConfig(
        vocab_size=64, hidden_size=adapter.B["down_proj"].shape[-1],
        intermediate_size=adapter.A["down_proj"].shape[-1], num_attention_heads=4,
        num_hidden_layers=adapter.A["down_proj"].shape[0],
    )  # fmt: skip
    ids = torch.randint(3, 64, (3, 5))
    namespace |= {
        "any_decoder": LlamaForCausalLM(config).eval(),
        "adapter_a": adapter,
        "adapter_b": adapter.prune(2, by="norm"),
        "batch_of_three": {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 3,
        },
    }  # fmt: skip
    exec(compile(blocks[1], "README.md", "exec"), namespace)

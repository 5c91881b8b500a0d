"""PEFT directories: equal logits in PEFT, and refusal of what PEFT only warns about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, SmolVLMForConditionalGeneration

from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter, BiasAdapter
from v2l_fast.interop import load_peft, save_peft, validate_peft
from v2l_fast.interop.llama import export_text_decoder
from v2l_fast.interop.peft import TEXT_LAYERS

SIZES = {"down_proj": (48, 32), "o_proj": (32, 32)}


@pytest.fixture
def adapter() -> Adapter:
    """Rank 3 and bias rank 2 on two modules, scale not a power of two."""
    generator = torch.Generator().manual_seed(1)

    def factors(rank: int, side: int) -> dict[str, torch.Tensor]:
        return {
            module: torch.randn(3, rank, sizes[side], generator=generator) * 0.2
            for module, sizes in SIZES.items()
        }

    bias = BiasAdapter(factors(2, 0), factors(2, 1))
    return Adapter(factors(3, 0), factors(3, 1), 4.7, bias, provenance={"sha256": "ab"})


def manual_logits(model: nn.Module, layers: nn.ModuleList, adapter: Adapter, ids: Any) -> Any:
    """y = x Wᵀ + s (x Aᵀ) B on every site, by hooks."""
    a, b = adapter.merged()
    hooks = []
    for index, layer in enumerate(layers):
        for module, site in (("down_proj", layer.mlp), ("o_proj", layer.self_attn)):
            factors = (a[module][index], b[module][index])
            hooks.append(
                getattr(site, module).register_forward_hook(
                    lambda _, x, y, f=factors: y + adapter.scale * (x[0] @ f[0].mT) @ f[1]
                )
            )
    try:
        return model(input_ids=ids).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[1, 5, 9, 30, 2, 7]])


@torch.no_grad()
def test_peft_gives_our_logits(
    base_model: SmolVLMForConditionalGeneration, adapter: Adapter, ids: Any, tmp_path: Path
) -> None:
    ours = manual_logits(base_model, base_model.model.text_model.layers, adapter, ids)
    base = base_model(input_ids=ids).logits
    save_peft(adapter, tmp_path / "video", "tiny/base")
    validate_peft(tmp_path / "video", base_model)
    loaded = PeftModel.from_pretrained(base_model, tmp_path / "video")
    theirs = loaded(input_ids=ids).logits
    loaded.unload()
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (ours - base).abs().max() > 0.1


@torch.no_grad()
def test_peft_on_the_text_only_export(
    base_model: SmolVLMForConditionalGeneration, adapter: Adapter, ids: Any, tmp_path: Path
) -> None:
    export_text_decoder(base_model, tmp_path / "llama")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    ours = manual_logits(base_model, base_model.model.text_model.layers, adapter, ids)
    save_peft(adapter, tmp_path / "video", str(tmp_path / "llama"), layers=TEXT_LAYERS)
    validate_peft(tmp_path / "video", llama)
    theirs = PeftModel.from_pretrained(llama, tmp_path / "video")(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_layout(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="v2l_fast.interop.save_peft"):
        adapter.save_peft(tmp_path / "video", "tiny/base")
    config = json.loads((tmp_path / "video" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert config["target_modules"] == ["down_proj", "o_proj"]
    assert config["base_model_name_or_path"] == "tiny/base"
    sidecar = json.loads((tmp_path / "video" / "v2l.json").read_text())
    assert (sidecar["generated_rank"], sidecar["provenance"]) == (3, {"sha256": "ab"})
    tensors = load_file(tmp_path / "video" / "adapter_model.safetensors")
    assert len(tensors) == 12
    start = "base_model.model.model.text_model.layers.2.mlp.down_proj"
    assert torch.equal(tensors[f"{start}.lora_A.weight"][:3], adapter.A["down_proj"][2])
    expected = (adapter.scale * adapter.B["down_proj"][2]).mT
    assert torch.equal(tensors[f"{start}.lora_B.weight"][:, :3], expected)


def test_load_gives_the_update_back(adapter: Adapter, tmp_path: Path) -> None:
    save_peft(adapter, tmp_path / "video", "tiny/base", dtype=torch.bfloat16)
    back = load_peft(tmp_path / "video")
    assert back.scale == 1 and back.rank == 5 and back.provenance == {"sha256": "ab"}
    a, b = adapter.merged()
    for module in SIZES:
        assert torch.equal(back.A[module], a[module].bfloat16())
        assert torch.equal(back.B[module], (4.7 * b[module]).bfloat16())


def test_save_refuses(adapter: Adapter, tmp_path: Path) -> None:
    def check(bad: Adapter, says: str, **kwargs: Any) -> None:
        with pytest.raises(AdapterError, match=says):
            save_peft(bad, tmp_path / "video", "tiny/base", **kwargs)
        assert not list(tmp_path.iterdir())

    one = {"down_proj": torch.ones(3, 2, 48)}, {"down_proj": torch.ones(3, 2, 32)}
    check(Adapter(*one, 1e6), "not finite in torch.float16", dtype=torch.float16)
    check(Adapter({"fc1": one[0]["down_proj"]}, {"fc1": one[1]["down_proj"]}, 1.0), "fc1")
    check(Adapter(*one, 1.0, None, "0123"), "bias adapter")
    check(
        Adapter({"down_proj": torch.ones(3, 0, 48)}, {"down_proj": torch.ones(3, 0, 32)}, 1.0),
        "rank",
    )
    mixed = {**one[0], "o_proj": torch.ones(3, 4, 32)}, {**one[1], "o_proj": torch.ones(3, 4, 32)}
    check(Adapter(*mixed, 1.0), "one rank")


def test_validate_refuses(
    base_model: SmolVLMForConditionalGeneration, adapter: Adapter, tmp_path: Path
) -> None:
    directory = tmp_path / "video"

    def check(says: str, model: nn.Module = base_model, **kwargs: Any) -> None:
        with pytest.raises(AdapterError, match=says) as error:
            validate_peft(directory, model, **kwargs)
        assert "\n" not in str(error.value)

    def edit_config(**values: Any) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    check("no such file")
    save_peft(adapter, directory, "tiny/base", layers=TEXT_LAYERS)
    check("no linear module model.layers.0.*layers prefix")
    save_peft(adapter, directory, "tiny/base")
    validate_peft(directory, base_model, base="tiny/base")
    check("written for the base model 'tiny/base', this one is 'other'", base="other")
    edit_config(r=6)
    check("lora_A")
    edit_config(r=5, target_modules="all-linear")
    check("target_modules must be a list")
    edit_config(target_modules=["down_proj", "o_proj"], use_rslora=True)
    check("plain LoRA")

    save_peft(
        Adapter(*({m: t[:2] for m, t in f.items()} for f in (adapter.A, adapter.B)), 1.0),
        directory,
        "b",
    )
    check("lacks model.text_model.layers.2.mlp.down_proj, in all 2 modules")

    save_peft(adapter, directory, "tiny/base")
    path = directory / "adapter_model.safetensors"
    # Older safetensors map the file into memory, and this test writes over it.
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    key = next(iter(tensors))
    for change, says in (
        ({key: tensors[key][:, :-1].contiguous()}, "lora_"),
        ({key: tensors[key] * torch.nan}, "not a finite matrix"),
        ({"extra.weight": torch.ones(1)}, "unexpected key extra.weight"),
    ):
        save_file(tensors | change, path)
        check(says)
    save_file({k: t for k, t in tensors.items() if k != key}, path)
    check("has only")
    path.write_bytes(path.read_bytes()[:100])
    check("safetensors")

"""SmolVLM prompts and vision against transformers' own model; loading and its errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.golden import relative
from v2l_fast.errors import CheckpointError, ConfigError
from v2l_fast.video.preprocess import frame_views, normalize
from v2l_fast.vlm import load_backbone, smolvlm


def views(clip) -> torch.Tensor:
    return frame_views(clip.frames, 32, 32).views


@torch.no_grad()
def test_prompt_with_video_equals_transformers(backbone, clips):
    prompt = backbone.video_prompt(
        backbone.encode(clips[0], 32),
        "Internalize this video for later captioning.",
        answer_follows=False,
    )
    pixels = normalize(views(clips[0]), torch.float32)
    assert prompt.visual_tokens == 3 * backbone.tokens_per_view == 12
    features = list(backbone.decoder.layer_inputs(prompt.embeddings[None]))
    # The same tokens through transformers' forward, which merges the images itself.
    ids = _ids_of(backbone, clips[0], "Internalize this video for later captioning.")
    expected = backbone.model(
        input_ids=ids[None],
        pixel_values=pixels[None],
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    assert len(prompt) == len(ids)
    for actual, reference in zip(features, expected, strict=False):
        assert relative(actual, reference) <= 3e-6


def _ids_of(backbone, clip, text) -> torch.Tensor:
    shown = smolvlm.video_text(
        len(clip.frames), clip.timestamps, clip.duration, 0, 0, backbone.tokens_per_view
    )
    return torch.tensor(backbone.prompt_builder.ids(smolvlm.chat(shown + text, False)))


@torch.no_grad()
def test_views_are_encoded_alone_and_in_bounded_chunks(monkeypatch, backbone, clips):
    all_views = torch.cat([views(clip) for clip in clips])
    whole = backbone.encode_views(all_views)
    assert whole.shape == (6, backbone.tokens_per_view, backbone.hidden_size)
    calls = []
    encode = type(backbone).encode_pixels

    def counted(self, pixels):
        calls.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(backbone, "_encode_pixels", counted)
    monkeypatch.setattr(backbone, "views_per_unit", 4)
    assert relative(backbone.encode_views(all_views), whole) <= 3e-6
    assert calls == [4, 2]
    for index in range(6):
        alone = backbone.encode_views(all_views[index, None])
        assert relative(alone[0], whole[index]) <= 3e-6


def test_questions_have_no_visual_tokens(backbone, clips):
    assert backbone.question("what happens?").visual_tokens == 0
    direct = backbone.video_prompt(backbone.encode(clips[1], 32), "what happens?")
    assert direct.visual_tokens == 4 and len(direct) > len(backbone.question("what happens?"))


def test_tiled_frames(backbone):
    """Above the tower's size a frame becomes tiles and a global view."""
    prompt = backbone.video_prompt(
        backbone.encode(tiny.clip(2, 0, height=48, width=64), 64),
        "what happens?",
        answer_follows=False,
    )
    assert prompt.visual_tokens == 2 * (2 * 2 + 1) * backbone.tokens_per_view


def test_a_prompt_does_not_depend_on_earlier_ones(backbone, clips):
    first = backbone.video_prompt(
        backbone.encode(clips[0], 32), "what happens?", answer_follows=False
    ).embeddings
    backbone.video_prompt(backbone.encode(clips[2], 32), "which color is it?", answer_follows=False)
    again = backbone.video_prompt(
        backbone.encode(clips[0], 32), "what happens?", answer_follows=False
    ).embeddings
    assert torch.equal(first, again)
    table = backbone.decoder.embed(torch.arange(10)).clone()
    backbone.question("what happens?").embeddings.fill_(0)
    assert torch.equal(backbone.decoder.embed(torch.arange(10)), table)


def test_image_tokens_and_features_must_agree(backbone):
    ids = torch.tensor(backbone.prompt_builder.ids("<image><image> what"))
    with pytest.raises(ConfigError, match="2 image tokens in the prompts for 4 visual features"):
        backbone.embed(ids, [torch.zeros(1, 4, 32)])


def test_stop_ids_are_those_of_generation_config_and_tokenizer(backbone):
    assert backbone.stop_ids == (3,)


def test_linear_layers_by_name(backbone):
    assert backbone.linear(1, "down_proj").in_features == 48
    assert backbone.linear(2, "q_proj").out_features == 32
    for name in ("nothing", "act_fn", "training"):
        with pytest.raises(CheckpointError, match="no linear layer"):
            backbone.linear(0, name)


# --- loading --------------------------------------------------------------------------------------


@torch.no_grad()
def test_round_trip(pair, backbone):
    back = load_backbone(pair / "base")
    text = "<|im_start|>User: what happens?<end_of_utterance>\nAssistant:"
    assert back.name_or_path == str(pair / "base")
    assert back.stop_ids == backbone.stop_ids
    ids = torch.tensor(backbone.prompt_builder.ids(text))
    assert torch.equal(torch.tensor(back.prompt_builder.ids(text)), ids)
    ours, theirs = (b.decoder.forward(b.decoder.embed(ids[None])) for b in (back, backbone))
    assert torch.equal(ours, theirs)
    half = load_backbone(pair / "base", dtype=torch.bfloat16)
    assert half.decoder.dtype == torch.bfloat16


def _edit_config(base, **changes) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _drop_a_weight(base) -> None:
    path = base / "model.safetensors"
    state = load_file(path)
    del state["model.text_model.layers.1.mlp.down_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})


BREAKS = {
    "no config": lambda base: (base / "config.json").unlink(),
    "config is not JSON": lambda base: (base / "config.json").write_text("{"),
    "another family": lambda base: _edit_config(base, model_type="llama"),
    "unknown family": lambda base: _edit_config(base, model_type="nothing-known"),
    "no weights": lambda base: (base / "model.safetensors").unlink(),
    "empty weights": lambda base: (base / "model.safetensors").write_bytes(b""),
    "weights that are text": lambda base: (base / "model.safetensors").write_text("weights"),
    "truncated weights": lambda base: (base / "model.safetensors").write_bytes(
        (base / "model.safetensors").read_bytes()[:20000]
    ),
    "a missing weight": _drop_a_weight,
    "no tokenizer": lambda base: [p.unlink() for p in base.glob("tokenizer*")],
    "broken tokenizer": lambda base: (base / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_folders(broken, pair):
    base = pair / "base"
    BREAKS[broken](base)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(base)
    assert str(base) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_name(tmp_path):
    for name in (tmp_path / "missing", "nobody/nothing"):
        with pytest.raises(CheckpointError, match="cannot read the base model's config"):
            load_backbone(name)


@pytest.mark.parametrize("side", [4, 6, 27, 32])
def test_patches_of_a_full_view_are_numbered_in_order(side):
    """At the sides of all models here; 27 is the 2.2B shape's, which bfloat16 gets wrong."""
    assert smolvlm._patch_positions(side).tolist() == list(range(side**2))


@pytest.mark.parametrize(("device", "settings"), [("cuda", [False]), ("cpu", [])])
def test_loading_turns_off_attention_that_plans_for_every_length(
    device, settings, pair, monkeypatch
):
    """cuDNN's, which PyTorch prefers on Hopper."""
    calls = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    monkeypatch.setattr(smolvlm.SmolVLM, "from_pretrained", lambda *_, device, dtype: device)
    assert load_backbone(pair / "base", device=device) == device
    assert calls == settings

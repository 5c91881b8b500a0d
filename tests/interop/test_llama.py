"""The text-only export answers as the VLM does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

from v2l_fast.errors import ConfigError
from v2l_fast.interop.llama import export_text_decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_equal(
    base_model: SmolVLMForConditionalGeneration, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(base_model).to(dtype)
    export_text_decoder(model, tmp_path / "llama")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    ids = torch.tensor([[1, 5, 9, 30, 2, 7], [3, 3, 3, 8, 1, 0]])
    assert llama.dtype == dtype
    assert torch.equal(llama(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not any("vision" in name for name, _ in llama.named_parameters())


@torch.no_grad()
def test_tied_head_stays_tied(base_model: SmolVLMForConditionalGeneration, tmp_path: Path) -> None:
    model = copy.deepcopy(base_model)
    model.lm_head.weight = model.get_input_embeddings().weight
    export_text_decoder(model, tmp_path / "llama")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    ids = torch.tensor([[1, 5, 9]])
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert torch.equal(llama(input_ids=ids).logits, model(input_ids=ids).logits)


def test_tokenizer_goes_along(base_model: SmolVLMForConditionalGeneration, tmp_path: Path) -> None:
    words = WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="[UNK]")
    tokenizer.chat_template = "{{ messages }}"
    export_text_decoder(base_model, tmp_path / "llama", tokenizer)
    back = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert back.vocab_size == 3 and back.chat_template == "{{ messages }}"


def test_other_decoders_are_refused(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    with pytest.raises(ConfigError, match="gpt2"):
        export_text_decoder(model, tmp_path / "llama")
    assert not list(tmp_path.iterdir())

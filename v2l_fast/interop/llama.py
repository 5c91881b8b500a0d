"""The text decoder of a VLM as a plain Llama model on disk.

Answering from an adapter needs no vision tower. Without it the base is smaller and is served by
everything that serves Llama; adapters for it are exported with ``layers=peft.TEXT_LAYERS``.
"""

from __future__ import annotations

import copy
import os

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from v2l_fast.errors import ConfigError
from v2l_fast.outputs import replacing_folder


def export_text_decoder(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write the decoder and LM head of ``model`` as ``LlamaForCausalLM``, atomically.

    Logits of the export equal those of ``model`` on text, in the dtype of its parameters.

    Args:
        model: a VLM of transformers with a Llama text decoder.
        directory: created; an earlier export there is replaced.
        tokenizer: written to the same directory, with its chat template.

    Raises:
        ConfigError: the decoder is not a Llama, or the directory cannot be written.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    kind = getattr(decoder.config, "model_type", None)
    if kind != "llama" or head is None:
        raise ConfigError(f"the text decoder is of type {kind!r}; only a llama can be exported")
    config = LlamaConfig(**decoder.config.to_dict())
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = head.weight.dtype
    # The VLM's own config, not its text part's, says whether the LM head is the embedding.
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    state = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    state |= {f"lm_head.{name}": value for name, value in head.state_dict().items()}
    llama.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        llama.tie_weights()
    source = getattr(model, "generation_config", None)
    llama.generation_config = GenerationConfig() if source is None else copy.deepcopy(source)
    with replacing_folder(directory, ConfigError) as part:
        llama.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)

"""The tiny vision-language model: transformers' own SmolVLM classes at toy sizes.

Responsible for its configuration and for turning frames into pixel values and visual tokens.
Training is `train_vlm`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.llama.configuration_llama import LlamaConfig

IMAGE_SIZE = 48
TOKENS_PER_FRAME = 4


def shapes_vlm_config(
    vocab_size: int, image_token_id: int, pad_token_id: int, bos_token_id: int, eos_token_id: int
) -> SmolVLMConfig:
    """SmolVLM with a 64-wide two-layer vision tower and a 96-wide four-layer text decoder."""
    special = dict(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **special,
    )
    vision = dict(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    return SmolVLMConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        scale_factor=3,
        image_token_id=image_token_id,
        tie_word_embeddings=True,
        **special,
    )


def pixel_values(frames: Tensor) -> Tensor:
    """uint8 or float frames in 0..255 to the model's range: (x - 127.5) / 127.5, float32."""
    return (frames.float() - 127.5) / 127.5


def visual_tokens(model: SmolVLMForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Connector outputs [N, tokens per frame, D] of pixel values [N, 3, H, W]."""
    core = model.model
    return core.connector(core.vision_model(pixel_values=pixels).last_hidden_state)


def video_tokens(model: SmolVLMForConditionalGeneration, frames: Tensor) -> Tensor:
    """Visual tokens [B, F, T, D] of frames [B, F, 3, H, W] in 0..255."""
    tokens = visual_tokens(model, pixel_values(frames.flatten(0, 1)))
    return tokens.unflatten(0, frames.shape[:2])


def freeze(module: nn.Module) -> None:
    """Evaluation mode, no gradients."""
    module.eval()
    module.requires_grad_(False)


def seeded_model(config: SmolVLMConfig, seed: int) -> SmolVLMForConditionalGeneration:
    """A freshly initialized model that depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmolVLMForConditionalGeneration(config)

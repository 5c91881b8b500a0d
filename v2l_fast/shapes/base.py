"""The tiny VLM on disk: a folder like any SmolVLM checkpoint, so nothing treats it specially."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, SmolVLMForConditionalGeneration

from v2l_fast.files import write_json
from v2l_fast.shapes.tokenizer import build_tokenizer
from v2l_fast.shapes.vlm import IMAGE_SIZE, seeded_model, shapes_vlm_config
from v2l_fast.vlm.smolvlm import SmolVLM

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "shapes"
BASE_FOLDER = ASSETS / "base"
HYPERNET_FOLDER = ASSETS / "hypernet"

_PREPROCESSOR = {
    "image_processor_type": "SmolVLMImageProcessor",
    "processor_class": "SmolVLMProcessor",
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": IMAGE_SIZE},
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": IMAGE_SIZE},
    "video_sampling": {
        "fps": 1,
        "max_frames": 64,
        "video_size": {"longest_edge": IMAGE_SIZE},
    },
}


def new_base(seed: int) -> tuple[SmolVLMForConditionalGeneration, PreTrainedTokenizerFast]:
    """An untrained model and its tokenizer."""
    tokenizer = build_tokenizer()
    config = shapes_vlm_config(
        vocab_size=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return seeded_model(config, seed), tokenizer


def save_base(
    model: SmolVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: str | Path
) -> None:
    """Write weights in bfloat16, config, generation config, tokenizer and preprocessor config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.dtype
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(dtype)
    tokenizer.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", _PREPROCESSOR)


def load_base(folder: str | Path = BASE_FOLDER) -> SmolVLM:
    """The frozen model as any other backbone, in float32.

    Raises CheckpointError when the folder is missing or incomplete.
    """
    return SmolVLM.from_pretrained(folder)

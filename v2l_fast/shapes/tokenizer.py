"""A word-level tokenizer for the shapes world that accepts the real prompt text.

Responsible for the vocabulary: SmolVLM2's special tokens under their own names, whole prompt
phrases as single tokens (so a tiny decoder spends its context on frames, not boilerplate), and the
words of `language`. Text is lower-cased; white space only separates tokens, except for the
prompt's line breaks.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from v2l_fast.shapes.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES
from v2l_fast.vlm.smolvlm_prompt import (
    END_OF_UTTERANCE,
    FAKE_TOKEN,
    GLOBAL_TOKEN,
    IMAGE_TOKEN,
    row_col_token,
    spell_number,
)

PAD_TOKEN = "<pad>"
UNK_TOKEN = "<unk>"
BOS_TOKEN = "<|im_start|>"
MAX_TILES = 4
MAX_SECONDS = 120
MAX_FRAMES = 64

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}"
    "{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_PHRASES = (
    "internalize this video for later captioning.",
    "you are provided the following series of",
    "frames from a",
    "[h:mm:ss] video.\n",
    "user:",
    "assistant:",
    "\n\n",
    "\n",
)
_WORDS = """
    first then a on background moves stays describe the video what happens in caption this color is
    how many objects are there shape size object second does move which comes or where start end
    it of an and it's zero top middle center bottom yes no
""".split()
_PUNCTUATION = (".", ",", "?", "!", ":", "'")


def special_tokens() -> list[str]:
    """All special tokens, in id order."""
    tiles = [row_col_token(r, c) for r in range(1, MAX_TILES + 1) for c in range(1, MAX_TILES + 1)]
    named = [PAD_TOKEN, UNK_TOKEN, BOS_TOKEN, END_OF_UTTERANCE, FAKE_TOKEN, GLOBAL_TOKEN]
    return [*named, IMAGE_TOKEN, *tiles]


# Words that the second stage of the base model adds, after all others.
ADDED_WORDS = ("none", "motion")


def vocabulary(added: tuple[str, ...] = ()) -> list[str]:
    """Every token, in id order; `added` words come last."""
    clocks = [f"\nframe from {s // 60:02d}:{s % 60:02d}:" for s in range(MAX_SECONDS)]
    durations = [f"0:{s // 60:02d}:{s % 60:02d}" for s in range(MAX_SECONDS)]
    numbers = [spell_number(n) for n in range(1, MAX_FRAMES + 1)]
    names = [*BACKGROUNDS, *COLORS, *SHAPES, *SIZES, *MOTIONS]
    tokens = [
        *special_tokens(),
        *_PHRASES,
        *clocks,
        *durations,
        *numbers,
        *names,
        *_WORDS,
        *_PUNCTUATION,
        *added,
    ]
    return list(dict.fromkeys(tokens))


def build_tokenizer(added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer, ready for `save_pretrained`; `added`: see :func:`vocabulary`."""
    core = Tokenizer(
        models.WordLevel(
            {token: i for i, token in enumerate(vocabulary(added))}, unk_token=UNK_TOKEN
        )
    )
    core.normalizer = normalizers.Lowercase()
    pieces = [
        r"\nframe from [0-9]+:[0-9]+:",
        r"[0-9]+:[0-9]+:[0-9]+",
        *(re.escape(phrase).replace("\\\n", r"\n").replace("\\ ", " ") for phrase in _PHRASES),
        r"[a-z]+(?:-[a-z]+)?",
        r"[0-9]+",
        r"[^\sa-z0-9]",
    ]
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join(pieces)), behavior="removed", invert=True
    )
    # This decoder joins words with spaces and removes those before punctuation.
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=END_OF_UTTERANCE,
        additional_special_tokens=special_tokens()[4:],
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

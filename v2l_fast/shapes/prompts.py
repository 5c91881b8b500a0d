"""Token ids of the shapes world's prompts, built from the real prompt text.

A conversation is a prefix (the opening of the user's turn, with or without a video) followed by
exactly one turn. `prefix_ids + turn_ids` equals tokenizing the whole text at once, which lets many
turns share one prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from v2l_fast.hypernet.config import INSTRUCTION
from v2l_fast.shapes.render import CLIP_SECONDS, TIMESTAMPS
from v2l_fast.shapes.vlm import TOKENS_PER_FRAME
from v2l_fast.vlm.smolvlm_prompt import chat, video_text


def shapes_video_text() -> str:
    """What stands for a shapes clip in the user's turn: eight untiled frames."""
    return video_text(len(TIMESTAMPS), TIMESTAMPS, CLIP_SECONDS, 0, 0, TOKENS_PER_FRAME)


@dataclass(frozen=True)
class Prompts:
    """Prompt ids under one tokenizer, remembered by text."""

    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        found = self._memory.get(text)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._memory[text] = found
        return found

    @cached_property
    def _memory(self) -> dict[str, list[int]]:
        return {}

    @cached_property
    def video_prefix(self) -> list[int]:
        return self.ids(chat(shapes_video_text(), False).removesuffix("<end_of_utterance>\n"))

    @cached_property
    def text_prefix(self) -> list[int]:
        return self.ids(chat("", False).removesuffix("<end_of_utterance>\n"))

    @cached_property
    def context(self) -> list[int]:
        """`[video] + instruction` as the hypernetwork's context pass reads it."""
        return self.video_prefix + self.ids(f"{INSTRUCTION}<end_of_utterance>\n")

    def question(self, text: str) -> list[int]:
        """The rest of the user's turn and the assistant's opening."""
        return self.ids(f"{text}<end_of_utterance>\nAssistant:")

    def answer(self, text: str) -> list[int]:
        return self.ids(f" {text}<end_of_utterance>")

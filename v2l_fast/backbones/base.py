"""What the rest of the package may ask of a frozen VLM, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from v2l_fast.backbones.decoder import Decoder
from v2l_fast.video import VideoClip


@dataclass(frozen=True)
class Prompt:
    """An embedded prompt [T, D] and how many of its tokens stand for pixels."""

    embeddings: Tensor
    visual_tokens: int

    def __len__(self) -> int:
        return self.embeddings.shape[0]


class Backbone(Protocol):
    """A frozen VLM.

    Attributes:
        model: transformers' model.
        tokenizer: its tokenizer.
        decoder: its text decoder, run layer by layer.
        name_or_path: where it came from.
        preprocessing: name and version of the rules that turn frames into prompts.
        stop_ids: token ids that end an answer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    name_or_path: str
    preprocessing: str
    stop_ids: tuple[int, ...]

    @property
    def hidden_size(self) -> int:
        """D, width of the decoder."""

    def linear(self, layer: int, module: str) -> nn.Linear:
        """A decoder layer's linear layer by its name, e.g. ``down_proj``.

        Raises:
            CheckpointError: the decoder has no such layer.
        """

    def question(self, text: str) -> Prompt:
        """A question without a video; the model's answer follows."""

    def question_about(self, clip: VideoClip, text: str, longest_edge: int) -> Prompt:
        """A question with the video in context: the direct baseline."""

    def context(self, clip: VideoClip, instruction: str, longest_edge: int) -> Prompt:
        """The pass whose hidden states become the adapter: video and instruction, no answer."""

    def decode(self, ids: list[int]) -> str:
        """Ids of an answer -> text without special tokens and surrounding spaces."""

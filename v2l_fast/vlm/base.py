"""What the rest of the package may ask of a frozen VLM, whatever its family."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from v2l_fast.video import Clip, FrameViews
from v2l_fast.video.preprocess import frame_tiles, frame_views_in_groups
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.work_units import WorkUnit


@dataclass(frozen=True)
class Prompt:
    """An embedded prompt.

    Attributes:
        embeddings: [T, D].
        visual_tokens: how many of its tokens stand for pixels.
        visual: [T] bool, which ones; None when there are none.
    """

    embeddings: Tensor
    visual_tokens: int
    visual: Tensor | None = None

    def __len__(self) -> int:
        return self.embeddings.shape[0]


class PromptBuilder(Protocol):
    """Prompts as token ids, and what pixels they need; picklable, holds no weights.

    Attributes:
        tile_size: M, side of the square views of the vision tower.
        tokens_per_view: image tokens, and features, of one view.
    """

    tile_size: int
    tokens_per_view: int

    def question(self, text: str) -> list[int]:
        """A question without a video; the model's answer follows."""

    def answer(self, text: str, finished: bool = True) -> list[int]:
        """What the model says after a question; the stop token last when it is `finished`."""

    def video_prompt(
        self,
        timestamps: Sequence[float],
        duration: float,
        rows: int,
        cols: int,
        text: str,
        answer_follows: bool,
    ) -> list[int]:
        """Video and text in the user's turn, one image token for each feature of each view.

        timestamps, duration: seconds, of the clip. rows, cols: tiles of a frame, 0 when not split.
        """

    def text_prefix(self) -> list[int]:
        """What :meth:`question` begins with, whatever is asked."""

    def text_prefix_with_video(
        self, timestamps: Sequence[float], duration: float, rows: int, cols: int
    ) -> list[int]:
        """What stands in place of :meth:`text_prefix` where the video is in context."""


@dataclass(frozen=True)
class EncodedVideo:
    """A video once the vision tower has seen it: what a cache of vision features keeps.

    Attributes:
        features: [V, t, D] connector outputs of its views, frame by frame.
        timestamps: seconds, one a frame.
        duration: seconds of the source.
        rows, cols: tiles of a frame, 0 when it is not split.
    """

    features: Tensor
    timestamps: tuple[float, ...]
    duration: float
    rows: int
    cols: int


def iter_resize(
    frames: Tensor, longest_edge: int, tile_size: int
) -> Generator[WorkUnit, None, FrameViews]:
    """Frames to views; yields "decode" between groups of large frames."""
    groups = frame_views_in_groups(frames, longest_edge, tile_size)
    while True:
        try:
            done, total = next(groups)
        except StopIteration as end:
            return end.value
        yield "decode", done, total


def prompt_ids(
    prompt_builder: PromptBuilder, clip: Clip, text: str, longest_edge: int, answer_follows: bool
) -> list[int]:
    """Token ids of a prompt with the clip in it, before its frames are resized or encoded."""
    height, width = clip.frames.shape[-2:]
    tiles = frame_tiles(height, width, longest_edge, prompt_builder.tile_size)
    return prompt_builder.video_prompt(clip.timestamps, clip.duration, *tiles, text, answer_follows)


def visual_tokens(prompt_builder: PromptBuilder, clip: Clip, longest_edge: int) -> int:
    """How many tokens stand for the clip's pixels."""
    rows, cols = frame_tiles(*clip.frames.shape[-2:], longest_edge, prompt_builder.tile_size)
    return len(clip.frames) * (rows * cols + 1) * prompt_builder.tokens_per_view


class Backbone(Protocol):
    """A frozen VLM.

    Attributes:
        model: transformers' model.
        tokenizer: its tokenizer.
        decoder: its text decoder, run layer by layer.
        prompt_builder: its prompts as token ids, without the model.
        name_or_path: where it came from.
        preprocessing: name and version of the rules that turn frames into prompts.
        stop_ids: token ids that end an answer.
        views_per_unit: views that one unit of work encodes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    prompt_builder: PromptBuilder
    name_or_path: str
    preprocessing: str
    stop_ids: tuple[int, ...]
    views_per_unit: int

    @property
    def hidden_size(self) -> int:
        """D, width of the decoder."""

    def compile(self, backend: str = "inductor") -> None:
        """Compile vision encoding and decoder layers; numbers stay, to rounding."""

    def linear(self, layer: int, module: str) -> nn.Linear:
        """A decoder layer's linear layer by its name, e.g. ``down_proj``.

        Raises:
            CheckpointError: the decoder has no such layer.
        """

    def question(self, text: str) -> Prompt:
        """A question without a video; the model's answer follows."""

    def question_about(self, clip: Clip, text: str, longest_edge: int) -> Prompt:
        """A question with the video in context: the direct baseline."""

    def context(self, clip: Clip, instruction: str, longest_edge: int) -> Prompt:
        """The pass whose hidden states become the adapter: video and instruction, no answer."""

    def encode(self, clip: Clip, longest_edge: int) -> EncodedVideo:
        """Vision tower and connector, once for any number of prompts."""

    def encode_views(self, views: Tensor) -> Tensor:
        """Vision tower and connector over views of any videos: uint8 [V, 3, M, M] -> [V, t, D]."""

    def iter_encode(self, clip: Clip, longest_edge: int) -> Generator[WorkUnit, None, EncodedVideo]:
        """:meth:`encode` in units: resizing, on the CPU, then bounded chunks of views."""

    def video_prompt(
        self,
        video: EncodedVideo,
        text: str,
        answer_follows: bool = True,
        ids: Sequence[int] | None = None,
    ) -> Prompt:
        """:meth:`question_about` of an encoded video: :meth:`video_prefix`, then
        :meth:`question_suffix`; or, where no answer follows, :meth:`context`. ``ids``: those of
        ``prompt_builder.video_prompt``, if they are known."""

    def video_prefix(self, video: EncodedVideo) -> Prompt:
        """What all questions about a video begin with, to the video's last token."""

    def question_suffix(self, text: str) -> Prompt:
        """The rest of the prompt: the question; the model's answer follows."""

    def decode(self, ids: list[int], strip: bool = True) -> str:
        """Ids of an answer -> text without special tokens and, with ``strip``, outer spaces."""

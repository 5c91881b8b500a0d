"""The interface of a frozen VLM, whatever its family, and the parts that all families share."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from v2l_fast.errors import ConfigError, excerpt
from v2l_fast.video import Clip
from v2l_fast.video.preprocess import frame_tiles, frame_views_in_groups
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.work_units import WorkUnit

# A message as transformers' chat templates take it: {"role": "user", "content": "What happens?"}.
Message = Mapping[str, Any]
# A single question, or a conversation whose last message is the user's.
Question = str | Sequence[Message]
ROLES = ("system", "user", "assistant")


def conversation(question: Question) -> list[tuple[str, str]]:
    """Roles and texts of a question's messages.

    A message's content is a string, or a list of text parts, which are joined.

    Raises:
        ConfigError: a message is malformed, or the last one is not the user's.
    """
    if isinstance(question, str):
        return [("user", question)]
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(question):
        if not isinstance(message, Mapping):
            raise ConfigError(f"message {number} must be a dict, got {excerpt(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ConfigError(
                f"the role of message {number} must be {', '.join(ROLES)}, got {excerpt(role)}"
            )
        if isinstance(content, list | tuple):
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(content) else content
        if not isinstance(content, str):
            raise ConfigError(
                f"the content of message {number} must be a string or a list of text parts, "
                f"got {excerpt(content)}"
            )
        turns.append((role, content))
    if not turns or turns[-1][0] != "user":
        raise ConfigError(
            "the last message must be the user's question, "
            f"got {'no message' if not turns else f'role {turns[-1][0]!r}'}"
        )
    return turns


@dataclass(frozen=True)
class Prompt:
    """An embedded prompt.

    Attributes:
        embeddings: [T, D].
        visual: bool [T], True for image tokens; None without a video.
        visual_tokens: number of image tokens.
        ids: the token ids that were embedded.
    """

    embeddings: Tensor
    visual_tokens: int = 0
    visual: Tensor | None = None
    ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.embeddings.shape[0]


@dataclass(frozen=True, eq=False)
class VideoChunk:
    """A clip as the vision tower takes it, before or after encoding, and what its prompt says.

    Attributes:
        visual: uint8 views [V, 3, M, M], frame by frame, or their connector outputs [V, t, D]; or,
            where `longest_edge` is set, the frames uint8 [F, 3, H, W] that views are made of.
        timestamps: seconds, one per frame.
        duration: seconds, of the chunk.
        rows, cols: tiles of a frame, 0 if frames are not split.
        indices: positions of the frames in the file.
        longest_edge: of the frames' views, None where `visual` holds views or features.
    """

    visual: Tensor
    timestamps: tuple[float, ...]
    duration: float
    rows: int
    cols: int
    indices: tuple[int, ...] = ()
    longest_edge: int | None = None

    @property
    def layout(self) -> tuple[tuple[float, ...], float, int, int]:
        """timestamps, duration, rows and cols, as :class:`PromptBuilder` takes them."""
        return self.timestamps, self.duration, self.rows, self.cols


class PromptBuilder(Protocol):
    """Prompts as token ids; picklable, holds no weights.

    ``timestamps`` and ``duration`` are seconds of the chunk; ``rows`` and ``cols`` are the tiles of
    a frame, 0 if frames are not split.

    """

    @property
    def tile_size(self) -> int:
        """M, side of the square views of the vision tower."""

    @property
    def tokens_per_view(self) -> int:
        """Image tokens, and visual features, of one view."""

    def question(self, question: Question) -> list[int]:
        """A question or conversation without a video; the model's answer follows."""

    def answer(self, text: str, finished: bool = True) -> list[int]:
        """The model's turn; ends with the stop token if ``finished``."""

    def video_prompt(
        self,
        timestamps: Sequence[float],
        duration: float,
        rows: int,
        cols: int,
        question: Question,
        answer_follows: bool,
    ) -> list[int]:
        """A user's turn of video and text, with one image token per feature of each view.

        In a conversation, the video is in the user's first turn.
        """

    def text_prefix(self) -> list[int]:
        """The ids that every :meth:`question` starts with."""

    def text_prefix_with_video(
        self, timestamps: Sequence[float], duration: float, rows: int, cols: int
    ) -> list[int]:
        """Replaces :meth:`text_prefix` where the video is in context."""


def iter_views(
    clip: Clip, longest_edge: int, tile_size: int
) -> Generator[WorkUnit, None, VideoChunk]:
    """Resize and tile a clip's frames; yields "decode" between groups of large frames."""
    groups = frame_views_in_groups(clip.frames, longest_edge, tile_size)
    while True:
        try:
            done, total = next(groups)
        except StopIteration as end:
            views = end.value
            break
        yield "decode", done, total
    indices = tuple(clip.indices.tolist())
    return VideoChunk(views.views, clip.timestamps, clip.duration, views.rows, views.cols, indices)


def video_prompt_ids(
    prompt_builder: PromptBuilder,
    clip: Clip,
    question: Question,
    longest_edge: int,
    answer_follows: bool,
) -> list[int]:
    """Token ids of a prompt about a clip, before its frames are resized or encoded."""
    height, width = clip.frames.shape[-2:]
    rows, cols = frame_tiles(height, width, longest_edge, prompt_builder.tile_size)
    return prompt_builder.video_prompt(
        clip.timestamps, clip.duration, rows, cols, question, answer_follows
    )


def count_visual_tokens(prompt_builder: PromptBuilder, clip: Clip, longest_edge: int) -> int:
    """Number of image tokens of the clip in a prompt."""
    height, width = clip.frames.shape[-2:]
    rows, cols = frame_tiles(height, width, longest_edge, prompt_builder.tile_size)
    return len(clip.frames) * (rows * cols + 1) * prompt_builder.tokens_per_view


class Backbone(Protocol):
    """A frozen VLM.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
        decoder: its text decoder, run layer by layer.
        name_or_path: where the model came from.
        stop_ids: token ids that end an answer.
        image_token_id: id of the image token.
        views_per_unit: views that one work unit encodes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    name_or_path: str
    stop_ids: tuple[int, ...]
    image_token_id: int
    views_per_unit: int

    @property
    def preprocessing(self) -> str:
        """Name and version of the rules that turn frames into prompts."""

    @property
    def prompt_builder(self) -> PromptBuilder:
        """Prompts as token ids, without the model."""

    @property
    def hidden_size(self) -> int:
        """D, width of the decoder."""

    def compile(self, backend: str = "inductor") -> None:
        """Compile vision encoding and decoder layers; results are the same up to rounding."""

    def linear(self, layer: int, module: str) -> nn.Linear:
        """A linear layer of a decoder layer by its name, e.g. ``down_proj``.

        Raises:
            CheckpointError: the decoder has no such layer.
        """

    def prompt(self, ids: Sequence[int], chunk: VideoChunk | None = None) -> Prompt:
        """Token ids, with the features of an encoded video in place of its image tokens."""

    def question(self, question: Question) -> Prompt:
        """A question or conversation without a video; the model's answer follows."""

    def video_prompt(
        self, chunk: VideoChunk, question: Question, answer_follows: bool = True
    ) -> Prompt:
        """Encoded video and text: the direct baseline's question or, if no answer follows, the pass
        whose hidden states become an adapter."""

    def video_prefix(self, chunk: VideoChunk) -> Prompt:
        """The part of :meth:`video_prompt` that all questions share, to the video's last token."""

    def question_suffix(self, text: str) -> Prompt:
        """The part of :meth:`video_prompt` after :meth:`video_prefix`; an answer follows."""

    def encode(self, clip: Clip, longest_edge: int) -> VideoChunk:
        """Vision tower and connector, once for any number of prompts."""

    def iter_encode(self, clip: Clip, longest_edge: int) -> Generator[WorkUnit, None, VideoChunk]:
        """:meth:`encode` in units: resizing where the frames are, then chunks of views."""

    def encode_views(self, views: Tensor) -> Tensor:
        """Vision tower and connector: uint8 views of any videos [V, 3, M, M] -> [V, t, D]."""

    def embed(self, ids: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
        """Token ids [..., S] -> embeddings [..., S, D], with the visual features [V, t, D] in
        place of the image tokens, in order. Does not wait for the device if ids are on the CPU.

        Raises:
            ConfigError: there are features, but not one for each image token.
        """

    def decode(self, ids: list[int], strip: bool = True) -> str:
        """Ids of an answer -> text without special tokens and, with ``strip``, outer spaces."""

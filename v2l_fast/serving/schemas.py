"""The HTTP interface: upper bounds, and request and response bodies, validated and documented.

Chat completions follow OpenAI's names and shapes. An unsupported parameter is refused if it would
change the answer and ignored if it would not (``user``, ``store``, ...).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictInt,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from v2l_fast.video import Limits

MAX_STOPS, MAX_STOP_LENGTH = 4, 256
MAX_COMPOSED = 64
MAX_ANSWERS, MAX_TOP_LOGPROBS = 16, 20


class ErrorBody(BaseModel):
    """An error; ``param`` names the field, ``code`` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every 4xx and 5xx response, in OpenAI's shape."""

    error: ErrorBody


# --- chat ---------------------------------------------------------------------------------------


class TextPart(BaseModel):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class MediaUrl(BaseModel):
    """Where a video or image is: a ``data:`` URL, or http(s) if the server allows its host."""

    url: str


class VideoPart(BaseModel):
    """A video in a message, as vLLM's clients send it."""

    type: Literal["video_url"]
    video_url: MediaUrl


class ImagePart(BaseModel):
    """An image in a message: a video of one frame."""

    type: Literal["image_url"]
    image_url: MediaUrl


@dataclass
class MediaPart:
    """A video or image of a message.

    Attributes:
        kind: "video" or "image".
        where: its URL.
    """

    kind: Literal["video", "image"]
    where: MediaUrl


_PART_FIELDS = {"text": "text", "video_url": "video_url", "image_url": "image_url"}


def _content(value: Any) -> Any:
    """Validate text or a list of parts, without pydantic's names for the members of a union."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be text or a list of parts")
    parts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PART_FIELDS:
            raise PydanticCustomError(
                "content_part",
                "part {index} must have the type text, video_url or image_url",
                {"index": index},
            )
        content = part.get(kind)
        if kind != "text" and isinstance(content, str):
            # vLLM's short form.
            content = {"url": content}
        text = content if kind == "text" else content.get("url") if _is_object(content) else None
        if not isinstance(text, str):
            message = "part {index} must have a string as its {field}"
            field = "text" if kind == "text" else f"{kind}.url"
            raise PydanticCustomError("content_part", message, {"index": index, "field": field})
        parts.append({"type": kind, kind: content})
    return parts


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


class Message(BaseModel):
    """A message; the last one of a request is the user's question."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | list[TextPart | VideoPart | ImagePart] | None, BeforeValidator(_content)
    ] = None

    @property
    def text(self) -> str:
        """The content; text parts are joined with line breaks, as vLLM does."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def media(self) -> dict[int, MediaPart]:
        """Its videos and images, by the index of their part."""
        media = {}
        for index, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if isinstance(part, VideoPart):
                media[index] = MediaPart("video", part.video_url)
            elif isinstance(part, ImagePart):
                media[index] = MediaPart("image", part.image_url)
        return media


class StreamOptions(BaseModel):
    """``include_usage``: send the token counts in a last chunk."""

    include_usage: StrictBool | None = None


class VideoIO(BaseModel):
    """``num_frames``: maximum number of frames sampled from a video."""

    model_config = ConfigDict(extra="forbid")

    num_frames: Annotated[StrictInt, Field(ge=1)] | None = None


class MediaIO(BaseModel):
    """How videos in messages are read, as vLLM names it."""

    model_config = ConfigDict(extra="forbid")

    video: VideoIO | None = None


class JsonSchema(BaseModel):
    """A JSON schema, as OpenAI's clients send it."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """The format of answers: text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("missing", "json_schema is missing")
        return self


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
VideoId = Annotated[str, Field(min_length=1, max_length=128)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Empty = Annotated[list[Any], Field(max_length=0)]


def _stops(value: Any) -> Any:
    """None, a string or a list of strings -> a list; errors as in :func:`_content`."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError(
            "too_many_stops", "must be at most {limit} strings, got {count}",
            {"limit": MAX_STOPS, "count": len(stops)},
        )  # fmt: skip
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise PydanticCustomError(
            "stop_length", "must have 1 to {limit} characters", {"limit": MAX_STOP_LENGTH}
        )
    return stops


class ChatRequest(BaseModel):
    """A question about a video.

    ``model`` is the id of an adapter, or the base model's name. With the base model's name,
    ``video_ids`` composes the adapters of consecutive chunks; videos and images in messages are
    internalized, once for each content, and follow them. ``video_mode`` "context" puts the one
    video into the context instead, for comparison. Decoding is greedy unless ``temperature`` is
    set. ``null`` leaves a field at its default.
    """

    model_config = ConfigDict(extra="ignore")

    model: str = Field(min_length=1, max_length=512)
    messages: list[Message] = Field(min_length=1, max_length=1024)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=1 << 31)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_stops)
    ] = []
    video_ids: Annotated[list[VideoId], Field(max_length=MAX_COMPOSED)] | None = None
    video_mode: Literal["adapter", "context"] | None = None
    # Questions to the person: see `elicit.ElicitFields` and `Persona.to_dict`.
    elicit: dict[str, Any] | None = None
    persona: dict[str, Any] | None = None
    media_io_kwargs: MediaIO | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_ANSWERS)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    # Unsupported parameters, accepted with the values that change nothing.
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    web_search_options: None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens.

    ``visual_tokens`` are image tokens; 0 with an adapter. ``cached_tokens`` were computed by an
    earlier request.
    """

    visual_tokens: int
    cached_tokens: int = 0


class UsageBody(BaseModel):
    """Token counts; ``time_to_first_token`` in seconds since the engine received the question."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    time_to_first_token: float


class CompletionMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class TopLogprob(BaseModel):
    """A token and the natural logarithm of its probability.

    ``bytes`` is null for a token that is a part of a character.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most likely tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """The tokens of an answer, from the logits before sampling."""

    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    """An answer of a completion."""

    index: int = 0
    message: CompletionMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(BaseModel):
    """A complete answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody


class ModelBody(BaseModel):
    """A value of ``model``: the base model, or an adapter (``parent`` is its base)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["v2l_fast"] = "v2l_fast"
    parent: str | None


class ModelList(BaseModel):
    """The values of ``model``."""

    object: Literal["list"] = "list"
    data: list[ModelBody]


# --- videos -------------------------------------------------------------------------------------


class InternalizeOptions(BaseModel):
    """How a video is internalized; unset fields are as in training."""

    model_config = ConfigDict(extra="forbid")

    max_frames: Annotated[int, Field(ge=1)] | None = None
    longest_edge: Annotated[int, Field(ge=2)] | None = None
    exact_frames: bool | None = None


class PathRequest(InternalizeOptions):
    """A video on the server, under the folder the operator allowed."""

    path: str = Field(min_length=1, max_length=4096)


class ListQuery(BaseModel):
    """The range of a list to return."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000)
    offset: int = Field(0, ge=0, le=1 << 31)


class PeftQuery(BaseModel):
    """The base that a downloaded PEFT adapter is for."""

    model_config = ConfigDict(extra="forbid")

    base: str | None = Field(
        None,
        min_length=1,
        max_length=512,
        description="The exact name under which the base is served.",
    )
    text_only: bool = Field(False, description="The base is the exported text decoder.")


Status = Literal["queued", "decoding", "encoding", "generating", "completed", "failed", "cancelled"]


class VideoBody(BaseModel):
    """A video on its way to an adapter, or internalized.

    ``id`` is the job's while it runs, and ``adapter_id`` is set when it is completed. Both are
    accepted wherever an id is expected, the job's only until the server restarts.
    """

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: float = Field(ge=0, le=1)
    adapter_id: str | None
    cached: bool = Field(False, description="The store already had the adapter.")
    error: ErrorBody | None = None
    created: int
    name: str | None = None
    frames: int | None = None
    duration: float | None = Field(None, description="Seconds.")
    bytes: int | None = Field(None, description="Size of the adapter.")
    rank: int | None = None
    seconds: dict[str, float] | None = Field(None, description="Time spent in each stage.")
    in_context: bool = Field(description='Whether video_mode "context" is possible for it.')


class VideoList(BaseModel):
    """Jobs that have not ended or failed, then adapters, the newest of each first."""

    object: Literal["list"] = "list"
    data: list[VideoBody]


class ReplicaDeletion(BaseModel):
    """What a replica did with a deleted adapter.

    ``unloaded``: it had the adapter and removed it. ``error``: why it may still have it.
    """

    url: str
    unloaded: bool
    error: str | None


class Deleted(BaseModel):
    """A job was cancelled, or an adapter removed, here and from the replicas if there are any."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
    replicas: list[ReplicaDeletion] | None = None

    @model_serializer(mode="wrap")
    def _without_replicas(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        if self.replicas is None:
            del fields["replicas"]
        return fields


class Health(BaseModel):
    """Readiness: "starting" while the server compiles what the first questions need."""

    status: Literal["ok", "starting"]
    model: str
    version: str
    key_required: bool


@dataclass(frozen=True)
class ServerLimits:
    """Upper bounds; a request that exceeds one is refused with a 4xx that names it.

    Attributes:
        upload_bytes: size of an uploaded video.
        body_bytes: size of any other request body, apart from the videos and images in messages.
        media_bytes: size of the videos and images in one request's messages, together.
        media_seconds: time for downloading one of them.
        duration: length of a video in seconds.
        pixels: width x height of a frame.
        frames: frames sampled from one video.
        longest_edge: size in pixels to which frames may be resized.
        new_tokens: tokens of one answer.
        uploads: files received, or hashed in place, at the same time; further ones wait.
        uploads_waiting: files that may wait for that; further ones get 503.
        jobs: videos waiting or being internalized; further ones get 503.
        kept_video_bytes: uploaded videos kept for questions with the video in context; the least
            recently used are removed first.
        answer_seconds: time for one answer.
        probe_seconds: time for examining one video before it is accepted.
        decode_seconds: time for decoding the frames of one video.
        decode_bytes: memory that a process may take to examine or decode one video on the CPU.
        idle_seconds: longest silence of a client that is sending a body.
        connections: clients connected at the same time; further ones get 503.
        head_seconds: time for a request's line and headers, from its connection or first byte.
        keep_alive_seconds: how long a connection stays open after a response.
        stalled_seconds: how long a client may read nothing of a response.
    """

    upload_bytes: int = 1 << 30
    body_bytes: int = 1 << 20
    media_bytes: int = 64 << 20
    media_seconds: float = 30.0
    duration: float = 2 * 3600.0
    pixels: int = 7680 * 4320
    frames: int = 1024
    longest_edge: int = 2048
    new_tokens: int = 1024
    uploads: int = 64
    uploads_waiting: int = 256
    jobs: int = 64
    kept_video_bytes: int = 20 << 30
    answer_seconds: float = 300.0
    probe_seconds: float = 60.0
    decode_seconds: float = 600.0
    decode_bytes: int = 8 << 30
    idle_seconds: float = 30.0
    connections: int = 4096
    head_seconds: float = 10.0
    keep_alive_seconds: float = 5.0
    stalled_seconds: float = 60.0

    @property
    def chat_bytes(self) -> int:
        """Size of a chat request: its videos and images are base64."""
        return self.body_bytes + self.media_bytes * 4 // 3

    @property
    def probing(self) -> Limits:
        """The bounds for examining a video file."""
        return Limits(
            max_pixels=self.pixels,
            max_duration=self.duration,
            max_frames=self.frames,
            max_seconds=self.probe_seconds,
        )

    @property
    def decoding(self) -> Limits:
        """The bounds for decoding one. Frames take a quarter of the memory: they are copied once,
        and decoders hold some."""
        return replace(
            self.probing, max_seconds=self.decode_seconds, max_bytes=self.decode_bytes // 4
        )

"""Bodies of the HTTP interface, as validated and as documented.

Chat completions follow OpenAI's names and shapes. What would change an answer and is not supported
is refused; parameters that change nothing here (``user``, ``store``, ..) are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt
from pydantic_core import PydanticCustomError

MAX_STOPS, MAX_STOP_LENGTH = 4, 256
MAX_COMPOSED = 64


class ErrorBody(BaseModel):
    """What went wrong; ``param`` names the field, ``code`` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every 4xx and 503 of the server, in OpenAI's shape."""

    error: ErrorBody


# --- chat ---------------------------------------------------------------------------------------


class TextPart(BaseModel):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


def _content(value: Any) -> Any:
    """Text, or parts of it; says what is wrong without pydantic's names for the alternatives."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be text or a list of text parts")
    for place, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "content_part",
                "part {place} must be a text part ({example}); send videos to POST /v1/videos and "
                "ask with their id as model",
                {"place": place, "example": '{"type": "text", "text": ".."}'},
            )
        if not isinstance(part.get("text"), str):
            message = "part {place} must have its text as a string"
            raise PydanticCustomError("content_part", message, {"place": place})
    return value


class Message(BaseModel):
    """A message. A question stands alone: one user message, system messages before it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | list[TextPart] | None, BeforeValidator(_content)] = None

    @property
    def text(self) -> str:
        """Parts are joined with line breaks, as vLLM does."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """``include_usage``: a last chunk that carries the token counts."""

    include_usage: StrictBool | None = None


class TextFormat(BaseModel):
    """Answers are plain text."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
VideoId = Annotated[str, Field(min_length=1, max_length=128)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Nothing = Annotated[list[Any], Field(max_length=0)]


def _stops(value: Any) -> Any:
    """None, a string or a few of them -> a list; errors as for :func:`_content`."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError(
            "too_many_stops", "at most {most} strings, got {count}",
            {"most": MAX_STOPS, "count": len(stops)},
        )  # fmt: skip
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise PydanticCustomError(
            "stop_length", "strings of 1 to {most} characters", {"most": MAX_STOP_LENGTH}
        )
    return stops


class ChatRequest(BaseModel):
    """A question about a video.

    ``model`` is the id of an adapter, or the base model's name. With the base model's name,
    ``video_ids`` composes adapters of consecutive chunks, and ``video_mode`` "context" puts the
    one video named there into the context instead, for comparison. Greedy unless ``temperature``
    is set. ``null`` leaves a field at its default.
    """

    model_config = ConfigDict(extra="ignore")

    model: str = Field(min_length=1, max_length=512)
    messages: list[Message] = Field(min_length=1, max_length=64)
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
    # What would change the answer is accepted where it changes nothing.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    web_search_options: None = None
    response_format: TextFormat | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class PromptTokensDetails(BaseModel):
    """``visual_tokens``: how many of the prompt's tokens stand for pixels; 0 with an adapter."""

    visual_tokens: int


class UsageBody(BaseModel):
    """Token counts; ``time_to_first_token`` in seconds, from the engine's queue on."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    time_to_first_token: float


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The one answer of a completion."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """A complete answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody


class ModelBody(BaseModel):
    """A name that ``model`` accepts: the base model, or an adapter (``parent`` is its base)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["v2l_fast"] = "v2l_fast"
    parent: str | None


class ModelList(BaseModel):
    """What ``model`` accepts."""

    object: Literal["list"] = "list"
    data: list[ModelBody]


# --- videos -------------------------------------------------------------------------------------


class InternalizeOptions(BaseModel):
    """How a video is internalized; as in training what is left out."""

    model_config = ConfigDict(extra="forbid")

    max_frames: Annotated[int, Field(ge=1)] | None = None
    longest_edge: Annotated[int, Field(ge=2)] | None = None
    exact_frames: bool | None = None


class PathRequest(InternalizeOptions):
    """A video that lies on the server, under the folder the operator allowed."""

    path: str = Field(min_length=1, max_length=4096)


class ListQuery(BaseModel):
    """Which part of a list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000)
    offset: int = Field(0, ge=0, le=1 << 31)


class PeftQuery(BaseModel):
    """What a downloaded PEFT adapter is for."""

    model_config = ConfigDict(extra="forbid")

    base: str | None = Field(
        None, min_length=1, max_length=512, description="Exactly the name the base is served under."
    )
    text_only: bool = Field(False, description="The base is the exported text decoder alone.")


Status = Literal["queued", "decoding", "encoding", "generating", "completed", "failed", "cancelled"]


class VideoBody(BaseModel):
    """A video on its way to an adapter, or internalized.

    ``id`` is the job's while it runs and ``adapter_id`` the adapter's once it is there; both are
    accepted wherever an id is asked for, the job's only until the server restarts.
    """

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: float = Field(ge=0, le=1)
    adapter_id: str | None
    cached: bool = Field(False, description="This upload was answered from the store.")
    error: ErrorBody | None = None
    created: int
    name: str | None = None
    frames: int | None = None
    duration: float | None = Field(None, description="Seconds.")
    bytes: int | None = Field(None, description="Size of the adapter.")
    rank: int | None = None
    seconds: dict[str, float] | None = Field(None, description="Time spent in each stage.")
    in_context: bool = Field(description='Whether video_mode "context" can be asked for it.')


class VideoList(BaseModel):
    """Jobs that are not finished, then adapters, each the newest first."""

    object: Literal["list"] = "list"
    data: list[VideoBody]


class Deleted(BaseModel):
    """An adapter is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Health(BaseModel):
    """Whether the server is ready: "starting" while it compiles what the first questions need."""

    status: Literal["ok", "starting"]
    model: str
    version: str
    key_required: bool

"""Video2LoRA: a frozen VLM and its hypernetwork, which internalize videos and answer questions.

A :class:`Video2LoRA` is stateless: adapters are arguments. Answering never changes the model, so
concurrent calls with different adapters, or none, do not affect each other.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import cast, overload

import numpy as np
import torch
from torch import Tensor

from v2l_fast.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    PromptTooLong,
    VideoError,
)
from v2l_fast.generation import (
    Answer,
    Effect,
    PrefixCache,
    SamplingParams,
    answer_prompts,
    measure_effect,
)
from v2l_fast.hypernet.adapter import Adapter, BiasAdapter
from v2l_fast.hypernet.network import HyperNetwork, as_dtype
from v2l_fast.loading import load_hypernet, shipped
from v2l_fast.pipeline import BATCH_TOKENS, ChunkReader, Video, VideoInternalizer
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.video.reader import Backend
from v2l_fast.vlm import Backbone, Prompt, Question, load_backbone
from v2l_fast.vlm.base import count_visual_tokens, video_prompt_ids
from v2l_fast.work_units import Progress, WorkUnit, run_to_completion, units_within

# Maximum number of videos internalized together.
BATCH_SIZE = 8

VideoOrFrames = Video | Tensor | np.ndarray
AdapterOrPath = Adapter | str | os.PathLike[str]
# One question or conversation, or several; see :data:`~v2l_fast.vlm.Question`.
Questions = Question | Sequence[Question]


class Video2LoRA:
    """Internalizes videos into LoRA adapters and answers questions from them.

    Args:
        backbone: the frozen VLM.
        hypernet: the hypernetwork trained for it; its weights must not change afterwards.

    Raises:
        ConfigError: backbone and hypernetwork do not fit each other.
    """

    def __init__(self, backbone: Backbone, hypernet: HyperNetwork) -> None:
        config, decoder = hypernet.config, backbone.decoder
        for what, needs, has in (
            ("hidden_size", config.hidden_size, backbone.hidden_size),
            ("num_layers", config.num_layers, decoder.num_layers),
        ):
            if needs != has:
                raise ConfigError(
                    f"the hypernetwork is for {what} {needs}, {backbone.name_or_path} has {has}; "
                    f"give the base it was trained for ({config.base_model_name_or_path})"
                )
        for module, sizes in config.target_modules.items():
            linear = backbone.linear(0, module)
            if (linear.in_features, linear.out_features) != sizes:
                raise ConfigError(
                    f"the hypernetwork adapts {module} of {sizes}, {backbone.name_or_path} has "
                    f"{(linear.in_features, linear.out_features)}; give the base it was trained for"
                )
        self.backbone = backbone
        self.hypernet = hypernet.eval()
        self.config = config
        self._internalizer = VideoInternalizer(backbone, self.hypernet)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        base: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool | None = None,
    ) -> Video2LoRA:
        """Load a hypernetwork and its frozen VLM.

        Args:
            name_or_path: "shapes-any" or "shapes" (shipped), a directory, a hub id, or a released
                checkpoint (``.pt``). A directory holds the hypernetwork itself, or
                ``hypernet/`` and ``base/``.
            base: the VLM; read from the hypernetwork's config when omitted.
            device: "cuda" when there is one, else "cpu".
            dtype: "bfloat16", "float16", "float32" or a torch.dtype; bfloat16 on a GPU and float32
                on a CPU when "auto" or omitted. bfloat16 is faster on a CPU that has AVX512-BF16 or
                AMX; the hypernetwork then keeps all but its modality projection in float32.
            compile: see :meth:`compile`; on a GPU only when omitted.

        Raises:
            CheckpointError, ConfigError: something is missing, broken or does not fit.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = as_dtype(dtype) or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        hypernet, bundled_base = load_hypernet(name_or_path)
        base = base or bundled_base or hypernet.config.base_model_name_or_path
        if base is None:
            raise CheckpointError(f"{name_or_path}: names no base model; pass base=...")
        backbone = load_backbone(shipped(base, "base") or base, device, dtype)
        model = cls(backbone, hypernet.for_inference(device, dtype))
        if device.type == "cuda" if compile is None else compile:
            model.compile()
        return model

    def compile(self, backend: str = "inductor") -> None:
        """Compile vision encoding, decoder layers and hypernetwork layers.

        Answers and adapters are the same up to rounding. The first call of each kind takes seconds;
        afterwards no length of a video or question compiles again.

        Args:
            backend: as for ``torch.compile``.
        """
        self.backbone.compile(backend)
        self.hypernet.compile_layers(backend)

    # --- internalizing --------------------------------------------------------------------------

    def load_clip(
        self,
        video: Video,
        sampling: FrameSampling | None = None,
        decoder: Backend = "auto",
    ) -> Clip:
        """Sample and decode a video; arguments as in :meth:`internalize`.

        A :class:`Clip` is returned as it is. The frames of a file are on the model's device, where
        a GPU decodes them if it can.

        Raises:
            VideoError: the file cannot be read.
        """
        reader = self._reader(sampling, 1, decoder)
        source = _as_video(video)
        if isinstance(source, VideoError):
            raise source
        return reader.read(source)[0]

    @overload
    def internalize(  # type: ignore[overload-overlap]
        self,
        videos: VideoOrFrames,
        *,
        fps: float | None = None,
        sampling: FrameSampling | None = None,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool | None = None,
        chunks: int = 1,
        decoder: Backend = "auto",
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
    ) -> Adapter: ...

    @overload
    def internalize(
        self,
        videos: Sequence[VideoOrFrames],
        *,
        fps: float | None = None,
        sampling: FrameSampling | None = None,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool | None = None,
        chunks: int = 1,
        decoder: Backend = "auto",
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
    ) -> list[Adapter]: ...

    def internalize(
        self,
        videos: VideoOrFrames | Sequence[VideoOrFrames],
        *,
        fps: float | None = None,
        sampling: FrameSampling | None = None,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool | None = None,
        chunks: int = 1,
        decoder: Backend = "auto",
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
    ) -> Adapter | list[Adapter]:
        """Turn videos into adapters, with one forward pass of encoder and hypernetwork per batch.

        Args:
            videos: a file, a :class:`Clip`, or uint8 frames with ``fps`` (a tensor [F, 3, H, W] or
                an array [F, H, W, 3] or [F, 3, H, W]); or a list of these.
            fps: frame rate of frames in memory; files and clips have their own.
            sampling: frames and size, by default as in the hypernetwork's training. The next three
                arguments replace single values of it.
            max_frames: maximum number of frames.
            longest_edge: longest side of a frame in pixels.
            exact_frames: take exactly ``max_frames`` over the whole clip, whatever its duration.
            chunks: split each video into this many parts of equal duration, sample each like a
                video of its own, and compose their adapters (paper Section 5.6).
            decoder: video decoder, as ``backend`` of :func:`~v2l_fast.video.load_video`.
            batch_size: videos whose frames are held at a time. Their contexts go through the model
                together as far as memory allows; adapters differ only by rounding.
            progress: called with (stage, done, total).

        Returns:
            An :class:`Adapter`, or a list of them for a list.

        Raises:
            VideoError: a file cannot be read, or factors are not finite.
            ConfigError: an option is out of range.
            TypeError: ``videos`` holds something that is not a video.
        """
        if isinstance(videos, Sequence) and not isinstance(videos, str | bytes):
            batch, single = [_as_video(video, fps) for video in videos], False
        else:
            batch, single = [_as_video(videos, fps)], True
        adapters: list[Adapter] = []
        for outcome in self.internalize_each(
            batch,
            sampling=self._sampling(sampling, max_frames, longest_edge, exact_frames),
            chunks=chunks,
            decoder=decoder,
            batch_size=batch_size,
            progress=progress,
        ):
            if isinstance(outcome, VideoError):
                raise outcome
            adapters.append(outcome)
        return adapters[0] if single else adapters

    def internalize_each(
        self,
        videos: Iterable[Video | VideoError],
        *,
        sampling: FrameSampling | None = None,
        chunks: int = 1,
        decoder: Backend = "auto",
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
    ) -> Iterator[Adapter | VideoError]:
        """:meth:`internalize` of a stream of videos; one failure does not affect the others.

        Args:
            videos: consumed lazily, ``batch_size`` at a time. If you read files yourself, pass the
                VideoError in place of a clip that failed.

        Yields:
            For each video, in order, its adapter or the error that names it.

        Raises:
            ConfigError: an option is out of range.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        reader = self._reader(sampling, chunks, decoder)
        remaining = iter(videos)
        while batch := [_as_video(video) for video in islice(remaining, batch_size)]:
            units = self._internalizer.iter_internalize(batch, reader, BATCH_TOKENS)
            with self._without_autocast():
                outcomes = run_to_completion(units, progress)
            yield from outcomes

    def iter_internalize(
        self,
        video: Video,
        sampling: FrameSampling | None = None,
        chunks: int = 1,
        decoder: Backend = "auto",
    ) -> Generator[WorkUnit, None, Adapter]:
        """:meth:`internalize` of one video in bounded work units, for callers that interleave work.

        Yields (stage, done, total) before each unit: "decode" (decoding and resizing, without the
        model), "encode frames" (bounded chunks of frames), "generate adapter" (one decoder layer).
        Chunks follow one another, so units do not grow with their number. Units may run in
        different threads.

        Returns:
            The adapter, as the generator's value (:func:`~v2l_fast.work_units.run_to_completion`).
        """
        reader = self._reader(sampling, chunks, decoder)
        units = self._internalizer.iter_internalize([_as_video(video)], reader, max_tokens=0)
        (outcome,) = yield from units_within(self._without_autocast, units)
        if isinstance(outcome, VideoError):
            raise outcome
        return outcome

    def _sampling(
        self,
        sampling: FrameSampling | None = None,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool | None = None,
    ) -> FrameSampling:
        """The training's sampling, except for values that are not None."""
        base = sampling or self.config.sampling
        return base.override(max_frames, longest_edge, exact_frames=exact_frames)

    def _reader(self, sampling: FrameSampling | None, chunks: int, decoder: Backend) -> ChunkReader:
        sampling = sampling or self.config.sampling
        return ChunkReader(sampling, chunks, decoder, self.backbone.decoder.device)

    def iter_question_prompt(
        self,
        clip: Clip,
        question: Question,
        longest_edge: int | None = None,
    ) -> Generator[WorkUnit, None, Prompt]:
        """The prompt of a question with the video in context, in units as
        :meth:`iter_internalize`."""
        edge = self._sampling(longest_edge=longest_edge).longest_edge
        yield "decode", 0, 1
        builder = self.backbone.prompt_builder
        ids = video_prompt_ids(builder, clip, question, edge, answer_follows=True)
        units = self.backbone.iter_encode(clip, edge)
        chunk = yield from units_within(self._without_autocast, units)
        with self._without_autocast():
            return self.backbone.prompt(ids, chunk)

    def visual_tokens(self, clip: Clip, longest_edge: int | None = None) -> int:
        """Number of image tokens of the clip in the context."""
        edge = self._sampling(longest_edge=longest_edge).longest_edge
        return count_visual_tokens(self.backbone.prompt_builder, clip, edge)

    # --- answering ------------------------------------------------------------------------------

    @overload
    def ask(  # type: ignore[overload-overlap]
        self,
        questions: Question,
        adapters: AdapterOrPath | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str: ...

    @overload
    def ask(
        self,
        questions: Sequence[Question],
        adapters: AdapterOrPath | Sequence[AdapterOrPath | None] | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str]: ...

    def ask(
        self,
        questions: Questions,
        adapters: AdapterOrPath | Sequence[AdapterOrPath | None] | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str | list[str]:
        """Answer from adapters alone, with zero visual tokens in context.

        Args:
            questions: one or several. Each is a string or a conversation: a list of messages, such
                as ``{"role": "user", "content": "What happens?"}``, with the roles "system", "user"
                and "assistant", the last message the user's. A string is the same as its user
                message alone. Hypernetworks are trained on single questions: answers later in a
                conversation are less reliable.
            adapters: an adapter or its file for all questions, or one (or None) per question; None
                for the plain model.
            max_new_tokens: limit of generated tokens, the stop token included.
            temperature: 0 is greedy; any finite positive number samples.
            top_p: sample from the smallest set of tokens whose probability reaches it.
            top_k: sample from the k most likely tokens; 0 for no limit.
            seed: of sampling; question i uses ``seed + i``, whatever the batch.

        Returns:
            A string for a single question or conversation and a single adapter, else a list.

        Raises:
            AdapterError: an adapter does not belong to this model, or the counts differ.
            ConfigError: a sampling parameter is out of range, or a message is malformed.
            PromptTooLong: a conversation and the limit of new tokens exceed
                :attr:`context_length`.
        """
        answers = self.answer(
            questions, adapters, max_new_tokens=max_new_tokens, temperature=temperature,
            top_p=top_p, top_k=top_k, seed=seed,
        )  # fmt: skip
        return _texts(questions, answers)

    @overload
    def ask_direct(  # type: ignore[overload-overlap]
        self,
        questions: Question,
        video: Video,
        *,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str: ...

    @overload
    def ask_direct(
        self,
        questions: Sequence[Question],
        video: Video,
        *,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str]: ...

    def ask_direct(
        self,
        questions: Questions,
        video: Video,
        *,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str | list[str]:
        """The baseline: the same model with the video in the context of every question.

        Frames as in :meth:`internalize`, sampling parameters as in :meth:`ask`.
        """
        # Parameters that are out of range are refused before the video is read.
        SamplingParams(max_new_tokens, temperature, top_p, top_k, seed)
        sampling = self._sampling(None, max_frames, longest_edge, exact_frames)
        answers = self.answer_direct(
            questions, self.load_clip(video, sampling), sampling.longest_edge,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            seed=seed,
        )  # fmt: skip
        return _texts(questions, answers)

    def answer(
        self,
        questions: Questions,
        adapters: AdapterOrPath | Sequence[AdapterOrPath | None] | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        n: int = 1,
        logprobs: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> list[Answer]:
        """:meth:`ask` with token counts and times.

        Args:
            n: answers to each question, one question after the other; answer i of the list uses
                ``seed + i``.
            logprobs: report log probabilities, as :class:`~v2l_fast.generation.SamplingParams`.
            prefix_cache: keys and values of earlier calls, to reuse and to extend: a conversation's
                next turn computes its new messages only. Reuse changes answers by rounding alone.
        """
        params = SamplingParams(max_new_tokens, temperature, top_p, top_k, seed, n, logprobs)
        texts = _questions(questions)
        sources: list[AdapterOrPath | None]
        if adapters is None or isinstance(adapters, Adapter | str | os.PathLike):
            sources = [adapters] * len(texts)
        else:
            sources = list(adapters)
        if len(sources) == 1:
            sources *= len(texts)
        elif len(texts) == 1:
            texts *= len(sources)
        if len(sources) != len(texts):
            raise AdapterError(
                f"{len(texts)} questions and {len(sources)} adapters: give one adapter for "
                "all, or one for each question"
            )
        for question in texts:
            self._check_length(question, params)
        # One attached copy each, so that an adapter of several questions takes one slot.
        attached = {id(a): None if a is None else self._attached(a) for a in sources}
        with self._without_autocast():
            return list(
                answer_prompts(
                    self.backbone,
                    [partial(self.backbone.question, text) for text in texts],
                    [attached[id(a)] for a in sources],
                    params,
                    prefix_cache,
                )
            )

    def answer_direct(
        self,
        questions: Questions,
        clips: Clip | Sequence[Clip],
        longest_edge: int | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        n: int = 1,
        logprobs: int | None = None,
    ) -> list[Answer]:
        """:meth:`ask_direct` on decoded frames, with token counts and times.

        ``n`` and ``logprobs`` as in :meth:`answer`. Every question encodes its video again, as a
        model without adapters does.

        Args:
            clips: one for all questions, or one per question.

        Raises:
            VideoError: the counts differ.
        """
        params = SamplingParams(max_new_tokens, temperature, top_p, top_k, seed, n, logprobs)
        texts = _questions(questions)
        clips = [clips] * len(texts) if isinstance(clips, Clip) else list(clips)
        if len(clips) != len(texts):
            raise VideoError(f"{len(texts)} questions and {len(clips)} clips: give one each")
        edge = self._sampling(longest_edge=longest_edge).longest_edge

        def prompt(clip: Clip, question: Question) -> Prompt:
            return self.backbone.video_prompt(self.backbone.encode(clip, edge), question)

        for clip, question in zip(clips, texts, strict=True):
            self._check_length(question, params, clip, edge)

        with self._without_autocast():
            prompts = [partial(prompt, *pair) for pair in zip(clips, texts, strict=True)]
            return list(answer_prompts(self.backbone, prompts, [None] * len(texts), params))

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together that the base model was trained on."""
        return int(self.backbone.decoder.config.max_position_embeddings)

    def _check_length(
        self,
        question: Question,
        params: SamplingParams,
        clip: Clip | None = None,
        longest_edge: int = 0,
    ) -> None:
        """Raise PromptTooLong for a conversation that exceeds the context.

        A single question, and the frames of a video with it, may be longer.
        """
        if isinstance(question, str):
            return
        builder = self.backbone.prompt_builder
        ids = (
            builder.question(question)
            if clip is None
            else video_prompt_ids(builder, clip, question, longest_edge, answer_follows=True)
        )
        if len(ids) + params.max_new_tokens > self.context_length:
            raise PromptTooLong(
                f"a conversation of {len(ids)} tokens and up to {params.max_new_tokens} new tokens "
                f"exceed the model's context of {self.context_length}; start a new conversation "
                "(/reset in a chat), drop the oldest messages or lower the limit of new tokens"
            )

    # --- adapters -------------------------------------------------------------------------------

    def load_adapter(self, path: str | os.PathLike) -> Adapter:
        """Read an adapter file and attach this model's bias adapter.

        Raises:
            AdapterError: the file is broken or belongs to another model.
        """
        adapter = Adapter.load(path)
        try:
            return self.attach(adapter)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None

    def attach(self, adapter: Adapter) -> Adapter:
        """Check that an adapter belongs to this model and attach the shared bias adapter.

        Raises:
            AdapterError: other modules, layer count, sizes, scale or hypernetwork.
        """
        config, made_by = self.config, self._internalizer.fingerprint
        sizes = {m: (adapter.A[m].shape[2], adapter.B[m].shape[2]) for m in adapter.A}
        for what, its, ours in (
            ("modules and their sizes", sizes, dict(config.target_modules)),
            ("depth", f"{adapter.num_layers} layers", f"{config.num_layers} layers"),
            ("hypernetwork", adapter.provenance.get("hypernetwork") or made_by, made_by),
            ("scale", adapter.scale, config.scale),
        ):
            if its != ours:
                raise AdapterError(
                    f"the adapter's {what}: {its}, this model's: {ours}; internalize the video "
                    "with this model"
                )
        return adapter if adapter.bias is not None else adapter.with_bias(self._internalizer.bias)

    @property
    def bias(self) -> BiasAdapter | None:
        """The bias adapter that all adapters of this model share."""
        return self._internalizer.bias

    def effect(self, adapter: AdapterOrPath, question: str) -> Effect:
        """Did the adapter do anything? Its size, and what it changes about one answer.

        Raises:
            AdapterError: the adapter does not belong to this model.
        """
        adapter = self._attached(adapter)
        with self._without_autocast():
            return measure_effect(self.backbone, adapter, question)

    def _attached(self, adapter: AdapterOrPath) -> Adapter:
        if isinstance(adapter, str | os.PathLike):
            return self.load_adapter(adapter)
        if not isinstance(adapter, Adapter):
            raise AdapterError(
                "adapters must be Adapter, the path of an adapter file or None, "
                f"got {type(adapter).__name__}"
            )
        return self.attach(adapter)

    def _without_autocast(self) -> torch.autocast:
        """Models run in the dtype they were loaded in."""
        return torch.autocast(self.backbone.decoder.device.type, enabled=False)


def _as_video(video: object, fps: float | None = None) -> Video | VideoError:
    """A file's path or a clip as it is, frames as a clip.

    Raises:
        TypeError: it is neither.
        VideoError: frames of another shape or dtype, or without ``fps``.
    """
    if isinstance(video, str | os.PathLike | Clip | VideoError):
        return video
    if not isinstance(video, Tensor | np.ndarray):
        raise TypeError(
            "a video must be a path (str or os.PathLike), a Clip, or uint8 frames with fps (a "
            f"tensor [F, 3, H, W] or an array [F, H, W, 3]), got {type(video).__name__}; write "
            "bytes to a file first"
        )
    if fps is None:
        raise VideoError("frames need fps: model.internalize(frames, fps=...)")
    return Clip.from_frames(video, fps)


def _is_single(questions: Questions) -> bool:
    """Whether it is one question or one conversation."""
    return isinstance(questions, str) or (len(questions) > 0 and isinstance(questions[0], Mapping))


def _questions(questions: Questions) -> list[Question]:
    return cast(list[Question], [questions] if _is_single(questions) else list(questions))


def _texts(questions: Questions, answers: list[Answer]) -> str | list[str]:
    if _is_single(questions) and len(answers) == 1:
        return answers[0].text
    return [answer.text for answer in answers]

"""Video2LoRA: a frozen VLM and its hypernetwork as one object that internalizes and answers.

Stateless: adapters are arguments. Asking never changes the model, so threads and batches with
different adapters, or none, do not see each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from v2l_fast.effect import Effect, measure_effect
from v2l_fast.errors import AdapterError, CheckpointError, ConfigError, VideoError
from v2l_fast.generation import Answer, SamplingParams, answer_prompts
from v2l_fast.hypernet.adapter import Adapter, BiasAdapter
from v2l_fast.hypernet.network import HyperNetwork, as_dtype
from v2l_fast.internalizing.batches import BATCH_TOKENS
from v2l_fast.internalizing.parts import Reading, Video
from v2l_fast.internalizing.videos import VideoInternalizer
from v2l_fast.loading import load_hypernet, shipped
from v2l_fast.video import Clip
from v2l_fast.video.reading import Backend
from v2l_fast.vlm import Backbone, Prompt, load_backbone
from v2l_fast.vlm.base import prompt_ids, visual_tokens
from v2l_fast.work_units import WorkUnit, run_to_completion

# Videos internalized together, as far as their tokens allow it.
BATCH_SIZE = 8

Progress = Callable[[str, int, int], None]
AdapterOrPath = Adapter | str | os.PathLike
Result = TypeVar("Result")


class Video2LoRA:
    """Internalize videos into LoRA adapters and answer questions from them.

    Args:
        backbone: the frozen VLM.
        hypernet: the hypernetwork trained for it.

    Raises:
        ConfigError: the two do not fit each other.
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
        # Weights are read once: a Video2LoRA is for a hypernetwork that no longer trains.
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
            name_or_path: "shapes" (the shipped pair), a directory, a hub id, or a released
                checkpoint (``.pt``). A directory holds the hypernetwork itself, or ``hypernet/``
                and ``base/``.
            base: the VLM; read from the hypernetwork's config when omitted.
            device: "cuda" when there is one, else "cpu".
            dtype: "bfloat16", "float16", "float32" or a torch.dtype; bfloat16 on a GPU and float32
                on a CPU when "auto" or omitted.
            compile: see :meth:`compile`; on a GPU only when omitted.

        Raises:
            CheckpointError, ConfigError: something is missing, broken or does not fit.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = as_dtype(dtype) or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        hypernet, found_base = load_hypernet(name_or_path)
        base = base or found_base or hypernet.config.base_model_name_or_path
        if base is None:
            raise CheckpointError(f"{name_or_path}: names no base model; pass base=...")
        backbone = load_backbone(shipped(base, "base") or base, device, dtype)
        model = cls(backbone, hypernet.to(device=device, dtype=dtype))
        if device.type == "cuda" if compile is None else compile:
            model.compile()
        return model

    def compile(self, backend: str = "inductor") -> None:
        """Compile vision encoding, decoder layers and hypernetwork layers.

        Answers and adapters stay the same, to rounding. Each kind of call takes seconds the first
        time, then no length of video or question compiles anything again.

        Args:
            backend: as torch.compile's.
        """
        self.backbone.compile(backend)
        self.hypernet.compile_layers(backend)

    # --- internalizing --------------------------------------------------------------------------

    def load_clip(
        self,
        video: Video,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
        decoder: Backend = "auto",
    ) -> Clip:
        """Sample and decode a video as the hypernetwork was trained to see it.

        A :class:`Clip` passes through as it is; a file's frames are on the model's device,
        where a GPU decodes them if it can. ``decoder`` is ``backend`` of
        :func:`~v2l_fast.video.load_video`.
        """
        reading = self._reading(max_frames, longest_edge, exact_frames, decoder=decoder)
        return reading.clips(_as_video(video))[0]

    @overload
    def internalize(self, videos: Video | Tensor | np.ndarray, **options: Any) -> Adapter: ...

    @overload
    def internalize(self, videos: Sequence[Video], **options: Any) -> list[Adapter]: ...

    def internalize(
        self,
        videos: Video | Tensor | np.ndarray | Sequence[Video | Tensor | np.ndarray],
        *,
        fps: float | None = None,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
        chunks: int = 1,
        decoder: Backend = "auto",
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
    ) -> Adapter | list[Adapter]:
        """Turn videos into adapters, one forward pass of encoder and hypernetwork for a batch.

        Args:
            videos: a file, a clip, or uint8 frames with ``fps``: a tensor [F, 3, H, W], or an array
                [F, H, W, 3] or [F, 3, H, W]; or a list of these.
            fps: of frames; files and clips have their own.
            max_frames, longest_edge: frames and pixels; as in training when omitted.
            exact_frames: take exactly ``max_frames`` over the whole clip, whatever its duration.
            chunks: take each video in so many parts of equal duration, each sampled like a video of
                its own, and compose their adapters (paper Section 5.6). A network with
                ``chunk_position`` is told each part's place.
            decoder: as of :meth:`load_clip`.
            batch_size: videos whose frames are held at a time, and whose contexts (those of all
                chunks) go through the model together as far as memory is bounded. Adapters do not
                depend on it, to rounding.
            progress: called with (stage, done, total).

        Returns:
            An :class:`Adapter`, or a list of them for a list.

        Raises:
            VideoError: a file cannot be read or its factors are not finite.
            ConfigError: ``chunks`` or ``batch_size`` is less than 1.
            TypeError: something is no video.
        """
        single = not isinstance(videos, Sequence) or isinstance(videos, str | bytes)
        adapters = []
        for outcome in self.internalize_each(
            [_as_video(video, fps) for video in ([videos] if single else videos)],
            max_frames=max_frames,
            longest_edge=longest_edge,
            exact_frames=exact_frames,
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
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
        chunks: int = 1,
        decoder: Backend = "auto",
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
    ) -> Iterator[Adapter | VideoError]:
        """:meth:`internalize` of any number of videos, where one that fails costs the others
        nothing.

        Args:
            videos: ``batch_size`` of them are taken when the adapters before them have been. Who
                reads files ahead gives the error in place of a clip that there is not.

        Yields:
            For each video, in order, its adapter or the error that names it.

        Raises:
            ConfigError: ``chunks`` or ``batch_size`` is less than 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is no number of videos: use 1 or more")
        reading = self._reading(max_frames, longest_edge, exact_frames, chunks, decoder)
        videos = iter(videos)
        while batch := [_as_video(video) for video in islice(videos, batch_size)]:
            with self._without_autocast():
                outcomes = run_to_completion(
                    self._internalizer.steps(batch, reading, BATCH_TOKENS), progress
                )
            yield from outcomes

    def iter_internalize(
        self,
        video: Video,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
        chunks: int = 1,
        decoder: Backend = "auto",
    ) -> Generator[WorkUnit, None, Adapter]:
        """:meth:`internalize` of one video in small units of work, for whoever does more than one
        thing at a time.

        Yields what comes next (stage, done, total), then does it when asked for the next: decoding
        and resizing ("decode", without the model), then bounded chunks of frames ("encode frames"),
        then one layer at a time ("generate adapter"); chunks one after the other, so that no unit
        is longer for their number. Units may run in different threads.

        Returns:
            The adapter, as the generator's value (:func:`~v2l_fast.work_units.run_to_completion`).
        """
        reading = self._reading(max_frames, longest_edge, exact_frames, chunks, decoder)
        steps = self._internalizer.steps([_as_video(video)], reading, 0)
        (outcome,) = yield from self._iter_without_autocast(steps)
        if isinstance(outcome, VideoError):
            raise outcome
        return outcome

    def _reading(
        self,
        max_frames: int | None,
        longest_edge: int | None,
        exact_frames: bool,
        chunks: int = 1,
        decoder: Backend = "auto",
    ) -> Reading:
        sampling = self.config.sampling.override(max_frames, longest_edge)
        return Reading(
            sampling.max_frames,
            sampling.target_fps,
            sampling.longest_edge,
            exact_frames,
            chunks,
            decoder,
            self.backbone.decoder.device,
        )

    def iter_question_prompt(
        self,
        clip: Clip,
        question: str,
        longest_edge: int | None = None,
        check: Callable[[int], None] = lambda tokens: None,
    ) -> Generator[WorkUnit, None, Prompt]:
        """The prompt of a question with the video in context, as :meth:`iter_internalize`.

        Args:
            check: called with the prompt's number of tokens before anything is computed; what it
                raises ends the work.
        """
        edge = self.config.sampling.override(longest_edge=longest_edge).longest_edge
        yield "decode", 0, 1
        ids = prompt_ids(self.backbone.prompt_builder, clip, question, edge, answer_follows=True)
        check(len(ids))
        video = yield from self._iter_without_autocast(self.backbone.iter_encode(clip, edge))
        with self._without_autocast():
            return self.backbone.video_prompt(video, question, ids=ids)

    def visual_tokens(self, clip: Clip, longest_edge: int | None = None) -> int:
        """How many tokens of the context stand for the clip's pixels."""
        edge = self.config.sampling.override(longest_edge=longest_edge).longest_edge
        return visual_tokens(self.backbone.prompt_builder, clip, edge)

    # --- answering ------------------------------------------------------------------------------

    @overload
    def ask(
        self, questions: str, adapters: AdapterOrPath | None = None, **sampling: Any
    ) -> str: ...

    @overload
    def ask(
        self,
        questions: str | Sequence[str],
        adapters: AdapterOrPath | Sequence[AdapterOrPath | None] | None = None,
        **sampling: Any,
    ) -> list[str]: ...

    def ask(
        self,
        questions: str | Sequence[str],
        adapters: AdapterOrPath | Sequence[AdapterOrPath | None] | None = None,
        **sampling: Any,
    ) -> str | list[str]:
        """Answer from adapters alone, zero visual tokens in context.

        Args:
            questions: one or several.
            adapters: an adapter or its file, one for all questions, or one (or None) for each; None
                for the plain model.
            **sampling: fields of :class:`~v2l_fast.generation.SamplingParams` (max_new_tokens,
                temperature, top_p, top_k, seed); greedy by default.

        Returns:
            A string for a single question given as a string, else a list.

        Raises:
            AdapterError: an adapter does not belong to this model, or the counts differ.
        """
        return _texts(questions, self.answer(questions, adapters, **sampling))

    @overload
    def ask_direct(self, questions: str, video: Video, **options: Any) -> str: ...

    @overload
    def ask_direct(self, questions: Sequence[str], video: Video, **options: Any) -> list[str]: ...

    def ask_direct(
        self,
        questions: str | Sequence[str],
        video: Video,
        *,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
        **sampling: Any,
    ) -> str | list[str]:
        """The baseline: the same model with the video in context of every question."""
        edge = self.config.sampling.override(longest_edge=longest_edge).longest_edge
        clip = self.load_clip(video, max_frames, edge, exact_frames)
        answers = self.answer_direct(questions, clip, longest_edge=edge, **sampling)
        return _texts(questions, answers)

    def answer(
        self,
        questions: str | Sequence[str],
        adapters: AdapterOrPath | Sequence[AdapterOrPath | None] | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """:meth:`ask` with token counts and times."""
        questions = [questions] if isinstance(questions, str) else list(questions)
        if adapters is None or isinstance(adapters, AdapterOrPath):
            adapters = [adapters] * len(questions)
        adapters = list(adapters)
        if len(adapters) == 1:
            adapters *= len(questions)
        elif len(questions) == 1:
            questions *= len(adapters)
        if len(adapters) != len(questions):
            raise AdapterError(
                f"{len(questions)} questions and {len(adapters)} adapters: give one adapter for "
                "all, or one for each question"
            )
        # One attached copy of each, so that an adapter given twice still takes one slot.
        known = {id(a): None if a is None else self._attached(a) for a in adapters}
        with self._without_autocast():
            return list(
                answer_prompts(
                    self.backbone,
                    [lambda text=text: self.backbone.question(text) for text in questions],
                    [known[id(a)] for a in adapters],
                    SamplingParams(**sampling),
                )
            )

    def answer_direct(
        self,
        questions: str | Sequence[str],
        clips: Clip | Sequence[Clip],
        longest_edge: int | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """:meth:`ask_direct` on decoded frames, with token counts and times.

        Every question pays for its video again, as a model without adapters does.

        Args:
            clips: one for all questions, or one for each.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        clips = [clips] * len(questions) if isinstance(clips, Clip) else list(clips)
        if len(clips) != len(questions):
            raise VideoError(f"{len(questions)} questions and {len(clips)} clips: give one each")
        edge = self.config.sampling.override(longest_edge=longest_edge).longest_edge
        with self._without_autocast():
            return list(
                answer_prompts(
                    self.backbone,
                    [
                        lambda clip=clip, text=text: self.backbone.question_about(clip, text, edge)
                        for clip, text in zip(clips, questions, strict=True)
                    ],
                    [None] * len(questions),
                    SamplingParams(**sampling),
                )
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
        expected = self.config.target_modules
        if set(adapter.A) != set(expected):
            raise AdapterError(
                f"the adapter is for {', '.join(sorted(adapter.A))}, this model adapts "
                f"{', '.join(expected)}: internalize the video with this model"
            )
        if adapter.num_layers != self.config.num_layers:
            raise AdapterError(
                f"the adapter has {adapter.num_layers} layers, this model "
                f"{self.config.num_layers}: internalize the video with this model"
            )
        for module, (d_in, d_out) in expected.items():
            sizes = adapter.A[module].shape[2], adapter.B[module].shape[2]
            if sizes != (d_in, d_out):
                raise AdapterError(
                    f"the adapter's {module} is {sizes}, this model's {(d_in, d_out)}: "
                    "internalize the video with this model"
                )
        made_by = adapter.provenance.get("hypernetwork")
        if made_by not in (None, self._internalizer.fingerprint):
            raise AdapterError(
                f"the adapter was made by hypernetwork {made_by}, this one is "
                f"{self._internalizer.fingerprint}: internalize the video with this model"
            )
        if adapter.scale != self.config.scale:
            raise AdapterError(
                f"the adapter's scale is {adapter.scale}, this model's {self.config.scale}: "
                "internalize the video with this model"
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
        """Without autocast: models run in the dtype they were loaded in."""
        return torch.autocast(self.backbone.decoder.device.type, enabled=False)

    def _iter_without_autocast(self, steps: Generator[WorkUnit, None, Result]) -> Generator:
        """Run each unit in :meth:`_without_autocast`; code between units is not affected."""
        while True:
            with self._without_autocast():
                try:
                    step = next(steps)
                except StopIteration as end:
                    return end.value
            yield step


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
    if isinstance(video, np.ndarray):
        # Arrays are read with the channels first where only that fits, as tensors are.
        last = video.ndim == 4 and video.shape[-1] == 3 and video.shape[1] != 3
        video = np.ascontiguousarray(video.transpose(0, 3, 1, 2) if last else video)
        if video.dtype != np.uint8:
            raise VideoError(f"frames are {video.dtype} {list(video.shape)}; pass uint8")
        video = torch.from_numpy(video)
    return Clip.from_frames(video, fps)


def _texts(questions: str | Sequence[str], answers: list[Answer]) -> str | list[str]:
    if isinstance(questions, str) and len(answers) == 1:
        return answers[0].text
    return [answer.text for answer in answers]

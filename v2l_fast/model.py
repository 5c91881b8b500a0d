"""Video2LoRA: a frozen VLM and its hypernetwork as one object that internalizes and answers.

Stateless: adapters are arguments. Asking never changes the model, so threads and batches with
different adapters, or none, do not see each other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from v2l_fast.adapted import AdapterSlots
from v2l_fast.adapter import Adapter
from v2l_fast.backbones import Backbone, Prompt, load_backbone
from v2l_fast.backbones.steps import Step, finish
from v2l_fast.errors import AdapterError, CheckpointError, ConfigError, VideoError
from v2l_fast.generation import Sampling, generate
from v2l_fast.hypernet import HyperNetwork
from v2l_fast.internalizing.batches import BATCH_TOKENS, generate_steps
from v2l_fast.internalizing.parts import Part, Reading, Video
from v2l_fast.loading import load_hypernet, shipped
from v2l_fast.video import VideoClip
from v2l_fast.video.reading import Backend

# Questions answered in one forward pass; more are split.
MAX_BATCH = 32
# Videos internalized together, as far as their tokens allow it.
BATCH_SIZE = 8

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost.

    Attributes:
        text: the answer.
        prompt_tokens: tokens in context, visual ones included.
        visual_tokens: tokens that stand for pixels; 0 with an adapter.
        new_tokens: tokens generated.
        time_to_first_token: seconds from the call to the first token of its batch, building the
            prompt (for the direct baseline: resizing and vision tower) included.
    """

    text: str
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    time_to_first_token: float


@dataclass(frozen=True)
class Effect:
    """Did the adapter do anything?

    Attributes:
        update_norms: module -> Frobenius norm of each layer's generated update, [L].
        relative_norms: the same over the norm of the layer's frozen weight, [L].
        logit_shift: largest change of a logit of the first answer token.
        divergence: KL(with adapter ‖ without) of the first answer token's distribution, nats.
        answer: the answer with the adapter.
        answer_without: the answer of the same model without it.
    """

    update_norms: dict[str, list[float]]
    relative_norms: dict[str, list[float]]
    logit_shift: float
    divergence: float
    answer: str
    answer_without: str


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
        self._bias = hypernet.bias_adapter()
        self._fingerprint = hypernet.fingerprint

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        base: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile: bool | None = None,
    ) -> Video2LoRA:
        """Load a hypernetwork and its frozen VLM.

        Args:
            name_or_path: "shapes" (the shipped pair), a directory, a hub id, or a released
                checkpoint (``.pt``). A directory holds the hypernetwork itself, or ``hypernet/``
                and ``base/``.
            base: the VLM; read from the hypernetwork's config when omitted.
            device: "cuda" when there is one, else "cpu".
            dtype: bfloat16 on a GPU, float32 on a CPU when omitted.
            compile: see :meth:`compile`; on a GPU only when omitted.

        Raises:
            CheckpointError, ConfigError: something is missing, broken or does not fit.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
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
    ) -> VideoClip:
        """Sample and decode a video as the hypernetwork was trained to see it.

        A :class:`VideoClip` passes through as it is; a file's frames are on the model's device,
        where a GPU decodes them if it can. ``decoder`` is ``backend`` of
        :func:`~v2l_fast.video.load_video`.
        """
        reading = self._reading(max_frames, longest_edge, exact_frames, decoder=decoder)
        return reading.clips(video)[0]

    @overload
    def internalize(self, videos: Video | Tensor, **options: Any) -> Adapter: ...

    @overload
    def internalize(self, videos: Sequence[Video], **options: Any) -> list[Adapter]: ...

    def internalize(
        self,
        videos: Video | Tensor | Sequence[Video],
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
            videos: a file, a clip, or uint8 frames [F, 3, H, W] with ``fps``; or a list of files
                or clips.
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
        """
        if isinstance(videos, Tensor):
            if fps is None:
                raise VideoError("frames need fps: model.internalize(frames, fps=...)")
            videos = VideoClip.from_frames(videos, fps)
        single = not isinstance(videos, Sequence) or isinstance(videos, str)
        adapters = []
        for outcome in self.internalize_each(
            [videos] if single else videos,
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
        while batch := list(islice(videos, batch_size)):
            yield from finish(self._batch_steps(batch, reading, BATCH_TOKENS), progress)

    def internalize_steps(
        self,
        video: Video,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
        chunks: int = 1,
        decoder: Backend = "auto",
    ) -> Generator[Step, None, Adapter]:
        """:meth:`internalize` of one video in small units of work, for whoever does more than one
        thing at a time.

        Yields what comes next (stage, done, total), then does it when asked for the next: decoding
        and resizing ("decode", without the model), then bounded chunks of frames ("encode frames"),
        then one layer at a time ("generate adapter"); chunks one after the other, so that no unit
        is longer for their number. Units may run in different threads.

        Returns:
            The adapter, as the generator's value; see :func:`~v2l_fast.backbones.steps.finish`.
        """
        reading = self._reading(max_frames, longest_edge, exact_frames, chunks, decoder)
        (outcome,) = yield from self._batch_steps([video], reading, 0)
        if isinstance(outcome, VideoError):
            raise outcome
        return outcome

    def _batch_steps(
        self, videos: Sequence[Video | VideoError], reading: Reading, batch_tokens: int
    ) -> Generator[Step, None, list[Adapter | VideoError]]:
        """What became of each video; their parts go through the model together."""
        parts: list[Part] = []
        owners: list[int] = []
        failed: dict[int, VideoError] = {}
        for number, video in enumerate(videos):
            if isinstance(video, VideoError):
                failed[number] = video
                continue
            yield "decode", number, len(videos)
            try:
                found = reading.parts(video)
            except VideoError as error:
                failed[number] = error
                continue
            parts += found
            owners += [number] * len(found)
        adapters = yield from generate_steps(
            self.backbone, self.hypernet, parts, reading.longest_edge, batch_tokens
        )
        made: list[list[Adapter]] = [[] for _ in videos]
        for number, part, adapter in zip(owners, parts, adapters, strict=True):
            if adapter is None:
                failed[number] = VideoError(
                    f"{part.clip.path or 'frames in memory'}: the context gives NaN or infinite "
                    "factors; are the base model's weights and dtype sound? float16 overflows: "
                    "use bfloat16 or float32"
                )
                continue
            record = self._provenance(part, reading)
            made[number].append(replace(adapter, bias=self._bias, provenance=record))
        return [
            failed[number] if number in failed else _whole(own) for number, own in enumerate(made)
        ]

    def _reading(
        self,
        max_frames: int | None,
        longest_edge: int | None,
        exact_frames: bool,
        chunks: int = 1,
        decoder: Backend = "auto",
    ) -> Reading:
        config = self.config
        return Reading(
            config.max_frames if max_frames is None else max_frames,
            config.target_fps,
            config.longest_edge if longest_edge is None else longest_edge,
            exact_frames,
            chunks,
            decoder,
            self.backbone.decoder.device,
        )

    def question_steps(
        self, clip: VideoClip, question: str, longest_edge: int | None = None
    ) -> Generator[Step, None, Prompt]:
        """The prompt of a question with the video in context, as :meth:`internalize_steps`."""
        edge = self.config.longest_edge if longest_edge is None else longest_edge
        yield "decode", 0, 1
        return self.backbone.about((yield from self.backbone.encode_steps(clip, edge)), question)

    def _provenance(self, part: Part, reading: Reading) -> dict:
        clip = part.clip
        return {
            "source": {
                "name": None if clip.path is None else Path(clip.path).name,
                "sha256": clip.sha256,
                "frame_indices": [int(i) for i in clip.indices],
                "timestamps": [round(t, 6) for t in clip.timestamps],
                "fps": clip.fps,
                "duration": clip.duration,
                "num_frames": clip.num_frames,
                "place": list(part.place),
            },
            "preprocessing": {
                "version": self.backbone.preprocessing,
                "longest_edge": reading.longest_edge,
                "exact_frames": reading.exact_frames,
                "instruction": self.config.instruction,
            },
            "hypernetwork": self._fingerprint,
            "base_model": self.config.base_model_name_or_path or self.backbone.name_or_path,
        }

    # --- answering ------------------------------------------------------------------------------

    @overload
    def ask(self, questions: str, adapters: Adapter | None = None, **sampling: Any) -> str: ...

    @overload
    def ask(
        self,
        questions: str | Sequence[str],
        adapters: Adapter | Sequence[Adapter | None] | None = None,
        **sampling: Any,
    ) -> list[str]: ...

    def ask(
        self,
        questions: str | Sequence[str],
        adapters: Adapter | Sequence[Adapter | None] | None = None,
        **sampling: Any,
    ) -> str | list[str]:
        """Answer from adapters alone, zero visual tokens in context.

        Args:
            questions: one or several.
            adapters: one for all questions, one (or None) for each, or None for the plain model.
            **sampling: fields of :class:`~v2l_fast.generation.Sampling` (max_new_tokens,
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
        edge = self.config.longest_edge if longest_edge is None else longest_edge
        clip = self.load_clip(video, max_frames, edge, exact_frames)
        answers = self.answer_direct(questions, clip, longest_edge=edge, **sampling)
        return _texts(questions, answers)

    def answer(
        self,
        questions: str | Sequence[str],
        adapters: Adapter | Sequence[Adapter | None] | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """:meth:`ask` with token counts and times."""
        questions = [questions] if isinstance(questions, str) else list(questions)
        if adapters is None or isinstance(adapters, Adapter):
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
        known = {id(a): None if a is None else self.attach(a) for a in adapters}
        return list(
            self._answers(
                [lambda text=text: self.backbone.question(text) for text in questions],
                [known[id(a)] for a in adapters],
                Sampling(**sampling),
            )
        )

    def answer_direct(
        self,
        questions: str | Sequence[str],
        clips: VideoClip | Sequence[VideoClip],
        longest_edge: int | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """:meth:`ask_direct` on decoded frames, with token counts and times.

        Every question pays for its video again, as a model without adapters does.

        Args:
            clips: one for all questions, or one for each.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        clips = [clips] * len(questions) if isinstance(clips, VideoClip) else list(clips)
        if len(clips) != len(questions):
            raise VideoError(f"{len(questions)} questions and {len(clips)} clips: give one each")
        edge = self.config.longest_edge if longest_edge is None else longest_edge
        return list(
            self._answers(
                [
                    lambda clip=clip, text=text: self.backbone.question_about(clip, text, edge)
                    for clip, text in zip(clips, questions, strict=True)
                ],
                [None] * len(questions),
                Sampling(**sampling),
            )
        )

    def _answers(
        self,
        builders: Sequence[Callable[[], Prompt]],
        adapters: Sequence[Adapter | None],
        sampling: Sampling,
    ) -> Iterator[Answer]:
        """Answer in batches; each prompt is built, and its cost timed, when its turn comes."""
        decoder = self.backbone.decoder
        for first in range(0, len(builders), MAX_BATCH):
            start = time.perf_counter()
            part = slice(first, first + MAX_BATCH)
            prompts = [build() for build in builders[part]]
            slots = AdapterSlots.pack(adapters[part], decoder.device, decoder.dtype)
            built = time.perf_counter() - start
            generated = generate(
                decoder,
                [prompt.embeddings for prompt in prompts],
                self.backbone.stop_ids,
                replace(sampling, seed=sampling.seed + first),
                slots,
            )
            for prompt, tokens in zip(prompts, generated.tokens, strict=True):
                yield Answer(
                    self.backbone.decode(tokens),
                    len(prompt),
                    prompt.visual_tokens,
                    len(tokens),
                    built + generated.time_to_first_token,
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
        if made_by not in (None, self._fingerprint):
            raise AdapterError(
                f"the adapter was made by hypernetwork {made_by}, this one is "
                f"{self._fingerprint}: internalize the video with this model"
            )
        if adapter.scale != self.config.scale:
            raise AdapterError(
                f"the adapter's scale is {adapter.scale}, this model's {self.config.scale}: "
                "internalize the video with this model"
            )
        return adapter if adapter.bias is not None else adapter.with_bias(self._bias)

    @torch.inference_mode()
    def effect(self, adapter: Adapter, question: str) -> Effect:
        """Did the adapter do anything? Its size, and what it changes about one answer."""
        adapter = self.attach(adapter)
        decoder = self.backbone.decoder
        prompt = self.backbone.question(question).embeddings[None]
        slots = AdapterSlots.pack([adapter], decoder.device, decoder.dtype)
        plain, adapted = (
            decoder.logits(decoder.forward(prompt, adapters=s)[0, -1]) for s in (None, slots)
        )
        log_plain, log_adapted = plain.log_softmax(-1), adapted.log_softmax(-1)
        norms = adapter.norms()["layer"]
        with_adapter, without = self.ask([question, question], [adapter, None])
        return Effect(
            {m: n.tolist() for m, n in norms.items()},
            {m: (n.cpu() / self._weight_norms(m)).tolist() for m, n in norms.items()},
            (adapted - plain).abs().max().item(),
            (log_adapted.exp() * (log_adapted - log_plain)).sum().item(),
            with_adapter,
            without,
        )

    def _weight_norms(self, module: str) -> Tensor:
        linears = (self.backbone.linear(i, module) for i in range(self.config.num_layers))
        return torch.stack([linear.weight.float().norm().cpu() for linear in linears])


def _whole(parts: list[Adapter]) -> Adapter:
    return parts[0] if len(parts) == 1 else Adapter.compose(parts)


def _texts(questions: str | Sequence[str], answers: list[Answer]) -> str | list[str]:
    if isinstance(questions, str) and len(answers) == 1:
        return answers[0].text
    return [answer.text for answer in answers]

"""The results on the shapes world, measured section by section, each with a JSON record.

Responsible for the measurements, their numbers of videos and their scores; an interrupted report
resumes with the section that is missing. The ablations are `v2l_fast.evaluation`'s, the table of
conditions is `evaluate`'s, the page `report_page`'s.

Scores are attribute accuracy for captions and exact match for questions: captions share so many
words that token-F1 is high even for the caption of another video.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.ablations import (
    adapter_norms,
    compare_chunks,
    layer_removal,
    logit_attribution,
    rank_ablation,
)
from v2l_fast.evaluation.efficiency import compare_budgets, sweep
from v2l_fast.evaluation.examples import EvalExample, internalize_each
from v2l_fast.evaluation.methods import FrameFusion, MethodSettings
from v2l_fast.files import LARGE_BYTES, read_json
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.outputs import ResumableFolder, check_fingerprint
from v2l_fast.shapes.evaluate import (
    MAX_NEW_TOKENS,
    clip_name,
    evaluate,
    evaluate_files,
    examples_for,
    rendered_clips,
)
from v2l_fast.shapes.language import CAPTION_PROMPTS, caption, parse_caption, plain
from v2l_fast.shapes.probes import probe
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.world import Scene, sample_scenes
from v2l_fast.work_units import Progress, silent

# Share of the report's videos (512) that a section uses; expensive sections use fewer.
SHARES = {
    "limits": 1,
    "table": 1,
    "chunks": 1 / 4,
    "efficiency": 1 / 32,
    "sweep": 1 / 64,
    "rank": 1,
    "layers": 1,
    "logits": 1,
    "norms": 1,
}
# Share of the table's videos that are also read as H.264 files.
_ENCODED_SHARE = 1 / 8
# (exact frames, longest edge) of the efficiency comparison; the first pair is that of training.
BUDGETS = ((8, 48), (8, 96), (32, 48), (32, 96))
# Fewer tokens than merging alone reaches at 8 frames, so that FrameFusion also prunes.
FUSION = FrameFusion(keep=1 / 8)
SWEEP_FRAMES, SWEEP_EDGES = (4, 8, 16, 32), (48, 96, 144)
CHUNKS = (1, 2, 4, 8, 16)


def accuracy(answer: str, reference: str) -> float:
    """Share of a reference caption's attributes that the answer states; otherwise exact match."""
    expected = parse_caption(reference)
    if not expected:
        return float(plain(answer) == plain(reference))
    stated = parse_caption(answer)
    return sum(stated.get(slot) == value for slot, value in expected.items()) / len(expected)


@dataclass
class ShapesReport:
    """The sections of a report on the test split.

    Attributes:
        model: the pair to report on.
        folder: contains records, clips and the sweep's cells; an existing record is not measured
            again.
        videos: number of videos of the sections that use all.
        trained: another network for the same base, trained on chunks, for comparison in the section
            about chunks.
        seed: of the scenes and questions.
        progress: called with (stage, done, total).
    """

    model: Video2LoRA
    folder: Path
    videos: int = 512
    trained: Video2LoRA | None = None
    seed: int = 0
    progress: Progress = silent

    def section(self, name: str) -> dict[str, Any]:
        """The record of a section, measured if the folder does not have it.

        Raises:
            ConfigError: the folder belongs to another model, seed or number of videos.
        """
        network = self.model.hypernet.fingerprint
        # No other section depends on it.
        with_trained = name == "chunks" and self.trained is not None
        trained = {"trained": self.trained.hypernet.fingerprint if with_trained else None}

        def new_record() -> dict[str, Any]:
            about = {"network": network, **trained, "machine": machine()}
            count = self.count(name)
            return {**about, "videos": count, **MEASUREMENTS[name](self, count)}

        fingerprint = {"network": network, "videos": self.videos, "seed": self.seed}
        record = ResumableFolder(self.folder, fingerprint).record(name, new_record)
        saved = {"trained": record.get("trained")}
        remedy = "choose another folder or delete it"
        check_fingerprint(self.folder / f"{name}.json", saved, trained, ConfigError, remedy)
        return record

    def records(self) -> dict[str, dict[str, Any]]:
        """The records in the folder, by section.

        Raises:
            ConfigError: a record belongs to another model.
        """
        records = {}
        for name in MEASUREMENTS:
            if (path := self.folder / f"{name}.json").exists():
                record = read_json(path, LARGE_BYTES, ConfigError, kind=dict, allow_nan=True)
                if record.get("network") != self.model.hypernet.fingerprint:
                    raise ConfigError(f"{path}: of another model; delete it to measure it again")
                records[name] = record
        return records

    def count(self, name: str) -> int:
        """Number of videos of a section."""
        return max(2, round(self.videos * SHARES[name]))

    def scenes(self, count: int) -> list[Scene]:
        """The first scenes of the test split."""
        return sample_scenes("test", count, self.seed)

    @cached_property
    def captions(self) -> list[EvalExample]:
        """One caption example per video, with rendered frames."""
        scenes = self.scenes(self.videos)
        return [
            EvalExample(clip, CAPTION_PROMPTS[0], (caption(scene),), "caption")
            for clip, scene in zip(rendered_clips(scenes), scenes, strict=True)
        ]

    @cached_property
    def adapters(self) -> list[Adapter]:
        """The adapters of the captions' videos."""
        return internalize_each(self.model, self.captions, self.progress)

    def files(self, count: int) -> list[EvalExample]:
        """A caption and five questions for each of the first ``count`` videos, as H.264 files."""
        scenes = self.scenes(count)
        clips = self.folder / "clips"
        clips.mkdir(parents=True, exist_ok=True)
        for index, scene in enumerate(scenes):
            if not (path := clips / clip_name("test", index)).exists():
                write_clip(scene, path)
        return [
            EvalExample(
                clips / line.video_path,
                line.prompt,
                (line.target_text,),
                line.metadata.get("subset", "caption"),
            )
            for line in examples_for(scenes, seed=self.seed)
        ]


def machine() -> str:
    """Description of this machine."""
    count = torch.get_num_threads()
    threads = "one thread" if count == 1 else f"{count} threads"
    return f"{platform.machine()} CPU, {threads}, torch {torch.__version__}"


def _limits(report: ShapesReport, count: int) -> dict[str, Any]:
    return probe(report.model, report.scenes(count), report.seed, report.progress)


def _table(report: ShapesReport, count: int) -> dict[str, Any]:
    record = evaluate(report.model, report.scenes(count), report.seed, report.progress)
    encoded = report.scenes(max(2, round(count * _ENCODED_SHARE)))
    return record | {"encoded_files": evaluate_files(report.model, encoded)}


def _rank(report: ShapesReport, count: int) -> dict[str, Any]:
    return rank_ablation(
        report.model,
        report.captions[:count],
        report.adapters[:count],
        accuracy,
        max_new_tokens=MAX_NEW_TOKENS,
        progress=report.progress,
    )


def _layers(report: ShapesReport, count: int) -> dict[str, Any]:
    examples, adapters = report.captions[:count], report.adapters[:count]
    return layer_removal(report.model, examples, adapters, report.progress)


def _logits(report: ShapesReport, count: int) -> dict[str, Any]:
    examples, adapters = report.captions[:count], report.adapters[:count]
    return logit_attribution(report.model, examples, adapters, report.progress)


def _norms(report: ShapesReport, count: int) -> dict[str, Any]:
    return adapter_norms(report.model, report.adapters[:count])


def _chunks(report: ShapesReport, count: int) -> dict[str, Any]:
    examples = report.files(count)
    networks = {"zero-shot": report.model}
    if report.model.config.chunk_position:
        networks = {"trained on chunks": report.model}
    if report.trained is not None:
        networks["trained on chunks"] = report.trained
    return {
        "networks": {
            name: compare_chunks(
                model,
                examples,
                accuracy,
                CHUNKS,
                MAX_NEW_TOKENS,
                report.progress,
            )
            for name, model in networks.items()
        }
    }


def _efficiency(report: ShapesReport, count: int) -> dict[str, Any]:
    sampling = report.model.config.sampling.override(exact_frames=True)
    setting = MethodSettings(report.model, sampling, MAX_NEW_TOKENS, FUSION)
    return compare_budgets(
        setting, report.files(count), accuracy, BUDGETS, progress=report.progress
    )


def _sweep(report: ShapesReport, count: int) -> dict[str, Any]:
    return sweep(
        report.model,
        report.files(count),
        accuracy,
        report.folder / f"sweep-{count}",
        SWEEP_FRAMES,
        SWEEP_EDGES,
        MAX_NEW_TOKENS,
        report.progress,
    )


MEASUREMENTS: Mapping[str, Callable[[ShapesReport, int], dict[str, Any]]] = {
    "limits": _limits,
    "table": _table,
    "chunks": _chunks,
    "efficiency": _efficiency,
    "sweep": _sweep,
    "rank": _rank,
    "layers": _layers,
    "logits": _logits,
    "norms": _norms,
}


def measure(
    report: ShapesReport, names: Sequence[str] = tuple(MEASUREMENTS)
) -> dict[str, dict[str, Any]]:
    """The records of the named sections.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in names:
        if name not in MEASUREMENTS:
            raise ConfigError(f"unknown section {name!r}; choose from {', '.join(MEASUREMENTS)}")
    return {name: report.section(name) for name in names}

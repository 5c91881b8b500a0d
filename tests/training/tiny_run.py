"""A training run of the tiny random model; as a command, for tests that need processes to kill.

python -m tests.training.tiny_run [--kill-at STEP] [--stop-at STEP] [section.key=value]...
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests import tiny
from v2l_fast.data.readers import Failure, Sample
from v2l_fast.pipeline import Context
from v2l_fast.training.config import TrainConfig, load_config
from v2l_fast.training.trainer import train
from v2l_fast.vlm.smolvlm import SmolVLM, SmolVLMPromptBuilder

SETTINGS = Path(__file__).with_suffix(".toml")
TURNS = (
    ("What color is it?", "red"),
    ("What happens?", "a small circle moves left"),
    ("How many?", "three"),
)


@dataclass
class TinySource:
    """Random visual features; one to three turns a video, which differ by step.

    Attributes:
        inputs: the tiny backbone's.
        videos: how many.
        broken: indices of those that fail.
        events: (step, signal) pairs: when the step is first loaded, the process gets the signal.
        loaded: (step, index) of every call in this process.
    """

    inputs: SmolVLMPromptBuilder
    videos: int = 13
    broken: frozenset[int] = frozenset()
    events: dict[int, int] = field(default_factory=dict)
    loaded: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.videos

    def load(self, index: int, step: int) -> Sample | Failure:
        self.loaded.append((step, index))
        if step in self.events:
            os.kill(os.getpid(), self.events.pop(step))
        if index in self.broken:
            return Failure(f"video {index}", "cannot be read\nsecond line")
        generator = torch.Generator().manual_seed(index)
        frames = 1 + index % 2
        ids = self.inputs.video_prompt(
            list(range(frames)), frames, 0, 0, "Internalize this.", False
        )
        features = torch.randn(frames, self.inputs.tokens_per_view, 32, generator=generator)
        count = 1 + (index + step) % len(TURNS)
        return Sample(
            video=f"video {index}",
            chunks=(Context(torch.tensor(ids), features=features),),
            prompt_prefix=self.inputs.ids("<|im_start|>User:"),
            qa_pairs=tuple(
                (self.inputs.ids(f"{q}<end_of_utterance>\nAssistant:"), self.inputs.answer(a))
                for q, a in TURNS[:count]
            ),
            task_types=("qa", "captioning", "qa")[:count],
            frames=frames,
        )


def settings(folder: Path, *overrides: str) -> TrainConfig:
    """The tiny run's, in `folder`."""
    return load_config(SETTINGS, [f'run.folder="{folder}"', *overrides])


def run(config: TrainConfig, backbone: SmolVLM | None = None, **source: object) -> dict:
    """Train; `source` goes to `TinySource`."""
    backbone = backbone or tiny.backbone()
    sources = (
        TinySource(backbone.prompt_builder, **source),
        TinySource(backbone.prompt_builder, videos=4),
    )
    return train(config, backbone=backbone, sources=sources)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--broken", type=int, nargs="*", default=[])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    events = {arguments.kill_at: signal.SIGKILL, arguments.stop_at: signal.SIGTERM}
    torch.set_num_threads(1)
    run(
        load_config(SETTINGS, arguments.overrides),
        broken=frozenset(arguments.broken),
        events={step: number for step, number in events.items() if step is not None},
    )


if __name__ == "__main__":
    sys.exit(main())

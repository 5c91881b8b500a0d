"""Names from before the packages were rearranged: they still import, with a warning.

``MOVED`` has modules: importing an old path returns the module that replaced it. ``RENAMED`` has
classes and functions. The next release removes the old names.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old path -> new path, both in v2l_fast. The longest entry that a path begins with counts, so one
# line moves a package with its modules.
MOVED = {
    "adapted": "hypernet.adapted_linear",
    "adapter": "hypernet.adapter",
    "adapter_files": "hypernet.adapter_files",
    "adapter_scope": "hypernet.adapted_linear",
    "analysis": "evaluation",
    "analysis.attribution": "evaluation.ablations",
    "analysis.chunks": "evaluation.ablations",
    "analysis.framefusion": "evaluation.methods",
    "analysis.inputs": "evaluation.examples",
    "analysis.layers": "evaluation.ablations",
    "analysis.norms": "evaluation.ablations",
    "analysis.rank": "evaluation.ablations",
    "analysis.records": "evaluation.report",
    "analysis.scores": "evaluation.ablations",
    "analysis.sweep": "evaluation.efficiency",
    "analysis.tables": "evaluation.report",
    "analysis.timing": "evaluation.efficiency",
    "backbones": "vlm",
    "backbones.flash": "vlm.decoder",
    "backbones.loading": "vlm",
    "backbones.smolvlm_inputs": "vlm.smolvlm",
    "backbones.steps": "work_units",
    "cli.analyze": "cli.evaluate",
    "cli.entry": "cli",
    "cli.export": "cli.serve",
    "config": "hypernet.config",
    "corpus": "data.internalize",
    "evaluation.answering": "evaluation.answers",
    "evaluation.benchmarks": "evaluation.benchmark_manifests",
    "evaluation.benchmarks.annotations": "evaluation.benchmark_manifests",
    "evaluation.benchmarks.build": "evaluation.benchmark_manifests",
    "evaluation.benchmarks.catalog": "evaluation.benchmark_manifests",
    "evaluation.benchmarks.formats": "evaluation.benchmark_manifests",
    "evaluation.benchmarks.prompts": "evaluation.benchmark_manifests",
    "evaluation.comparison": "evaluation.report",
    "evaluation.endpoint": "evaluation.judge",
    "evaluation.journal": "outputs",
    "evaluation.judging": "evaluation.evaluate",
    "evaluation.library": "evaluation.answers",
    "evaluation.metrics": "evaluation.examples",
    "evaluation.pipeline": "evaluation.evaluate",
    "evaluation.prefix": "evaluation.methods",
    "evaluation.rubrics": "evaluation.judge",
    "generation.batch": "generation.runner",
    "hub": "loading",
    "hypernet.adapter_scope": "hypernet.adapted_linear",
    "internalizing": "pipeline",
    "internalizing.batches": "pipeline",
    "internalizing.parts": "pipeline",
    "internalizing.videos": "pipeline",
    "compiling": "device",
    "demo": "cli.install",
    "doctor": "cli.install",
    "effect": "generation.answers",
    "interop.torch_file": "interop.frames2lora",
    "lengths": "pipeline",
    "options": "cli.options",
    "perceiver": "hypernet.perceiver",
    "serving.admission": "serving.jobs",
    "serving.answering": "serving.scheduler",
    "serving.app": "serving.api",
    "serving.auth": "serving.gate",
    "serving.background": "serving.internalize",
    "serving.http_errors": "serving.http",
    "serving.index": "store.folder",
    "serving.internalization": "serving.internalize",
    "serving.isolation": "serving.sandbox",
    "serving.json_body": "serving.http",
    "serving.limits": "serving.gate",
    "serving.listening": "serving.http",
    "serving.logs": "serving.monitoring",
    "serving.metrics": "serving.monitoring",
    "serving.openai_routes": "serving.chat",
    "serving.reading": "serving.sandbox",
    "serving.requests": "serving.request",
    "serving.settings": "store.adapter_store",
    "serving.slots": "serving.device_cache",
    "serving.staging": "store.folder",
    "serving.stats": "serving.engine",
    "serving.store": "store.adapter_store",
    "serving.text": "serving.request",
    "serving.upload": "serving.api",
    "serving.video_routes": "serving.api",
    "serving.vllm": "interop.peft",
    "shapes.augment": "shapes.render",
    "shapes.base": "shapes.vlm",
    "shapes.pretrain_vision": "shapes.train",
    "shapes.prompts": "shapes.vlm",
    "shapes.scene": "shapes.world",
    "shapes.scoring": "shapes.language",
    "shapes.tokenizer": "shapes.vlm",
    "shapes.train_language": "shapes.train",
    "shapes.train_vlm": "shapes.train",
    "training.batches": "training.step",
    "training.config_values": "training.config",
    "training.contexts": "pipeline",
    "training.data": "training.sources",
    "training.distillation": "training.step",
    "training.feature_cache": "data.feature_cache",
    "training.finevideo": "data.finevideo",
    "training.finevideo_manifest": "data.finevideo",
    "training.flops": "training.logging",
    "training.folder": "training.checkpoint",
    "training.length_tags": "training.sources",
    "training.loss": "training.step",
    "training.manifest": "data.manifest",
    "training.manifest_checks": "data.manifest",
    "training.meter": "training.logging",
    "training.network": "training.trainer",
    "training.packing": "training.step",
    "training.processes": "training.distributed",
    "training.progress": "training.logging",
    "training.quarantine": "training.loader",
    "training.reading": "data.readers",
    "training.sampler": "training.loader",
    "training.samples": "data.readers",
    "training.schedule": "training.step",
    "training.shards": "data.shards",
    "training.shards_ray": "data.shards",
    "training.speed": "training.logging",
    "training.stopping": "training.distributed",
    "training.teach": "data.teach",
    "training.transfer": "device",
    "training.turns": "training.step",
    "training.validation": "training.trainer",
    "video.dali_color": "video.dali",
    "video.dali_decoder": "video.dali",
    "video.dali_source": "video.dali",
    "video.decoders": "video.decoder",
    "video.limits": "video.info",
    "video.opening": "video.container",
    "video.orientation": "video.info",
    "video.pyav_source": "video.pyav",
    "video.reading": "video.reader",
    "video.sampling": "video.preprocess",
    "video.spans": "video.reader",
    "video.splitting": "video.clip",
    "video.torchcodec": "video.pyav",
    "video.torchcodec_source": "video.pyav",
    "vlm.smolvlm_prompt": "vlm.smolvlm",
}


# Present path of the module and old name -> new path.
RENAMED = {
    "VideoClip": "Clip",
    "generation.Batch": "generation.ModelRunner",
    "generation.Generated": "generation.GenerationOutput",
    "generation.Row": "generation.Request",
    "generation.Sampling": "generation.SamplingParams",
    "generation.runner.Batch": "generation.runner.ModelRunner",
    "generation.runner.Row": "generation.runner.Request",
    "hypernet.Head": "hypernet.network.Head",
    "hypernet.PreHeadBlock": "hypernet.network.PreHeadBlock",
    "hypernet.adapted_linear.AdapterSlots": "hypernet.adapter_bank.AdapterBank",
    "hypernet.adapted_linear.LayerSlots": "hypernet.adapter_bank.LayerAdapters",
    "hypernet.perceiver.PlaceEmbedding": "hypernet.perceiver.ChunkPositionEmbedding",
    "pipeline.right_padded": "pipeline.pad_right",
    "pipeline.similar_lengths": "pipeline.length_buckets",
    "video.VideoClip": "video.Clip",
    "vlm.base.EncodedVideo": "vlm.base.VideoChunk",
    "vlm.base.PromptInputs": "vlm.base.PromptBuilder",
    "vlm.decoder.Cache": "vlm.decoder.StaticKVCache",
    "vlm.decoder.LayerCache": "vlm.decoder.KVCacheLayer",
    "vlm.decoder.Span": "vlm.decoder.AttentionMetadata",
    "work_units.finish": "work_units.run_to_completion",
}


def new_path(path: str) -> str | None:
    """The new dotted path of a module of v2l_fast, None if it has not moved."""
    package, _, old = path.partition(".")
    if package != "v2l_fast":
        return None
    parts = old.split(".")
    for end in range(len(parts), 0, -1):
        if (target := MOVED.get(".".join(parts[:end]))) is not None:
            return ".".join((package, target, *parts[end:]))
    return None


def _is_package(path: str) -> bool:
    old = path.partition(".")[2]
    return any(name.startswith(f"{old}.") for name in MOVED)


class MovedModuleFinder(MetaPathFinder, Loader):
    """Finds modules by their old paths, for ``sys.meta_path``; also their loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if new_path(name) is None else ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, new_path(module.__name__)
        assert new is not None
        replacement = import_module(new)
        warn_renamed(old, new, stacklevel=3)
        vars(replacement).setdefault("__getattr__", partial(renamed, new))
        if not hasattr(replacement, "__path__") and _is_package(old):
            # A package that has become one module: its old modules are imported through it.
            module.__path__ = []
            vars(module)["__getattr__"] = partial(getattr, replacement)
        else:
            # The import system takes the module that stands here when this returns.
            sys.modules[old] = replacement


def renamed(module: str, name: str, stacklevel: int = 3) -> object:
    """What replaces a name of a module, with a warning; the module's ``__getattr__``."""
    new = RENAMED.get(f"{module}.{name}".partition(".")[2])
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warn_renamed(f"{module}.{name}", f"v2l_fast.{new}", stacklevel)
    owner, _, new_name = f"v2l_fast.{new}".rpartition(".")
    return getattr(import_module(owner), new_name)


def warn_renamed(old: str, new: str, stacklevel: int) -> None:
    """Warn that a name is deprecated."""
    warnings.warn(
        f"{old} is now {new}; the next release removes the old name",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def install() -> None:
    """Let old paths be imported. Before other finders: an old package's path is the new one's."""
    if not any(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModuleFinder())

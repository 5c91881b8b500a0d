"""Which data source a config names, and the frozen model that goes with it.

A source is one of the package's own: a config file names data, never code to run.
"""

from __future__ import annotations

from pathlib import Path

from v2l_fast.data.samples import Source
from v2l_fast.errors import ConfigError
from v2l_fast.loading import shipped
from v2l_fast.training.config import TrainConfig
from v2l_fast.vlm import Backbone

# To train on, and to validate on if there is any.
Sources = tuple[Source, Source | None]


def base_model(config: TrainConfig) -> str | Path:
    """The frozen model to load; the shapes world trains its own where none is named.

    Raises:
        ConfigError: no base is named for manifests.
    """
    if config.model.base:
        return shipped(config.model.base, "base") or config.model.base
    if config.data.source == "shapes":
        # A layer above this one, needed for this source only.
        from v2l_fast.shapes.source import prepare_base

        return prepare_base(config)
    raise ConfigError("model.base is empty; name the frozen VLM, a folder or a hub id")


def open_sources(config: TrainConfig, backbone: Backbone) -> Sources:
    """The videos of `config.data`.

    Raises:
        ConfigError: no manifest is named, or a kind of task in them has no weight.
        V2LError: the source's own errors.
    """
    if config.data.source == "shapes":
        from v2l_fast.shapes.source import shapes_sources

        return shapes_sources(config, backbone)
    if not config.data.manifests:
        raise ConfigError('data.manifests is empty; give data.manifests=["train.jsonl"]')
    from v2l_fast.training.data import manifest_sources

    loss = config.loss
    train, val = manifest_sources(config.data, backbone, config.run.seed, loss.kl_weight > 0)
    videos = [*train.videos, *(val.videos if val is not None else ())]
    kinds = {example.task_type for video in videos for example in video.examples}
    if loss.kind_weights and (without := sorted(kinds - loss.kind_weights.keys())):
        raise ConfigError(
            f"loss.kind_weights has no weight for task_type {', '.join(without)} of the manifests; "
            f"add loss.kind_weights.{without[0]}=1, or leave kind_weights out"
        )
    return train, val

"""A manifest's examples as analyses take them: lines that ask the same become one with several
references."""

from __future__ import annotations

import os
from collections.abc import Callable

from v2l_fast.analysis.examples import Example
from v2l_fast.errors import ConfigError
from v2l_fast.model import Video
from v2l_fast.video import Clip

# Decodes the part of a file between two times in seconds.
SpanReader = Callable[[str, tuple[float, float]], Clip]


def manifest_examples(
    path: str | os.PathLike,
    read_span: SpanReader | None = None,
    root: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Examples of a JSONL manifest, video by video; their kind is the subset, or the task type.

    Args:
        read_span: reads the part of a file that an example is about; whole files are only named.
        root, split: see :func:`v2l_fast.data.manifest.load_manifest`.
        limit: number of videos, from the first on.

    Raises:
        ManifestError: the manifest cannot be used.
        ConfigError: no example is left, or one is about a part of a file and ``read_span`` is None.
        VideoError: a part of a file cannot be read.
    """
    from v2l_fast.data.manifest import group_by_video, load_manifest

    found = []
    for video in group_by_video(load_manifest(path, root, split))[:limit]:
        source: Video = video.path
        if video.span is not None:
            if read_span is None:
                raise ConfigError(
                    f"{path}: {video.name} is a part of a file; name whole files here"
                )
            source = read_span(video.path, video.span)
        asked: dict[tuple[str, str], list[str]] = {}
        for line in video.examples:
            kind = str(line.metadata.get("subset", line.task_type))
            asked.setdefault((line.prompt, kind), []).append(line.target_text)
        found += [
            Example(source, prompt, tuple(dict.fromkeys(references)), kind)
            for (prompt, kind), references in asked.items()
        ]
    if not found:
        raise ConfigError(f"{path}: no example to analyze; check --split and --limit")
    return found

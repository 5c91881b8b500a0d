"""Scenes: what happens in a shapes video, how it is recorded, and which split it belongs to.

Responsible for the attributes, their deterministic sampling and the train/val/test split. Drawing
is `render`'s, wording is `language`'s.

Coordinates are fractions of the frame (x to the right, y down); times are fractions of the video.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from v2l_fast.shapes.looks import PLAIN, Look, sample_look
from v2l_fast.video import sample_indices

BACKGROUNDS = {
    "black": (12, 12, 14),
    "white": (242, 242, 240),
    "gray": (128, 130, 132),
    "brown": (96, 60, 32),
}
COLORS = {
    "red": (214, 32, 36),
    "green": (32, 160, 56),
    "blue": (36, 72, 220),
    "yellow": (244, 222, 40),
    "orange": (248, 136, 20),
    "purple": (132, 44, 176),
    "cyan": (40, 206, 216),
    "pink": (250, 140, 190),
}
SHAPES = ("disc", "ring", "bar", "pillar")
SIZES = {"small": 5.0 / 48, "large": 8.5 / 48}
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPLITS = ("train", "val", "test")

_STILL_SHARE = 0.15
_SINGLE_SHARE = 0.35
_TRAVEL = (22 / 48, 28 / 48)
_JITTER = 7 / 48
_PLACE_EDGE = 5 / 48


@dataclass(frozen=True)
class SceneObject:
    """One object: four named attributes, and the numbers that set its size and path."""

    size: str
    color: str
    shape: str
    motion: str
    radius: float
    center: tuple[float, float]
    travel: float

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        return self.size, self.color, self.shape, self.motion

    def position(self, progress: float) -> tuple[float, float]:
        """Center at `progress` (0 to 1) of the object's time on screen."""
        dx, dy = MOTIONS[self.motion]
        shift = self.travel * (progress - 0.5)
        return self.center[0] + dx * shift, self.center[1] + dy * shift

    def place(self, progress: float) -> tuple[str, str]:
        """Named place at `progress`: (top | middle | bottom, left | center | right)."""
        x, y = (value - 0.5 for value in self.position(progress))
        vertical = "top" if y < -_PLACE_EDGE else "bottom" if y > _PLACE_EDGE else "middle"
        horizontal = "left" if x < -_PLACE_EDGE else "right" if x > _PLACE_EDGE else "center"
        return vertical, horizontal


@dataclass(frozen=True)
class Scene:
    """Objects that follow one another, each on screen for an equal part of the video.

    Attributes:
        look: how it is drawn; in no caption.
    """

    background: str
    objects: tuple[SceneObject, ...]
    look: Look = PLAIN

    @property
    def combination(self) -> tuple[str, ...]:
        """The named attributes in caption order; no combination occurs in two splits."""
        return (self.background, *(name for item in self.objects for name in item.attributes))

    @property
    def split(self) -> str:
        """train (80%), val (10%) or test (10%), by a hash of the attribute combination."""
        digest = hashlib.sha256(" ".join(self.combination).encode()).digest()
        bucket = digest[0] % 10
        return "val" if bucket == 0 else "test" if bucket == 1 else "train"

    def span(self, index: int) -> tuple[float, float]:
        """Time on screen of object `index`, as fractions of the video."""
        share = 1.0 / len(self.objects)
        return index * share, (index + 1) * share

    def at(self, time: float) -> tuple[SceneObject, float]:
        """The object on screen at `time` (0 <= time < 1) and its progress then."""
        index = min(int(time * len(self.objects)), len(self.objects) - 1)
        start, end = self.span(index)
        return self.objects[index], (time - start) / (end - start)


def _sample_object(rng: random.Random) -> SceneObject:
    size = rng.choice(tuple(SIZES))
    moving = tuple(name for name in MOTIONS if name != "still")
    motion = "still" if rng.random() < _STILL_SHARE else rng.choice(moving)
    return SceneObject(
        size=size,
        color=rng.choice(tuple(COLORS)),
        shape=rng.choice(SHAPES),
        motion=motion,
        radius=SIZES[size] * rng.uniform(0.92, 1.08),
        center=(0.5 + rng.uniform(-_JITTER, _JITTER), 0.5 + rng.uniform(-_JITTER, _JITTER)),
        travel=rng.uniform(*_TRAVEL),
    )


def sample_scene(rng: random.Random) -> Scene:
    """A scene of any split: one or two objects on a plain background."""
    count = 1 if rng.random() < _SINGLE_SHARE else 2
    objects = tuple(_sample_object(rng) for _ in range(count))
    return Scene(background=rng.choice(tuple(BACKGROUNDS)), objects=objects)


def sample_scenes(split: str, count: int, seed: int) -> list[Scene]:
    """`count` scenes of one split; the same (split, seed) always gives the same sequence."""
    rng = random.Random(f"{split}/{seed}")
    return _sample_while(count, lambda: sample_scene(rng), lambda scene: scene.split == split)


def _sample_while(
    count: int, sample: Callable[[], Scene], keep: Callable[[Scene], bool]
) -> list[Scene]:
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample()
        if keep(scene):
            scenes.append(scene)
    return scenes


# The most objects of a varied scene.
MAX_OBJECTS = 3
# What the network that is trained on captions only never sees: objects of these colors and shapes,
# and objects that start or end there.
HELD_OUT_PAIRS = frozenset(
    {("red", "ring"), ("green", "pillar"), ("blue", "disc"), ("yellow", "bar")}
)
HELD_OUT_PLACE = ("bottom", "left")


def has_held_out_pair(scene: Scene) -> bool:
    """Whether an object has one of :data:`HELD_OUT_PAIRS`."""
    return any((item.color, item.shape) in HELD_OUT_PAIRS for item in scene.objects)


def has_held_out_place(scene: Scene) -> bool:
    """Whether an object starts or ends in :data:`HELD_OUT_PLACE`."""
    places = (item.place(progress) for item in scene.objects for progress in (0.0, 1.0))
    return HELD_OUT_PLACE in places


def sample_varied_scenes(
    split: str,
    count: int,
    seed: int,
    objects: tuple[int, ...] = (1, 2, 2, 3, 3),
    look: Callable[[random.Random], Look] | None = None,
    keep: Callable[[Scene], bool] = lambda scene: True,
) -> list[Scene]:
    """`count` scenes of one split with one to three objects and any look; the same arguments always
    give the same sequence.

    Args:
        objects: numbers of objects, one of which is drawn for each scene.
        look: draws the look of a scene; by default, a third is plain and the others have one of
            :func:`~v2l_fast.shapes.looks.sample_look`.
        keep: whether a scene may be drawn.
    """
    rng = random.Random(f"varied/{split}/{seed}")

    def any_look() -> Look:
        return PLAIN if rng.random() < 1 / 3 else sample_look(rng)

    def sample() -> Scene:
        parts = tuple(_sample_object(rng) for _ in range(rng.choice(objects)))
        drawn = look(rng) if look else any_look()
        return Scene(rng.choice(tuple(BACKGROUNDS)), parts, drawn)

    return _sample_while(count, sample, lambda scene: scene.split == split and keep(scene))


# --- recordings -----------------------------------------------------------------------------------

# Durations (s) and numbers of frames of the second stages of training.
SECONDS = (2.0, 64.0)
FRAMES = (2, 12)


@dataclass(frozen=True)
class Recording:
    """How a scene becomes a video file, and which of its frames a model sees.

    Attributes:
        seconds, fps: of the file.
        max_frames, exact: of :func:`v2l_fast.video.sample_indices`.
    """

    seconds: float = 8.0
    fps: float = 4.0
    max_frames: int = 8
    exact: bool = False

    @property
    def num_frames(self) -> int:
        """Frames of the file."""
        return max(2, round(self.seconds * self.fps))

    @property
    def duration(self) -> float:
        """Seconds of the file's frames."""
        return self.num_frames / self.fps

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """The sampled frames."""
        sampled = sample_indices(
            self.num_frames, self.fps, self.duration, self.max_frames, exact_frames=self.exact
        )
        return tuple(int(i) for i in sampled)

    @property
    def times(self) -> tuple[float, ...]:
        """The sampled frames' times, as fractions of the video."""
        return tuple(i / self.num_frames for i in self.indices)

    @property
    def timestamps(self) -> tuple[float, ...]:
        """The sampled frames' times in seconds."""
        return tuple(i / self.fps for i in self.indices)


def sample_recordings(split: str, count: int, seed: int) -> list[Recording]:
    """`count` recordings: a duration, uniform in its logarithm, a frame rate, and frames: for two
    thirds one per second and at most eight, for the others a random number."""
    rng = random.Random(f"recordings/{split}/{seed}")
    low, high = SECONDS
    recordings = []
    for _ in range(count):
        seconds = math.exp(rng.uniform(math.log(low), math.log(high)))
        fps = rng.choice((4.0, 5.0, 8.0, 10.0))
        if rng.random() < 2 / 3:
            recordings.append(Recording(seconds, fps))
        else:
            recordings.append(Recording(seconds, fps, rng.randint(*FRAMES), exact=True))
    return recordings


def sample_varied_recordings(scenes: Sequence[Scene], split: str, seed: int) -> list[Recording]:
    """A recording of each scene, as :func:`sample_recordings`; three objects are shown in at least
    six frames, if the file has as many."""
    rng = random.Random(f"varied recordings/{split}/{seed}")
    recordings = sample_recordings(split, len(scenes), seed)
    return [
        recording
        if len(scene.objects) < 3 or len(recording.indices) >= 6
        else replace(recording, max_frames=rng.randint(6, FRAMES[1]), exact=True)
        for scene, recording in zip(scenes, recordings, strict=True)
    ]

"""What decides which adapter a video becomes, besides its bytes; recognized in a stored adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from v2l_fast.errors import V2LError
from v2l_fast.video import sample_indices

if TYPE_CHECKING:
    from v2l_fast.model import Video2LoRA


@dataclass(frozen=True)
class InternalizeSettings:
    """How a video is internalized, and by which hypernetwork.

    Attributes:
        hypernetwork: fingerprint.
        version: of the backbone's preprocessing.
        instruction: the text that follows the video in the context pass.
        longest_edge: pixels.
        max_frames, target_fps, exact_frames: see ``v2l_fast.video.sample_indices``.
    """

    hypernetwork: str
    version: str
    instruction: str
    longest_edge: int
    max_frames: int
    target_fps: float
    exact_frames: bool

    @classmethod
    def of(
        cls,
        model: Video2LoRA,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
    ) -> InternalizeSettings:
        """The settings of ``model.internalize`` with these arguments; as in training if None."""
        config = model.config
        sampling = config.sampling.override(max_frames, longest_edge)
        return cls(
            model.hypernet.fingerprint,
            model.backbone.preprocessing,
            config.instruction,
            sampling.longest_edge,
            sampling.max_frames,
            sampling.target_fps,
            exact_frames,
        )

    def made(self, provenance: Mapping[str, Any]) -> bool:
        """Whether an adapter of this provenance is what its video becomes with these settings.

        Frames are compared, not their limit: a short clip gives the same ones for many limits.
        """
        expected = {
            "version": self.version,
            "longest_edge": self.longest_edge,
            "exact_frames": self.exact_frames,
            "instruction": self.instruction,
        }
        if provenance.get("hypernetwork") != self.hypernetwork:
            return False
        if provenance.get("preprocessing") != expected:
            return False
        try:
            source = provenance["source"]
            indices = sample_indices(
                source["num_frames"],
                source["fps"],
                source["duration"],
                self.max_frames,
                self.target_fps,
                exact_frames=self.exact_frames,
            )
            return indices.tolist() == source["frame_indices"]
        except (LookupError, TypeError, ValueError, ArithmeticError, V2LError):
            return False

"""Frames through torchcodec, on request; PyAV still opens, counts and describes.

The pixels equal those of PyAV's reader, whose checks the file has passed. Files whose times do not
locate their frames are read by PyAV (see `fallbacks`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from v2l_fast.errors import VideoError
from v2l_fast.video.info import fallbacks
from v2l_fast.video.pyav import Decoded, PyAVSource

if TYPE_CHECKING:
    from torchcodec.decoders import VideoDecoder

# Frames per call; the deadline is checked between calls.
_CHUNK = 16


class TorchcodecSource(PyAVSource):
    """A PyAVSource whose pixels come from torchcodec."""

    def read(
        self,
        indices: np.ndarray,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Decoded:
        """As PyAVSource.read; also raises VideoError when torchcodec cannot be imported."""
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, OSError, RuntimeError) as error:
            raise VideoError(
                f"{self.path}: backend 'torchcodec' cannot be imported "
                f"({str(error).splitlines()[0]}); install torchcodec with FFmpeg or use 'pyav'"
            ) from error
        self.check_count(len(indices))
        # torchcodec locates frames by time alone.
        if self._timeline is None or not self.packets.plain:
            fallbacks.add(self.path, "packet times do not locate its frames")
            return super().read(indices, transform)
        try:
            decoder = VideoDecoder(self.path, dimension_order="NHWC", seek_mode="exact")
            inside = indices[indices < len(decoder)]
            frames: list[torch.Tensor] = []
            for start in range(0, len(inside), _CHUNK):
                self.deadline.check()
                batch = decoder.get_frames_at(inside[start : start + _CHUNK].tolist())
                for image in batch.data:
                    image = self._turn_upright(image, decoder)
                    frames.append(image if transform is None else transform(image))
                    self.check_memory(len(indices), frames[0].shape)
        except VideoError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise VideoError(
                f"{self.path}: torchcodec cannot decode it ({str(error).splitlines()[0]}); "
                "use backend 'pyav'"
            ) from error
        available = None if len(inside) == len(indices) else len(decoder)
        if available == 0:
            raise self.nothing_decodes()
        stacked = torch.stack(frames) if frames else torch.empty(0, 0, 0, 3, dtype=torch.uint8)
        return Decoded(stacked, tuple(self.packets.seconds[inside].tolist()), available)

    def _turn_upright(self, image: torch.Tensor, decoder: VideoDecoder) -> torch.Tensor:
        """Since 0.11 torchcodec rotates frames (and reports a rotation); it never mirrors them."""
        orientation = self.orientation
        if not hasattr(decoder.metadata, "rotation"):
            return torch.from_numpy(np.ascontiguousarray(orientation.apply(image.numpy())))
        if orientation.mirrored:
            raise VideoError(
                f"{self.path}: mirrored by its display matrix, which torchcodec does not apply; "
                "use backend 'pyav'"
            )
        return image

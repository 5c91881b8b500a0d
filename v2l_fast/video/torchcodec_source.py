"""Frames through torchcodec, where it is installed and asked for; PyAV still opens and counts.

Same pixels as PyAV's reader; the file has passed that reader's checks before it comes here. Files
whose times do not locate their frames are read by PyAV (see `fallbacks`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from v2l_fast.errors import VideoError
from v2l_fast.video.fallbacks import fallbacks
from v2l_fast.video.pyav_source import Decoded, PyAVSource

# Frames per call: between calls the deadline is looked at.
_CHUNK = 16


class TorchcodecSource(PyAVSource):
    """PyAVSource whose pixels come from torchcodec."""

    def read(
        self,
        indices: np.ndarray,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Decoded:
        """As PyAVSource.read; raises VideoError too when torchcodec cannot be imported."""
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, OSError, RuntimeError) as error:
            raise VideoError(
                f"{self.path}: backend 'torchcodec' cannot be imported "
                f"({str(error).splitlines()[0]}); install torchcodec with FFmpeg or use 'pyav'"
            ) from error
        self.check_count(len(indices))
        # torchcodec finds frames by time alone.
        if self._timeline is None or not self._packets.plain:
            fallbacks.add(self.path, "frames are not found by packet times")
            return super().read(indices, transform)
        try:
            decoder = VideoDecoder(self.path, dimension_order="NHWC", seek_mode="exact")
            inside = indices[indices < len(decoder)]
            frames: list[torch.Tensor] = []
            for start in range(0, len(inside), _CHUNK):
                self.deadline.check()
                batch = decoder.get_frames_at(inside[start : start + _CHUNK].tolist())
                for image in batch.data:
                    image = self._turned(image, decoder)
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
        return Decoded(stacked, tuple(self._packets.seconds[inside].tolist()), available)

    def _turned(self, image: torch.Tensor, decoder) -> torch.Tensor:
        """torchcodec rotates by itself since 0.11 (it then reports a rotation), never mirrors."""
        orientation = self.orientation
        if not hasattr(decoder.metadata, "rotation"):
            return torch.from_numpy(np.ascontiguousarray(orientation.apply(image.numpy())))
        if orientation.mirrored:
            raise VideoError(
                f"{self.path}: mirrored by its display matrix, which torchcodec does not apply; "
                "use backend 'pyav'"
            )
        return image

"""What benchmarks measure: models of random weights at released shapes, their prompts, and videos.

Prompts need no tokenizer: they are random ids around the image tokens, in the proportions of the
real prompt.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from v2l_fast.hypernet.adapter import AdapterBatch
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.pipeline import ContextBatch, iter_factors
from v2l_fast.video.preprocess import frame_views
from v2l_fast.vlm.smolvlm import SmolVLM
from v2l_fast.work_units import run_to_completion

FRAMES, QUESTION_TOKENS = 12, 24
# Text of a prompt: before the video, before each frame, and the instruction.
INTRODUCTION_TOKENS, FRAME_TOKENS, INSTRUCTION_TOKENS = 30, 12, 16
CODECS = {"vp9": "libvpx-vp9", "h264": "libx264"}
FPS = 24


@dataclass(frozen=True)
class Shape:
    """Sizes of a VLM.

    Attributes:
        text, vision: entries of the models' configurations.
        shuffle: factor by which pixel shuffle reduces each side of the grid of patches.
        longest_edge: of the frames, in pixels.
    """

    name: str
    text: dict[str, int]
    vision: dict[str, int]
    shuffle: int
    longest_edge: int = 384
    vocabulary: int = 49280


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "500M",
            {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
             "num_attention_heads": 15, "num_key_value_heads": 5},
            {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12, "image_size": 512, "patch_size": 16},
            4,
        ),
        Shape(
            "2.2B",
            {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
             "num_attention_heads": 32, "num_key_value_heads": 32},
            {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
             "num_attention_heads": 16, "image_size": 384, "patch_size": 14},
            3,
        ),
        Shape(
            "shapes",
            {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24},
            {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
             "num_attention_heads": 4, "image_size": 48, "patch_size": 8},
            3, 48, 140,
        ),
        Shape(
            "tiny",
            {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1},
            {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
            2, 32, 200,
        ),
    )
}  # fmt: skip


def random_backbone(shape: Shape, device: str, dtype: torch.dtype) -> SmolVLM:
    """A frozen VLM without a text tokenizer; the image token is the last one of the vocabulary."""
    config = SmolVLMConfig(
        image_token_id=shape.vocabulary - 1,
        scale_factor=shape.shuffle,
        pad_token_id=0,
        text_config={
            "model_type": "llama", "vocab_size": shape.vocabulary, "head_dim": 64,
            "rope_theta": 100000.0, "max_position_embeddings": 8192, "pad_token_id": 0,
            **shape.text,
        },
        vision_config=dict(shape.vision),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device(device):
            model = SmolVLMForConditionalGeneration(config).to(dtype)
    return SmolVLM(model, SimpleNamespace(eos_token_id=0, pad_token_id=0), f"random {shape.name}")


def random_hypernet(shape: Shape, scale: float = 1.0, **sizes: int) -> HyperNetwork:
    """A float32 hypernetwork on the CPU whose adapters have an effect: fresh scalers of B are 0.

    Args:
        scale: standard deviation of the scalers of B.
        sizes: entries of the hypernetwork's configuration.
    """
    width, inner = shape.text["hidden_size"], shape.text["intermediate_size"]
    layers = shape.text["num_hidden_layers"]
    sizes = {"longest_edge": shape.longest_edge, **sizes}
    config = HypernetConfig(width, layers, {"down_proj": (inner, width)}, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = HyperNetwork(config)
        with torch.no_grad():
            network.scaler_B["down_proj"].normal_(std=scale)
            network.bias_B["down_proj"].normal_(std=0.1 * scale)
    return network


def random_ids(backbone: SmolVLM, count: int, generator: torch.Generator) -> Tensor:
    """Text, int64 [count] on the CPU."""
    return torch.randint(3, backbone.image_token_id, (count,), generator=generator)


def random_context(
    backbone: SmolVLM, frames: int, generator: torch.Generator, end: int = INSTRUCTION_TOKENS
) -> Tensor:
    """Ids of a prompt about untiled frames that ends in ``end`` tokens of text; on the CPU."""
    image = torch.full((backbone.tokens_per_view,), backbone.image_token_id)
    parts = [random_ids(backbone, INTRODUCTION_TOKENS, generator)]
    for _ in range(frames):
        parts += [random_ids(backbone, FRAME_TOKENS, generator), image]
    return torch.cat([*parts, random_ids(backbone, end, generator)])


class RandomPair:
    """A VLM and its hypernetwork of random weights, with frames and the prompt about them.

    Attributes:
        frames: uint8 [FRAMES, 3, H, W] on the CPU.
        context: ids of the context prompt, on the device.
    """

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.device, self.edge = device, shape.longest_edge
        self.backbone = random_backbone(shape, device, dtype)
        self.network = random_hypernet(shape).for_inference(device, dtype).eval()
        generator = torch.Generator().manual_seed(0)
        size = (FRAMES, 3, self.edge * 3 // 4, self.edge)
        self.frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        self.context = random_context(self.backbone, FRAMES, generator).to(device)

    def compile(self) -> None:
        """Compile both models."""
        self.backbone.compile()
        self.network.compile_layers()

    def encode(self, frames: Tensor | None = None) -> Tensor:
        """Vision features [V, t, D] of uint8 frames, by default ``self.frames``."""
        frames = self.frames if frames is None else frames
        views = frame_views(frames, self.edge, self.backbone.tile_size).views
        return self.backbone.encode_views(views)

    def layer_inputs(self, features: Tensor, ids: Tensor | None = None):
        """The hidden states [1, S, D] that enter each layer of the decoder."""
        embeddings = self.backbone.embed(self.context if ids is None else ids, [features])
        return self.backbone.decoder.layer_inputs(embeddings[None])

    def adapters(self, features: Tensor, ids: Tensor | None = None) -> AdapterBatch:
        """The adapter of the features, through the library's own pipeline."""
        embeddings = self.backbone.embed(self.context if ids is None else ids, [features])
        whole_video = torch.tensor([[0.0, 1.0]], device=embeddings.device)
        context = ContextBatch([0], embeddings[None], None, whole_video)
        factors = run_to_completion(iter_factors(self.backbone, self.network, context))
        return self.network.assemble(factors)


def write_clip(path: Path, codec: str, frames: int, height: int) -> Path:
    """Write a 16:9 clip of ``FPS`` frames a second: a drifting gradient with a moving bar."""
    import av

    fast = {
        "vp9": {"cpu-used": "8", "deadline": "realtime", "g": "48"},
        "h264": {"preset": "ultrafast", "g": "48"},
    }
    width = height * 16 // 9 // 2 * 2
    across = np.linspace(0, 2 * np.pi, width)
    image = np.empty((height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[codec], rate=FPS, options=fast[codec])
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            image[..., 0], image[..., 1] = 128 + 90 * np.sin(across + i / 40), 100
            image[..., 2] = 128 + 90 * np.cos(across)
            left = i * 3 % (width - 16)
            image[:, left : left + 16] = 230
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_pattern(path: Path, seconds: float, height: int, bit_rate: int) -> Path:
    """Write a 16:9 H.264 clip of 30 frames a second, with keyframes at cuts or every 250 frames.

    FFmpeg's moving test pattern with noise, which costs a decoder about what a real video of the
    same bit rate (bits/s) does.
    """
    import av

    width = height * 16 // 9 // 2 * 2
    graph = av.filter.Graph()
    filters = [
        graph.add("testsrc2", f"size={width}x{height}:rate=30:duration={seconds}"),
        graph.add("noise", "alls=6:allf=t:all_seed=1"),
        graph.add("format", "yuv420p"),
        graph.add("buffersink"),
    ]
    for one, following in itertools.pairwise(filters):
        one.link_to(following)
    graph.configure()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "fast", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = bit_rate
        for number in range(round(seconds * 30)):
            frame = filters[-1].pull()
            assert isinstance(frame, av.VideoFrame)
            # The source marks every frame as a keyframe.
            frame.pict_type = av.video.frame.PictureType.NONE
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path

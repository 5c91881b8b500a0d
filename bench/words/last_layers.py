"""The hypernetwork of a decoder's last layers, trained by the library's trainer at their cost.

The layers before them are frozen and see no adapter, so what they make of a context or a question
is computed once: to the trainer, the last layers are a model whose embeddings are those states.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bench.words.base import Words, clip_frames
from v2l_fast.data.readers import Sample
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.pipeline import Context
from v2l_fast.shapes.language import (
    ask,
    ask_several,
)
from v2l_fast.shapes.vlm import (
    pixel_values,
    visual_tokens,
)
from v2l_fast.shapes.world import (
    Scene,
)
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.vlm.smolvlm import SmolVLM

# --- the hypernetwork of the last layers ----------------------------------------------------------


class LastDecoder(Decoder):
    """The last layers of a decoder, whose token embeddings are the states that leave the others.

    Those are frozen and have no adapters, so the states of a row of tokens are computed once.
    """

    def __init__(self, whole: Decoder, count: int, pad_id: int) -> None:
        super().__init__(whole.text_model, whole.lm_head)
        self.whole, self.pad_id = whole, pad_id
        self.first, self.num_layers = whole.num_layers - count, count
        self._states: dict[Hashable, Tensor] = {}

    @property
    def layers(self) -> Sequence[LlamaDecoderLayer]:
        return self.whole.layers[self.first :]

    @torch.no_grad()
    def run_first(self, embeddings: Tensor) -> Tensor:
        """The frozen layers: [E, T, D] -> [E, T, D]."""
        metadata = self.whole.prefill_metadata(*embeddings.shape[:2])
        for index in range(self.first):
            embeddings = self.whole.layer(index, embeddings, metadata)
        return embeddings

    def embed(self, ids: Tensor) -> Tensor:
        """States [n, T, D] of right-padded rows of token ids [n, T]."""
        rows = [tuple(row) for row in ids.tolist()]
        rows = [row[: max((i + 1 for i, t in enumerate(row) if t != self.pad_id), default=1)]
                for row in rows]  # fmt: skip

        def compute(missing: list[int]) -> Tensor:
            longest = max(len(rows[i]) for i in missing)
            return self.run_first(self.whole.embed(ids[missing, :longest]))

        states = self.remembered(rows, [len(row) for row in rows], compute)
        return pad_sequence([*states, states[0].new_zeros(ids.shape[1], states[0].shape[1])],
                            batch_first=True)[:-1]  # fmt: skip

    def remembered(
        self,
        keys: Sequence[Hashable],
        lengths: Sequence[int],
        compute: Callable[[list[int]], Tensor],
    ) -> list[Tensor]:
        """The states [T, D] of each key; `compute` gives those of the missing ones' indices."""
        missing = {key: i for i, key in enumerate(keys) if key not in self._states}
        if missing:
            computed = compute(list(missing.values()))
            for (key, i), states in zip(missing.items(), computed, strict=True):
                self._states[key] = states[: lengths[i]].clone()
        return [self._states[key] for key in keys]


class LastLayers(SmolVLM):
    """A VLM seen as its last layers, for the trainer: contexts and questions enter them as the
    states that leave the frozen layers before (see :class:`LastDecoder`)."""

    def __init__(self, whole: SmolVLM, count: int) -> None:
        super().__init__(whole.model, whole.tokenizer, whole.name_or_path)
        self.whole = whole
        self.decoder = self.last = LastDecoder(whole.decoder, count, whole.tokenizer.pad_token_id)

    @torch.no_grad()
    def embed(self, ids: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
        if not features:
            return self.last.embed(ids)
        keys = [f.float().numpy().tobytes() for f in features]

        def compute(missing: list[int]) -> Tensor:
            return self.last.run_first(
                self.whole.embed(ids[missing], [features[i] for i in missing])
            )

        return torch.stack(self.last.remembered(keys, [ids.shape[1]] * len(keys), compute))


@dataclass(frozen=True)
class WordsSource:
    """Clips with their connector outputs, as the trainer reads them.

    Attributes:
        scenes, features: the videos; bf16 [videos, F, T, D].
        words: token ids of prompts.
        instruction: of the context pass.
        questions: of a sample, besides one caption.
        seed: with the step and the video's index, determines every choice.
    """

    scenes: Sequence[Scene]
    features: Tensor
    words: Words
    instruction: str
    questions: int
    seed: int

    def __len__(self) -> int:
        return len(self.scenes)

    def load(self, index: int, step: int) -> Sample:
        """A caption of a scene, always after the same prompt, and questions drawn anew."""
        scene, words = self.scenes[index], self.words
        rng = random.Random(f"{self.seed}/{step}/{index}")
        caption = ask(scene, "caption", random.Random(f"{self.seed}/{index}"))
        pairs = [caption, *ask_several(scene, self.questions, rng)]
        ids = torch.tensor(words.context(self.instruction))
        return Sample(
            video=f"scene {index}",
            chunks=(Context(ids=ids, features=self.features[index]),),
            prompt_prefix=words.text_prefix,
            qa_pairs=tuple(words.alone(pair) for pair in pairs),
            task_types=tuple("caption" if p.kind == "caption" else "question" for p in pairs),
            frames=self.features.shape[1],
        )


@torch.no_grad()
def connector_outputs(backbone: SmolVLM, scenes: Sequence[Scene], seed: int | None) -> Tensor:
    """[videos, F, T, D] in the decoder's dtype; frames are augmented unless `seed` is None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(scenes), 64):
        frames = clip_frames(scenes[start : start + 64], generator)
        pixels = pixel_values(frames.flatten(0, 1)).to(backbone.decoder.dtype)
        parts.append(visual_tokens(backbone.model, pixels).unflatten(0, frames.shape[:2]))
    return torch.cat(parts)


def for_all_layers(last: HyperNetwork, layers: int) -> HyperNetwork:
    """The network of the last layers as one of all `layers`, whose adapters are 0 in the others."""
    before = layers - last.config.num_layers
    network = HyperNetwork(replace(last.config, num_layers=layers))
    state = {}
    for name, value in last.state_dict().items():
        axis = 1 if name.startswith("scaler_") else 0
        per_layer = name.startswith(("scaler_", "bias_", "head."))
        if per_layer:
            shape = list(value.shape)
            shape[axis] = before
            value = torch.cat([value.new_zeros(shape), value], axis)
        state[name] = value
    network.load_state_dict(state)
    return network

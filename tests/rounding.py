"""What "the same answer" means in half precision, as a check of two greedy answers.

Two passes that add in another order (alone or in a batch, another reach of the attention, a graph)
compute logits that differ by rounding. So two answers are equal, or they first differ at a token
where both choices are equally likely up to the error that the dtype itself makes there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.vlm.decoder import Decoder
from v2l_fast.vlm.smolvlm import SmolVLM


class RoundingCheck:
    """Compares answers of a model in half precision with its own weights in float32, on the CPU.

    Args:
        backbone: in float32; its weights are rounded to ``dtype`` first.
    """

    def __init__(self, backbone: SmolVLM, dtype: torch.dtype = torch.bfloat16) -> None:
        model = copy.deepcopy(backbone.model).to(dtype)
        self.backbone = SmolVLM(model, backbone.tokenizer, backbone.name_or_path)
        self.dtype = dtype
        exact = copy.deepcopy(model).float()
        self._exact = Decoder(exact.model.text_model, exact.lm_head)

    @torch.no_grad()
    def margins(
        self, prompt: Sequence[int], adapter: Adapter | None, answer: Sequence[int]
    ) -> tuple[torch.Tensor, float]:
        """Float32 logits [T, V] of each token of an answer, and the largest error of the dtype's
        logits."""
        ids = torch.tensor([*prompt, *answer])[None]
        logits = []
        bank = AdapterBank.pack([adapter], "cpu", self.dtype)
        for decoder in (self.backbone.decoder, self._exact):
            if bank is not None and decoder is self._exact:
                # The factors that the model in half precision has.
                bank = AdapterBank(
                    {name: factor.float() for name, factor in bank.A.items()},
                    {name: factor.float() for name, factor in bank.B.items()},
                    bank.index, bank.scale, bank.ranks,
                )  # fmt: skip
            hidden = decoder.forward(decoder.embed(ids), adapters=bank)
            logits.append(decoder.logits(hidden)[0, len(prompt) - 1 :])
        rounded, exact = logits
        return exact, (rounded - exact).abs().max().item()

    def same(
        self,
        prompt: Sequence[int],
        adapter: Adapter | None,
        answer: Sequence[int],
        other: Sequence[int],
    ) -> bool:
        """Whether two answers are equal; fails where rounding does not explain a difference."""
        pairs = zip(answer, other, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if position is None:
            assert len(answer) == len(other)
            return True
        exact, error = self.margins(prompt, adapter, answer[: position + 1])
        first, second = (exact[position, tokens[position]] for tokens in (answer, other))
        # Each pass is off by up to ``error`` at either token.
        difference = abs((first - second).item())
        assert difference <= 2 * error, f"token {position}: {difference} apart, error {error}"
        return False

"""Give each example of a batch its own adapter in a plain transformers decoder.

python examples/adapters_in_any_decoder.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from v2l_fast import Adapter, adapted_linear

LAYERS, RANK, HIDDEN, INTERMEDIATE = 2, 4, 32, 64


def random_adapter(seed: int) -> Adapter:
    """Factors A [layers, rank, d_in] and B [layers, rank, d_out] of every ``down_proj``."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(LAYERS, RANK, INTERMEDIATE, generator=generator)
    b = torch.randn(LAYERS, RANK, HIDDEN, generator=generator)
    return Adapter({"down_proj": a}, {"down_proj": b}, scale=0.5, bias=None)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    handle = adapted_linear(LlamaForCausalLM(config).eval(), "mlp.down_proj")
    ids = torch.randint(3, 64, (3, 5))
    with handle.use([random_adapter(1), random_adapter(2), None]) as decoder:
        print(decoder.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))


if __name__ == "__main__":
    main()

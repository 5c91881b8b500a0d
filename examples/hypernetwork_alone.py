"""Use the hypernetwork and the ops without a VLM: hidden states in, adapted linear layer out.

python examples/hypernetwork_alone.py
"""

import torch

from csrc_triton import lora_linear
from v2l_fast import HypernetConfig, HyperNetwork

VIDEOS, LAYERS, TOKENS, HIDDEN, INTERMEDIATE = 2, 3, 20, 32, 64


def main() -> None:
    torch.manual_seed(0)
    config = HypernetConfig(
        hidden_size=HIDDEN, num_layers=LAYERS, latent_size=16, num_latents=4, num_blocks=1, rank=4,
        target_modules={"down_proj": (INTERMEDIATE, HIDDEN)},
    )  # fmt: skip
    features = torch.randn(VIDEOS, LAYERS, TOKENS, HIDDEN)
    mask = torch.ones(VIDEOS, TOKENS, dtype=torch.bool)
    batch = HyperNetwork(config).eval()(features, mask)
    print("generated:", tuple(batch.A["down_proj"].shape), tuple(batch.B["down_proj"].shape))

    # Layer 0 of both videos on three examples; the last example has no adapter (-1).
    x, weight = torch.randn(3, 5, INTERMEDIATE), torch.randn(HIDDEN, INTERMEDIATE)
    a, b = batch.A["down_proj"][:, 0], batch.B["down_proj"][:, 0]
    index = torch.tensor([0, 1, -1])
    y = lora_linear(x, weight, None, a, b, index, scale=config.scale)
    print("adapted:", tuple(y.shape))


if __name__ == "__main__":
    main()

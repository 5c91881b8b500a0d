"""API keys: who may use the server. :class:`v2l_fast.serving.gate.Gate` asks for them."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

from fastapi.security import HTTPBearer

from v2l_fast.errors import ConfigError
from v2l_fast.files import read_text

# Says in the OpenAPI document where the key goes; refusing is not its work.
documented = HTTPBearer(auto_error=False, description="The server's API key, when it has one.")


class Keys:
    """The keys that are accepted; none at all means that everybody may."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def read(cls, key: str | None, file: Path | None) -> Keys:
        """A key given directly, and those of a file, one a line.

        Raises:
            ConfigError: the file cannot be read or holds none.
        """
        keys = [] if key is None else [key]
        if file is not None:
            text = read_text(file, 2**20, ConfigError, missing="write the keys to it, one a line")
            lines = [line.strip() for line in text.splitlines()]
            keys += [line for line in lines if line and not line.startswith("#")]
            if not keys:
                raise ConfigError(f"{file}: holds no key; write one a line")
        if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ConfigError("an API key has spaces or other than ASCII characters in it")
        return cls(keys)

    @property
    def required(self) -> bool:
        return bool(self._keys)

    def accept(self, authorization: str | None) -> bool:
        """Whether an ``Authorization`` header (as latin-1) has one of the keys, if there are any.

        Every key is compared, in the same time whatever they share.
        """
        if not self._keys:
            return True
        scheme, _, offered = (authorization or "").partition(" ")
        matches = [hmac.compare_digest(offered.encode("latin-1"), key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)

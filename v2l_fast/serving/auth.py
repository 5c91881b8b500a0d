"""API keys: who may use the server."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from v2l_fast.errors import ConfigError
from v2l_fast.serving.http_errors import ApiError

_bearer = HTTPBearer(auto_error=False, description="The server's API key, when it has one.")


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
            try:
                lines = [line.strip() for line in file.read_text().splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{file}: the keys cannot be read ({error})") from None
            keys += [line for line in lines if line and not line.startswith("#")]
            if not keys:
                raise ConfigError(f"{file}: holds no key; write one a line")
        if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ConfigError("an API key has spaces or other than ASCII characters in it")
        return cls(keys)

    @property
    def required(self) -> bool:
        return bool(self._keys)

    def accept(self, given: str) -> bool:
        """Compare with every key in the same time, whatever they share."""
        offered = given.encode("utf-8", "surrogateescape")
        return any([hmac.compare_digest(offered, key) for key in self._keys])


async def authorized(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> None:
    """Dependency of every route that needs a key; 401 without."""
    keys: Keys = request.app.state.server.keys
    if keys.required and (credentials is None or not keys.accept(credentials.credentials)):
        raise ApiError(
            401, "the API key is missing or wrong (Authorization: Bearer KEY)", "invalid_api_key"
        )

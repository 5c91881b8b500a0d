"""Replicas: running vLLM or SGLang servers that answer from exported adapters.

An adapter can be loaded into a replica, verified there, and removed from it. A replica that ignores
an adapter, or serves another one under its name, responds without an error; :func:`verify` detects
this by comparing log probabilities.
"""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.hypernet.adapter_bank import AdapterBank

if TYPE_CHECKING:
    from v2l_fast.hypernet.adapter import Adapter
    from v2l_fast.model import Video2LoRA

PROBE = "What happens in the video?"
# Tokens of the answer that are compared.
PROBE_TOKENS = 16
# Largest difference of a token's log probability that rounding explains: servers compute in
# bfloat16, in another order.
BOUND = 0.25
# Seconds in which a replica responds to the deletion of an adapter.
UNLOAD_SECONDS = 5.0
# Parts of the errors about an adapter that a server does not have.
_NOT_LOADED = ("not loaded", "not found", "cannot be found", "does not exist", "no lora")


class ReplicaError(V2LError):
    """A replica does not respond, refuses a request, or uses another adapter or base."""


class Replica:
    """A client of one replica.

    Args:
        url: ``http://host:port``, without ``/v1``.
        key: sent as a bearer token.
        timeout: seconds for one request.

    Raises:
        ConfigError: the httpx package is missing, or the URL is not one of http or https.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 120.0) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise ConfigError(
                'replicas need the httpx package: pip install "v2l_fast[serve]"'
            ) from None
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"a replica's URL must begin with http:// or https://, got {url!r}")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
        self._models: list[dict[str, Any]] | None = None

    def with_timeout(self, seconds: float) -> Replica:
        """The same replica with another time limit for each request."""
        key = self._client.headers.get("Authorization", "").removeprefix("Bearer ") or None
        return Replica(self.url, key, seconds)

    # --- what it serves -----------------------------------------------------------------------

    @property
    def kind(self) -> Literal["vllm", "sglang"]:
        """The kind of server, by the owner of its models; vLLM if this is neither."""
        owners = {str(model.get("owned_by")) for model in self._listed()}
        return "sglang" if "sglang" in owners else "vllm"

    @property
    def base(self) -> str:
        """The name of the base model.

        Raises:
            ReplicaError: the replica lists no base model.
        """
        for model in self._listed():
            if model.get("parent") is None:
                return str(model["id"])
        raise ReplicaError(f"{self.url}: lists no base model at /v1/models")

    def model_name(self, adapter: str) -> str:
        """The value of ``model`` in requests for an adapter."""
        return f"{self.base}:{adapter}" if self.kind == "sglang" else adapter

    def _listed(self) -> list[dict[str, Any]]:
        if self._models is None:
            data = self._request("GET", "/v1/models").get("data")
            if not isinstance(data, list) or not all(isinstance(m, dict) for m in data):
                raise ReplicaError(f"{self.url}: /v1/models is not a list of models")
            self._models = data
        return self._models

    # --- adapters -----------------------------------------------------------------------------

    def load_folder(self, name: str, folder: str | os.PathLike) -> None:
        """Load a PEFT directory, by the path under which the replica sees it.

        Raises:
            ReplicaError: the replica refuses.
        """
        path = "/load_lora_adapter" if self.kind == "sglang" else "/v1/load_lora_adapter"
        self._update(path, {"lora_name": name, "lora_path": os.fspath(folder)})

    def load_tensors(
        self, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        """Load an adapter from memory, into SGLang.

        Args:
            tensors, config: as :func:`~v2l_fast.interop.peft.peft_tensors` returns them.

        Raises:
            ReplicaError: the replica refuses, or is a vLLM server, which loads directories only.
        """
        if self.kind != "sglang":
            raise ReplicaError(
                f"{self.url}: vLLM loads adapters from directories; name one that the replica "
                "sees with --folder"
            )
        # SGLang reads pickles. Tensors are pickled by value: it may be on another machine.
        content = base64.b64encode(pickle.dumps({k: t.cpu() for k, t in tensors.items()})).decode()
        record = {"lora_name": name, "config_dict": config}
        path = "/load_lora_adapter_from_tensors"
        try:
            # One copy for each tensor-parallel rank, in SGLang 0.5.18 and later.
            self._update(path, record | {"serialized_named_tensors": [content]})
        except ReplicaError:
            self._update(path, record | {"serialized_tensors": content})

    def unload(self, name: str) -> bool:
        """Remove an adapter; False if the replica does not have it.

        Raises:
            ReplicaError: the replica does not respond, or refuses.
        """
        path = "/unload_lora_adapter" if self.kind == "sglang" else "/v1/unload_lora_adapter"
        try:
            self._update(path, {"lora_name": name})
        except ReplicaError as error:
            if any(words in str(error).lower() for words in _NOT_LOADED):
                return False
            raise
        return True

    def _update(self, path: str, body: dict[str, Any]) -> None:
        reply = self._request("POST", path, body)
        if reply.get("success") is False:
            raise ReplicaError(f"{self.url}: {reply.get('error_message') or 'refused'}")

    # --- probabilities ------------------------------------------------------------------------

    def logprobs(self, model: str, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """Natural-log probabilities of the tokens of ``completion`` after ``prompt``.

        Raises:
            ReplicaError: the replica does not respond, refuses, or does not report them.
        """
        body = {
            "model": model, "prompt": [*prompt, *completion], "max_tokens": 1, "temperature": 0,
            "echo": True, "logprobs": 1,
        }  # fmt: skip
        reply = self._request("POST", "/v1/completions", body)
        try:
            values = reply["choices"][0]["logprobs"]["token_logprobs"]
            return [float(v) for v in values[len(prompt) : len(prompt) + len(completion)]]
        except (LookupError, TypeError, ValueError):
            raise ReplicaError(
                f"{self.url}: does not report log probabilities of a prompt (echo with logprobs)"
            ) from None

    def _request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        import httpx

        try:
            response = self._client.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ReplicaError(f"{self.url}: does not respond ({reason})") from None
        try:
            reply = response.json()
        except ValueError:
            # vLLM confirms updates in plain text.
            reply = {}
        if response.is_success:
            return reply if isinstance(reply, dict) else {}
        if response.status_code == 404 and isinstance(reply, dict) and "detail" in reply:
            raise ReplicaError(
                f"{self.url}: has no {path}; start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True "
                "and --enable-lora, SGLang with --enable-lora"
            )
        raise ReplicaError(f"{self.url}: status {response.status_code}, {_reason(reply)[:300]}")


def _reason(reply: Any) -> str:
    if not isinstance(reply, dict):
        return "no reason"
    error = reply.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    return str(error or reply.get("error_message") or reply.get("message") or "no reason")


# --- deletion -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unloaded:
    """What a replica did with a deleted adapter.

    Attributes:
        unloaded: it had the adapter and removed it.
        error: why it may still have it; None if it does not.
    """

    url: str
    unloaded: bool
    error: str | None = None


def unload_everywhere(replicas: Sequence[Replica], name: str) -> list[Unloaded]:
    """Remove an adapter from all replicas at the same time; never raises for one of them."""

    def unload(replica: Replica) -> Unloaded:
        try:
            return Unloaded(replica.url, replica.unload(name))
        except ReplicaError as error:
            return Unloaded(replica.url, False, str(error).removeprefix(f"{replica.url}: "))

    if not replicas:
        return []
    with ThreadPoolExecutor(len(replicas), "v2l-replicas") as pool:
        return list(pool.map(unload, replicas))


# --- verification ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """Log probabilities of the tokens of one answer, here and on a replica.

    Attributes:
        here, there: with the adapter.
        here_base, there_base: without it.
        bound: largest difference that counts as equal.
    """

    here: tuple[float, ...]
    there: tuple[float, ...]
    here_base: tuple[float, ...]
    there_base: tuple[float, ...]
    bound: float

    @property
    def error(self) -> float:
        """Largest difference between here and there, with the adapter."""
        return _largest_difference(self.here, self.there)

    @property
    def base_error(self) -> float:
        """Largest difference between here and there, without the adapter."""
        return _largest_difference(self.here_base, self.there_base)

    @property
    def effect(self) -> float:
        """Largest difference that the adapter makes on the replica."""
        return _largest_difference(self.there, self.there_base)

    @property
    def expected_effect(self) -> float:
        """Largest difference that the adapter makes here."""
        return _largest_difference(self.here, self.here_base)

    def problem(self) -> str | None:
        """What is wrong with the replica and what to do, None if it agrees."""
        if self.expected_effect <= 2 * self.bound:
            return (
                f"the adapter changes the probe's log probabilities by {self.expected_effect:.3f} "
                f"at most, which the bound of {self.bound:g} cannot tell from rounding; use "
                "another --probe or a smaller --bound"
            )
        if self.base_error > self.bound:
            return (
                f"the base model differs from this one by {self.base_error:.3f}, more than "
                f"{self.bound:g}: the replica serves other weights, or the prompt's tokens differ"
            )
        if self.effect <= self.bound:
            return (
                f"the adapter has no effect there (the base's log probabilities differ by "
                f"{self.effect:.3f}, here by {self.expected_effect:.3f}): the replica ignores it; "
                "check its LoRA options and the export's layers (--text-only)"
            )
        if self.error > self.bound:
            return (
                f"the adapter's log probabilities differ from those here by {self.error:.3f}, more "
                f"than {self.bound:g}: the name belongs to another adapter or an older version"
            )
        return None


def _largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def verify(
    model: Video2LoRA,
    adapter: Adapter,
    replica: Replica,
    name: str,
    probe: str = PROBE,
    bound: float = BOUND,
) -> Verification:
    """Compare an adapter and its base on a replica with this model.

    Both compute the log probabilities of the answer that this model gives from the adapter.

    Args:
        adapter: with its bias.
        name: of the adapter on the replica.
        probe: a question whose answer depends on the adapter.

    Raises:
        ReplicaError: the replica does not respond, does not know the adapter, or disagrees.
    """
    (answer,) = model.answer(probe, adapter, max_new_tokens=PROBE_TOKENS, logprobs=0)
    prompt = list(model.backbone.prompt_builder.question(probe))
    tokens = [step.token for step in answer.logprobs]
    if not tokens:
        raise ReplicaError("the answer to the probe is empty; use another --probe")
    there = replica.logprobs(replica.model_name(name), prompt, tokens)
    there_base = replica.logprobs(replica.base, prompt, tokens)
    result = Verification(
        tuple(step.logprob for step in answer.logprobs),
        tuple(there),
        tuple(completion_logprobs(model, None, prompt, tokens)),
        tuple(there_base),
        bound,
    )
    if (problem := result.problem()) is not None:
        raise ReplicaError(f"{replica.url}: {name}: {problem}")
    return result


@torch.inference_mode()
def completion_logprobs(
    model: Video2LoRA, adapter: Adapter | None, prompt: Sequence[int], completion: Sequence[int]
) -> list[float]:
    """Natural-log probabilities of the tokens of ``completion`` after ``prompt``, in one pass."""
    decoder = model.backbone.decoder
    ids = torch.tensor([*prompt, *completion], device=decoder.device)
    bank = AdapterBank.pack([adapter], decoder.device, decoder.dtype)
    hidden = decoder.forward(decoder.embed(ids[None, :-1]), adapters=bank)
    logprobs = decoder.logits(hidden[0, len(prompt) - 1 :]).log_softmax(-1)
    return logprobs.gather(1, ids[len(prompt) :, None])[:, 0].tolist()

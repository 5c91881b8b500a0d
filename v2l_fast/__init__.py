"""Video2LoRA: a video becomes a LoRA adapter, and the frozen model answers from it alone.

>>> from v2l_fast import Video2LoRA
>>> model = Video2LoRA.from_pretrained("shapes-any")
>>> adapter = model.internalize("clip.mp4")
>>> model.ask("what happens?", adapter)
"""

from importlib import import_module

from v2l_fast import _deprecated

__version__ = "0.1.0"

_EXPORTS = {
    "Adapter": "hypernet",
    "AdapterBatch": "hypernet",
    "HyperNetwork": "hypernet",
    "HypernetConfig": "hypernet",
    "V2LError": "errors",
    "Video2LoRA": "model",
    "Clip": "video",
    "adapted_linear": "hypernet.adapted_linear",
}
__all__ = sorted(_EXPORTS)

_deprecated.install()


def __getattr__(name: str) -> object:
    # Lazy: `import v2l_fast` stays instant, and transformers loads when a model is used.
    if name not in _EXPORTS:
        return _deprecated.renamed(__name__, name, stacklevel=4)
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]

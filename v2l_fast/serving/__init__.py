"""Serving: answers many questions at once, each from adapters of its own, and internalizes videos.

``engine`` runs the model; ``server`` adds the store, kept videos and limits; ``api`` and ``chat``
are the HTTP interface.
"""

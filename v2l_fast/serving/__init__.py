"""Answering many requests at once, each from an adapter of its own, while videos are internalized.

The engine (``engine``) runs the model; the store, server and page around it are files of their own.
"""

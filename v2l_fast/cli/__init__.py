"""Command line ``v2l``: one module for each group of commands; parses, calls, prints."""

from v2l_fast.cli.entry import app, main

__all__ = ["app", "main"]

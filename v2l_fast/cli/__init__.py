"""The command line ``v2l``, with one module for each group of commands."""

from v2l_fast.cli.entry import app, main

__all__ = ["app", "main"]

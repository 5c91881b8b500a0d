"""`python -m v2l_fast.shapes`: the shapes world's commands."""

from v2l_fast.shapes.cli import app

app()

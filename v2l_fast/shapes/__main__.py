"""`python -m v2l_fast.shapes`: the shapes world's commands."""

import sys

from v2l_fast.errors import V2LError
from v2l_fast.shapes.cli import app

try:
    app()
except V2LError as error:
    print(error, file=sys.stderr)
    sys.exit(1)

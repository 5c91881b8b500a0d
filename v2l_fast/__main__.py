"""``python -m v2l_fast`` is ``v2l``."""

from v2l_fast.cli.entry import main

main()

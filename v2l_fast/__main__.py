"""``python -m v2l_fast`` runs ``v2l``."""

from v2l_fast.cli import main

main()

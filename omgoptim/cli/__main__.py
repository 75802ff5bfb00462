"""`python -m omgoptim.cli`: the same as the command `omgoptim`."""

from __future__ import annotations

from omgoptim.cli import main

main()

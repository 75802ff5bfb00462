"""`python -m omgoptim.server`: the same as the command `omgoptim-mcp`."""

from __future__ import annotations

from omgoptim.server import main

main()

"""omgoptim: make a PyTorch model smaller and faster, and prove it.

    import omgoptim
    report = omgoptim.quantize("net.py:build", data="net.py:load", max_quality_drop=0.01)
    model = omgoptim.open_artifact(report.artifact.path)

The names below are imported on first use, so that `import omgoptim` costs nothing and pulls no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from omgoptim.errors import OmgoptimError

if TYPE_CHECKING:
    from omgoptim.api import compare, factorize, open_artifact, profile, prune, quantize
    from omgoptim.reports import EfficiencyReport

__version__ = "0.1.0"

__all__ = [
    "EfficiencyReport",
    "OmgoptimError",
    "__version__",
    "compare",
    "factorize",
    "open_artifact",
    "profile",
    "prune",
    "quantize",
]


def __getattr__(name: str) -> object:
    if name == "EfficiencyReport":
        from omgoptim.reports import EfficiencyReport

        return EfficiencyReport
    if name in __all__:
        from omgoptim import api

        return getattr(api, name)
    raise AttributeError(f"module 'omgoptim' has no attribute '{name}'")

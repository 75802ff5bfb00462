"""omgoptim: make a PyTorch model smaller and faster, measured on the saved artifact.

    import omgoptim
    report = omgoptim.quantize("net.py:build", data="net.py:load", max_quality_drop=0.01)
    report = omgoptim.quantize(module, omgoptim.Static(range_method="mse"), data=load)
    model = omgoptim.open_artifact(report.artifact.path)

The names below are imported on first use, so that `import omgoptim` costs nothing and pulls no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from omgoptim.errors import OmgoptimError

if TYPE_CHECKING:
    from omgoptim.api import (
        compare,
        derive_student,
        distill,
        export_coreml,
        factorize,
        open_artifact,
        optimize,
        pick,
        profile,
        prune,
        quantize,
        search,
    )
    from omgoptim.reports import EfficiencyReport
    from omgoptim.requests.distill import Depthwise, FewerLayers, InvertedResidual, LowRank, Narrow
    from omgoptim.requests.factorize import Svd, Whitened
    from omgoptim.requests.prune import Gradient, Magnitude, Random, SemiStructured, Structured, Wanda
    from omgoptim.requests.quantize import Bf16, Dynamic, Fp16, Fp32, Qat, Static, WeightOnly
    from omgoptim.training.distillation import DistillationLoss
    from omgoptim.training.feature_losses import FeatureLoss

__version__ = "0.1.0"

_HOMES = {
    "DistillationLoss": "omgoptim.training.distillation",
    "EfficiencyReport": "omgoptim.reports",
    "FeatureLoss": "omgoptim.training.feature_losses",
}
_PARAMETERS = {
    "omgoptim.requests.distill": ("Depthwise", "FewerLayers", "InvertedResidual", "LowRank", "Narrow"),
    "omgoptim.requests.factorize": ("Svd", "Whitened"),
    "omgoptim.requests.prune": ("Gradient", "Magnitude", "Random", "SemiStructured", "Structured", "Wanda"),
    "omgoptim.requests.quantize": ("Bf16", "Dynamic", "Fp16", "Fp32", "Qat", "Static", "WeightOnly"),
}
"""The parameters of each technique, by the module that holds them."""

_HOMES |= {name: module for module, names in _PARAMETERS.items() for name in names}

__all__ = [
    "Bf16",
    "Depthwise",
    "DistillationLoss",
    "Dynamic",
    "EfficiencyReport",
    "FeatureLoss",
    "FewerLayers",
    "Fp16",
    "Fp32",
    "Gradient",
    "InvertedResidual",
    "LowRank",
    "Magnitude",
    "Narrow",
    "OmgoptimError",
    "Qat",
    "Random",
    "SemiStructured",
    "Static",
    "Structured",
    "Svd",
    "Wanda",
    "WeightOnly",
    "Whitened",
    "__version__",
    "compare",
    "derive_student",
    "distill",
    "export_coreml",
    "factorize",
    "open_artifact",
    "optimize",
    "pick",
    "profile",
    "prune",
    "quantize",
    "search",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "omgoptim.api")), name)
    raise AttributeError(f"module 'omgoptim' has no attribute '{name}'")

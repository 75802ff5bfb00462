"""Effort presets of static quantization: defaults for the settings that a request leaves open.

| effort   | ranges  | equalize | bias correction | rounding      |
| fast     | minmax  | no       | no              | nearest       |
| balanced | chosen  | yes      | yes             | small_kernels |
| best     | chosen from more, then one by one | yes | yes | adaround |

A chosen range stays `auto` in the resolved params: what is tried is decided by the rounding, see `pipeline.py`.
"""

from __future__ import annotations

from omgoptim.requests.quantize import Effort, Static


def apply_preset(params: Static, effort: Effort) -> Static:
    """Fill the open settings of params from the preset of an effort; explicit settings stay.

    Resolving again with balanced changes nothing, whatever the effort was.
    """
    plain = effort == "fast"
    filled: dict[str, object] = {}
    if params.range_method == "auto" and plain:
        filled["range_method"] = "minmax"
    if params.equalize is None:
        filled["equalize"] = not plain
    if params.bias_correction is None:
        filled["bias_correction"] = not plain
    if params.rounding == "auto":
        filled["rounding"] = {"fast": "nearest", "balanced": "small_kernels", "best": "adaround"}[effort]
    return params.model_copy(update=filled)

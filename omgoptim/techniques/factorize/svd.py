"""Replace weights by two low-rank factors, their truncated SVD; needs no data.

What it does: W (out x in) becomes B A of rank k, the nearest of that rank: the first k terms of its SVD. A convolution
becomes kx1 then 1xk (the SVD of its weight laid out as (out, x) by (in, y)), or 1x1, kxk, 1x1 (Tucker-2 by higher-order
SVD), whichever loses less for its size. Ranks: one for all, by energy, by size of each layer, or allocated by the
relative error of each layer's weight until the model has the requested size.
Use when: there is no data at all. With some, whitened loses far less at the same size. Takes seconds.
What you really get: storage and memory by the removed parameters; time on every engine if ranks fall well below in *
out / (in + out), since two narrow products take longer than one with as many MACs; `per=time` measures that.
Limits: quality falls fast without training afterwards, as small weights may meet large inputs. Depthwise and transposed
convolutions, attention's packed projections, shared weights and recurrent layers stay as they are.
Source: Eckart-Young; arXiv:1405.3866 (spatial), arXiv:1511.06530 (Tucker-2; differs in allocated ranks instead of
VBMF).
"""

from __future__ import annotations

from torch import nn

from omgoptim.requests.factorize import Svd
from omgoptim.techniques.factorize._low_rank.factorization import factorize
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique


@module_technique(Svd, needs_data=False, source="arXiv:1511.06530")
def apply(module: nn.Module, params: Svd, run: ModuleRun) -> Outcome:
    """Factorize layers of `module` in place, by their weights.

    Raises:
        TechniqueError: no layer can be factorized, or the target cannot be reached (the error gives the maximum).
    """
    return factorize(module, params, run, samples=None)

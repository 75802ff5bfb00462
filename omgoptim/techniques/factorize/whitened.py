"""Replace weights by the two low-rank factors that change the layer's output on data least.

What it does: with C = S S' the second moment of a layer's inputs (centred: the bias takes up what the mean input loses)
and G = R R' the influence of its outputs on the model's, the SVD of R' W S is truncated to rank k and transformed back.
Layers are solved in the order in which they run, each on the inputs that the compressed ones before it give, towards
the original's outputs, so that a layer compensates for earlier errors. A convolution becomes kx1 then 1xk, or 1x1, kxk,
1x1, with the same moments. Ranks are allocated to layers by the effect of each layer's error on the model's output, to
first order.
Use when: large Linear layers or convolutions, and some hundred samples. No labels. Takes a forward and a backward over
the samples, and up to 32 forwards of the original and the compressed model.
What you really get: storage and memory by the removed parameters; time on every engine if ranks fall well below in *
out / (in + out), since two narrow products take longer than one with as many MACs; `per=time` measures that.
Limits: half the parameters cost visible quality without training afterwards. Convolutions whose patches have more than
12,288 values, depthwise and transposed ones, attention's packed projections, shared weights and recurrent layers stay.
Where no gradient reaches a layer, or the model has none to give, G is left out.
Source: arXiv:2403.07378 (SVD-LLM); differs in centred moments with a bias correction, in weighing the outputs (as a
Kronecker-factored Fisher would, with the model's own outputs for a loss), in solving towards the original's outputs in
closed form instead of updating one factor, in allocated ranks, and in convolutions.
"""

from __future__ import annotations

from torch import nn

from omgoptim.requests.factorize import Whitened
from omgoptim.techniques.factorize._low_rank.factorization import factorize
from omgoptim.techniques.registry import ModuleRun, Outcome, module_technique


@module_technique(Whitened, needs_data=True, source="arXiv:2403.07378")
def apply(module: nn.Module, params: Whitened, run: ModuleRun) -> Outcome:
    """Factorize layers of `module` in place, by what they do on the run's statistics.

    Raises:
        TechniqueError: no layer can be factorized, or the target cannot be reached (the error gives the maximum).
    """
    return factorize(module, params, run, samples=params.calibration_samples)

"""Selection of the layers that can be factorized, with the reasons for the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from omgoptim.blocks import BLOCKS, LowRankLinear, SpatialConv2d, Tucker2Conv2d
from omgoptim.models.globs import is_selected, refuse_unknown
from omgoptim.reports import Skip
from omgoptim.requests.factorize import Factorization
from omgoptim.techniques.probe import EXCLUDED, NOT_RUN, WHOLE_MODEL, LayerCalls, layer_calls, replacement_refusal
from omgoptim.techniques.reconstruction.inputs import DenseLayer
from omgoptim.techniques.registry import ModuleRun, Refusal

OTHER_KINDS: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "attention reads its packed projection weight directly instead of calling it as a layer",
    nn.RNNBase: "a recurrent layer runs as one fused kernel; only Linear layers and Conv2d are factorized",
    nn.RNNCellBase: "a recurrent cell runs as one fused kernel; only Linear layers and Conv2d are factorized",
    nn.Embedding: "an embedding is a table lookup, not a matrix product",
    nn.EmbeddingBag: "an embedding is a table lookup, not a matrix product",
    nn.Bilinear: "only Linear layers and Conv2d are factorized, not bilinear layers",
    nn.modules.conv._ConvNd: "only Linear layers and Conv2d are factorized",
}


def factorizable(module: nn.Module, params: Factorization, run: ModuleRun) -> tuple[list[str], list[Skip]]:
    """Return the paths of the layers that params could factorize, and the others with the reason.

    A layer may still stay as it is when its ranks are chosen: where none is smaller.

    Args:
        module: runs once on a few samples of the run's statistics, to see which layers are called.
        params: whose targets, ignore and convolution count.
        run: gives the samples.

    Raises:
        TechniqueError: a glob names no layer.
    """
    layers, skipped = candidates(module, params)
    uses = layer_calls(module, layers, run)
    unreached = [NOT_RUN.skip(path) for path in layers if path not in uses]
    return [path for path in layers if path in uses], sorted([*skipped, *unreached], key=lambda skip: skip.path)


def candidates(module: nn.Module, params: Factorization) -> tuple[dict[str, DenseLayer], list[Skip]]:
    """Return the layers as `factorizable` finds them, before the model has run."""
    with_weights = dict(_layers(module))
    refuse_unknown((*params.targets, *params.ignore), with_weights)
    chosen = {path for path in with_weights if is_selected([path], params.targets, params.ignore)}
    owners = _owners(module)
    frozen_model = not any(parameter.requires_grad for parameter in module.parameters())
    layers: dict[str, DenseLayer] = {}
    skipped = []
    for path, (layer, parent) in with_weights.items():
        refusal = _refusal(layer, parent, params, owners, frozen_model) if path in chosen else EXCLUDED
        if refusal is None and path:
            layers[path] = layer  # type: ignore[assignment]
        else:
            skipped.append((refusal or WHOLE_MODEL).skip(path or "(model)"))
    return layers, skipped


def _layers(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, nn.Module | None]]]:
    """Yield path, layer, and the enclosing block or attention; parts of a block count as the block."""
    owners: dict[str, nn.Module] = {}
    for path, layer in module.named_modules():
        parts = path.split(".")
        parent = next((owners[p] for n in range(1, len(parts)) if (p := ".".join(parts[:n])) in owners), None)
        if _is_block(layer) or isinstance(layer, nn.MultiheadAttention):
            owners[path] = layer
        if parent is not None and _is_block(parent):
            continue
        kinds = (nn.Linear, nn.Conv2d, *OTHER_KINDS)
        if isinstance(layer, kinds) or _is_block(layer):
            yield path, (layer, parent)


def _owners(module: nn.Module) -> dict[int, dict[int, str]]:
    """Return the owning layers and names of each parameter by its storage."""
    found: dict[int, dict[int, str]] = {}
    for path, layer in module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            found.setdefault(_storage_key(parameter), {})[id(layer)] = f"{path}.{name}" if path else name
    return found


def _is_block(layer: nn.Module) -> bool:
    return BLOCKS.get(type(layer).__name__) is type(layer)


def _storage_key(tensor: Tensor) -> int:
    return tensor.data_ptr() or id(tensor)


def _refusal(
    layer: nn.Module,
    parent: nn.Module | None,
    params: Factorization,
    owners: Mapping[int, Mapping[int, str]],
    frozen_model: bool,
) -> Refusal | None:
    """Return why a layer cannot be factorized, or None."""
    if _is_block(layer):
        low = isinstance(layer, (LowRankLinear, SpatialConv2d, Tucker2Conv2d))
        return Refusal("it is already low-rank" if low else "it is already a compact block", "already_compressed")
    if isinstance(parent, nn.MultiheadAttention):
        return Refusal("the enclosing attention reads its weight directly instead of calling it", "unsupported")
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return Refusal(next(why for kind, why in OTHER_KINDS.items() if isinstance(layer, kind)), "unsupported")
    if refusal := replacement_refusal(layer):
        return refusal
    weight = layer.weight
    if not weight.is_floating_point():
        return Refusal(f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float", "unsupported")
    for parameter in layer.parameters(recurse=False):
        if len(owners[_storage_key(parameter)]) > 1:
            shared = (
                f"its parameters are shared with another layer: {', '.join(owners[_storage_key(parameter)].values())}"
            )
            return Refusal(shared, "tied")
    if not (weight.requires_grad or frozen_model or params.targets):
        frozen = "it is frozen (requires_grad is False); name it in targets to factorize it anyway"
        return Refusal(frozen, "excluded")
    if weight.numel() == 0 or min(weight.shape[0], weight[0].numel()) < 2:
        shape = " x ".join(map(str, weight.shape))
        return Refusal(f"its {shape} weight already has rank 1", "no_benefit")
    return _conv_refusal(layer, params) if isinstance(layer, nn.Conv2d) else None


def _conv_refusal(layer: nn.Conv2d, params: Factorization) -> Refusal | None:
    if params.convolution == "skip":
        return Refusal("convolutions are excluded (convolution=skip)", "excluded")
    if layer.groups > 1 and layer.in_channels == layer.groups:
        depthwise = "it is depthwise: each output channel reads one input channel, so there is nothing to factorize"
        return Refusal(depthwise, "unsupported")
    if layer.padding_mode != "zeros":
        padding = f"padding_mode {layer.padding_mode} cannot be factorized exactly; only zeros can"
        return Refusal(padding, "unsupported")
    return None


def shared_inputs(layers: Mapping[str, DenseLayer], uses: Mapping[str, LayerCalls]) -> dict[str, str]:
    """Return the first path with the same input rows for each path: of Linear layers or alike convolutions."""
    first: dict[tuple[Any, ...], str] = {}
    leaders = {}
    for path, layer in layers.items():
        geometry: tuple[Any, ...] = ()
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        leaders[path] = first.setdefault((uses[path].sources, geometry), path)
    return leaders

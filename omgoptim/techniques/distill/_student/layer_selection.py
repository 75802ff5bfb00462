"""Layer selection by `targets` and `ignore` globs, stable while layers are removed and renumbered."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from omgoptim.models.globs import is_selected, refuse_unknown
from omgoptim.requests.distill import Auto, Derived


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """Layers of a module that `targets` and `ignore` select."""

    targets: list[str]
    """Globs or paths; empty for everything."""
    ignore: list[str]
    nothing: bool = False
    """Whether everything that `targets` named was removed: empty targets would mean everything."""

    @staticmethod
    def of(module: nn.Module, params: Derived | Auto) -> LayerSelection:
        """Build the selection of a request's params.

        Raises:
            TechniqueError: a glob names no layer.
        """
        refuse_unknown((*params.targets, *params.ignore), [path for path, _ in module.named_modules() if path])
        return LayerSelection(list(params.targets), list(params.ignore))

    def includes(self, path: str) -> bool:
        """Return whether the layer at `path` may change."""
        return not self.nothing and is_selected([path], self.targets, self.ignore)

    def after(self, before: dict[int, list[str]], module: nn.Module) -> LayerSelection:
        """Return the same selection by the present paths.

        Args:
            before: id of a module to its paths when this was made, as `paths_of` gives them.
            module: the model after some of its layers went.
        """
        now = paths_of(module)

        def follow(globs: list[str]) -> list[str]:
            return [
                path
                for layer, paths in now.items()
                if layer in before and any(is_selected([old], globs, []) for old in before[layer])
                for path in paths
                if path
            ]

        targets = follow(self.targets) if self.targets else []
        ignore = follow(self.ignore) if self.ignore else []
        return LayerSelection(targets, ignore, nothing=bool(self.targets) and not targets)


def paths_of(module: nn.Module) -> dict[int, list[str]]:
    """Return the paths of every module by id; several where it is shared."""
    paths: dict[int, list[str]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(layer), []).append(path)
    return paths

"""Recipes: plain data by which a fresh process builds a module again; a recipe confers no rights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.structural_diff import StructuralDiff

KINDS = ("callable", "pt2", "hf", "timm", "torchvision")
"""Kinds of model sources with a recipe."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Plain data by which a fresh process builds a module again."""

    kind: str
    """callable, pt2, hf, timm or torchvision."""
    spec: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    project: str = "."
    """The project it was built in, searched after the request's project. It confers no rights: the file must be one
    that the request may read."""
    limit_s: float = 300.0
    surgery: StructuralDiff | None = None
    """Structural changes after the code built the module: shapes, and layers replaced by blocks."""

    @property
    def runs_code(self) -> bool:
        """Return whether building runs code: of the project, or of a model library with the recipe's arguments."""
        return self.kind != "pt2"

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return plain | {"surgery": self.surgery.to_json() if self.surgery else None}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Recipe:
        """Create the recipe from the result of `to_json`; `allowed`, a field of older recipes, is ignored.

        Raises:
            ValueError: it is something else.
            ArtifactError: its structural changes are.
        """
        known = {name: value for name, value in record.items() if name != "allowed"}
        texts = [known.get(name) for name in ("kind", "spec", "project")]
        limit_s, surgery = known.get("limit_s", 300.0), known.get("surgery")
        is_number = isinstance(limit_s, (int, float)) and not isinstance(limit_s, bool) and 0 < limit_s < 1e9
        if set(known) - set(Recipe.__slots__) or not all(isinstance(text, str) for text in texts) or not is_number:
            raise ValueError("the recipe's fields are not those of a recipe")
        if known["kind"] not in KINDS or not isinstance(known.get("kwargs"), dict):
            raise ValueError("the recipe is of an unknown kind, or its arguments are not an object")
        if surgery and known["kind"] == "pt2":
            raise ValueError("a recipe of kind pt2 has no structural changes")
        return Recipe(**(known | {"surgery": StructuralDiff.from_json(surgery) if surgery else None}))


def exists(base: Path, name: str) -> bool:
    """Return whether a name exists below a folder; False for what cannot be a path."""
    try:
        return (base / name).exists()
    except OSError:  # too long for a name
        return False


def is_file(source: str) -> bool:
    """Return whether a source names a Python file, not a module."""
    return source.endswith(".py")


def is_local(name: str, policy: PathPolicy) -> bool:
    """Return whether `hf:name` is a folder, as transformers sees it, and not a name on the hub."""
    return name.startswith((".", "/", "~")) or ".." in name or exists(policy.project, name) or exists(Path.cwd(), name)


def portable_path(name: str, policy: PathPolicy) -> str:
    """Return the path of a file or folder for a recipe: relative to the project, and unambiguous."""
    path = policy.file(name, "model")
    relative = policy.relative(path)
    return relative if Path(relative).is_absolute() or is_file(relative) else f"./{relative}"


def resolve_policy(recipe: Recipe, policy: PathPolicy) -> PathPolicy:
    """Return the policy with the project that has the recipe's file: the request's, else the recipe's.

    The rights of the request stay the same.
    """
    named = recipe.spec.rpartition(":")[0] if recipe.kind == "callable" else recipe.spec
    if recipe.kind == "callable" and not is_file(named):
        return policy
    home = Path(recipe.project)
    if exists(policy.project, named) or not home.is_absolute() or not exists(home, named):
        return policy
    folders = (policy.project, *policy.allowed)
    if not any(home.resolve().is_relative_to(folder) for folder in folders):
        return policy
    return replace(policy, project=home.resolve(), allowed=folders)

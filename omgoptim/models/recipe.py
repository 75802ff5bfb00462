"""Recipes: plain data by which a fresh process builds a module again, and the file recipe.json of an artifact.

A recipe confers no rights. Torch only where a recipe has structural changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.errors import ArtifactError, argument
from omgoptim.models.manifest import (
    MAX_JSON_BYTES,
    PROGRAM,
    PROGRAM2,
    RECIPE,
    Manifest,
    json_object,
    listed_file,
    sha256_of,
    verify_files,
)
from omgoptim.models.security.file_integrity import read_regular_file
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.runtimes import engine_named

if TYPE_CHECKING:
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
    structural_diff: StructuralDiff | None = None
    """Structural changes after the code built the module: shapes, and layers replaced by blocks."""

    @property
    def runs_code(self) -> bool:
        """Return whether building runs code: of the project, or of a model library with the recipe's arguments."""
        return self.kind != "pt2"

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values."""
        record = {name: getattr(self, name) for name in self.__slots__}
        return record | {"structural_diff": self.structural_diff.to_json() if self.structural_diff else None}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Recipe:
        """Create the recipe from the result of `to_json`; the older key `surgery` is read, `allowed` is ignored.

        Raises:
            ValueError: it is something else.
            ArtifactError: its structural changes are.
        """
        renamed = {"surgery": "structural_diff"}
        fields = {renamed.get(name, name): value for name, value in record.items() if name != "allowed"}
        texts = [fields.get(name) for name in ("kind", "spec", "project")]
        limit_s, changes = fields.get("limit_s", 300.0), fields.get("structural_diff")
        is_number = isinstance(limit_s, (int, float)) and not isinstance(limit_s, bool) and 0 < limit_s < 1e9
        if set(fields) - set(Recipe.__slots__) or not all(isinstance(text, str) for text in texts) or not is_number:
            raise ValueError("a field is missing or unknown")
        if fields["kind"] not in KINDS or not isinstance(fields.get("kwargs"), dict):
            raise ValueError("its kind is unknown, or its arguments are not an object")
        if changes and fields["kind"] == "pt2":
            raise ValueError("a recipe of kind pt2 has no structural changes")
        return Recipe(**(fields | {"structural_diff": _diff_of(changes) if changes else None}))


def _diff_of(record: Mapping[str, Any]) -> StructuralDiff:
    from omgoptim.models.structural_diff import StructuralDiff  # with torch

    return StructuralDiff.from_json(record)


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


@dataclass(frozen=True, slots=True)
class RecipeRecord:
    """Content of recipe.json: the recipe, tied names and packed shapes of the weights."""

    recipe: Recipe
    aliases: dict[str, str]
    """Further names of tied weights, to the name that they are stored under."""
    packed: dict[str, list[int]]
    """Names of packed weights to their shapes."""


def refuse_foreign_recipe(folder: Path, manifest: Manifest, policy: PathPolicy) -> None:
    """Refuse an artifact whose recipe runs code, unless this user made it or trusts it.

    Raises:
        ArtifactError: it is untrusted, or the recipe cannot be read.
    """
    recipe = read_recipe(folder, manifest)
    if manifest.made_here or policy.trusted or not recipe.runs_code:
        return
    calls = recipe.kind == "callable"
    runs = f"calls '{recipe.spec[:200]}'" if calls else f"builds '{recipe.spec[:200]}' with {recipe.kind}"
    way_out = f"; or use its {PROGRAM}, which contains no code" if PROGRAM in manifest.files else ""
    raise ArtifactError(
        f"artifact {folder} was not created by this user, and opening it runs code",
        f"its recipe {runs} with arguments of its own, and its manifest is not signed with this user's key",
        f"if you trust its origin, open it with {argument('trust_artifact', True)}, or in Python with "
        f"omgoptim.open_artifact(…, trust=True); an agent cannot{way_out}",
    )


def code_project(folder: Path) -> str | None:
    """Return the project of a module artifact of this user; None for a program, or an artifact of another user.

    Raises:
        ArtifactError: it is not an artifact.
    """
    manifest = Manifest.read(folder)
    if not manifest.made_here or engine_named(manifest.runtime).runs != "module":
        return None
    verify_files(folder, manifest)
    return read_recipe(folder, manifest).project


def read_recipe(folder: Path, manifest: Manifest | None = None) -> Recipe:
    """Read the recipe of a module artifact.

    Raises:
        ArtifactError: there is none, or it is not a recipe.
    """
    return read_record(folder, manifest or Manifest.read(folder)).recipe


def read_record(folder: Path, manifest: Manifest) -> RecipeRecord:
    """Read an artifact's recipe.json.

    Raises:
        ArtifactError: there is none, or it holds something else.
    """
    path = listed_file(folder, manifest, RECIPE)
    try:
        text = read_regular_file(path, MAX_JSON_BYTES)
        if sha256_of(text) != manifest.files[RECIPE]["sha256"]:  # only the signed content is run
            raise ValueError("it is not the file that was saved (its sha256 differs)")
        record = json_object(text)
        recipe = Recipe.from_json(record["recipe"])
        built = RecipeRecord(recipe, dict(record["aliases"]), dict(record.get("packed", {})))
        sizes = [size for shape in built.packed.values() for size in shape]
        if not all(isinstance(name, str) for name in built.aliases.values()):
            raise TypeError("an alias of a tied weight is not a string")
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise TypeError("a packed weight's shape is not valid")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"artifact {folder} is damaged", f"{RECIPE} cannot be read: {error}") from error
    if recipe.kind != "pt2":
        return built
    return replace(built, recipe=replace(recipe, spec=str(listed_file(folder, manifest, PROGRAM2))))

"""The file recipe.json of an artifact, and the check of the code that it names. Torch only when read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

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
from omgoptim.models.security.bounded_read import read_plain
from omgoptim.runtimes import engine_named

if TYPE_CHECKING:
    from omgoptim.models.recipe import Recipe
    from omgoptim.models.security.path_policy import PathPolicy


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
    way_out = f"; or take its {PROGRAM}, which holds no code" if PROGRAM in manifest.files else ""
    raise ArtifactError(
        f"artifact {folder} was not made by you, and opening it runs code",
        f"its recipe {runs}, with arguments of the recipe; no key of this user sealed its manifest",
        f"if you know where it is from, open it with {argument('trust_artifact', True)}, or in Python with "
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
    from omgoptim.models.recipe import Recipe

    path = listed_file(folder, manifest, RECIPE)
    try:
        text = read_plain(path, MAX_JSON_BYTES)
        if sha256_of(text) != manifest.files[RECIPE]["sha256"]:  # only the sealed content is run
            raise ValueError("it is not the file that was saved (its sha256 differs)")
        record = json_object(text)
        recipe = Recipe.from_json(record["recipe"])
        built = RecipeRecord(recipe, dict(record["aliases"]), dict(record.get("packed", {})))
        sizes = [size for shape in built.packed.values() for size in shape]
        if not all(isinstance(name, str) for name in built.aliases.values()):
            raise TypeError("an alias is not a name")
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise TypeError("a packed weight's shape is not one")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"artifact {folder} is damaged", f"{RECIPE} cannot be read: {error}") from error
    if recipe.kind != "pt2":
        return built
    return replace(built, recipe=replace(recipe, spec=str(listed_file(folder, manifest, PROGRAM2))))

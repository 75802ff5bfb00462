"""Loading of models: a callable, an artifact or run, a .pt2 or .onnx file, timm, torchvision or Hugging Face."""

from __future__ import annotations

import copy
import json
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from omgoptim.errors import ModelError, SetupError, UnknownModelError, argument
from omgoptim.hardware import refuse_beyond_memory, weight_bytes
from omgoptim.models._pt2.archive import open_pt2
from omgoptim.models.artifact import check_artifact
from omgoptim.models.checkpoint import WeightSet, load_checkpoint
from omgoptim.models.manifest import MANIFEST
from omgoptim.models.recipe import Recipe, exists, is_file, is_local, portable_path, resolve_policy
from omgoptim.models.security.file_integrity import read_regular_file
from omgoptim.models.security.hub_options import check_config, check_folder, check_options, is_remote_code_allowed
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.security.user_code import call_user, load_callable, require_arguments
from omgoptim.models.structural_diff import apply_diff

RUNS = Path(".omgoptim") / "runs"
"""Folder of runs in a project."""
PRETRAINED = {"timm": ("pretrained", False, True), "torchvision": ("weights", None, "DEFAULT")}
"""The argument that asks a model library for weights: its name, its value without and with them."""

WITH_MODES = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Layers whose forward differs between training and evaluation."""

PICKLE = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Suffixes of pickles, which are accepted as checkpoints only."""


@dataclass(frozen=True, slots=True)
class Source:
    """A loaded model: a module with its recipe, or an ONNX program, with notes."""

    module: nn.Module | None = None
    recipe: Recipe | None = None
    program: Path | None = None
    artifact: Path | None = None
    """The artifact folder it came from, if it did."""
    notes: list[str] = field(default_factory=list)


def load_source(
    model: str,
    policy: PathPolicy,
    *,
    checkpoint: str | None = None,
    weights: WeightSet = "auto",
    kwargs: Mapping[str, Any] | None = None,
    limit_s: float = 300.0,
) -> Source:
    """Load the model that `model` names; see the request's `model` field for the forms.

    Args:
        model: the source.
        policy: the files and modules whose code may run.
        checkpoint: file of weights to load into the built module; None for none.
        weights: which of the checkpoint's averaged and plain weights to take.
        kwargs: for the user's callable or the library's constructor.
        limit_s: seconds that a call of the user's code may take.

    Raises:
        RequestError: a path outside the project.
        ModelError: it does not exist, is not a module, its checkpoint does not fit, or its weights exceed the memory.
        UserCodeError, SetupError: building it failed.
    """
    artifact = find_artifact(model, policy)
    for path in _weights_of(model, artifact, checkpoint, policy):
        refuse_beyond_memory(weight_bytes(path), f"loading {path.name}")
    if (artifact is not None or model.endswith((".onnx", ".pt2"))) and (checkpoint or kwargs):
        recipe_given = "a checkpoint was" if checkpoint else "model_kwargs were"
        raise ModelError(f"'{model}' already contains its weights", f"{recipe_given} given with it", "leave it out")
    if artifact is not None:
        return Source(artifact=artifact)
    if model.endswith(".onnx") and model.partition(":")[0] not in ("hf", *PRETRAINED):
        return Source(program=policy.file(model, "model"))
    recipe = _recipe_of(
        model, policy, Recipe("", "", dict(kwargs or {}), str(policy.project), limit_s), bool(checkpoint)
    )
    module = _constructed(recipe, policy)
    modes = training_mode_notes(module)
    module = module if recipe.kind == "pt2" else module.eval()
    notes = modes + load_checkpoint(module, policy.file(checkpoint, "checkpoint"), weights) if checkpoint else modes
    return Source(module=module, recipe=recipe, notes=notes)


def _recipe_of(model: str, policy: PathPolicy, recipe: Recipe, has_checkpoint: bool) -> Recipe:
    """Return the recipe with the kind and spec that `model` names.

    Raises:
        RequestError: a path outside the project.
        ModelError: it is a pickle, or names nothing.
    """
    prefix, _, name = model.partition(":")
    if prefix == "hf":
        return replace(recipe, kind=prefix, spec=portable_path(name, policy) if is_local(name, policy) else name)
    if prefix in PRETRAINED:
        option, untrained, trained = PRETRAINED[prefix]
        chosen = {option: untrained if has_checkpoint else trained}
        return replace(recipe, kind=prefix, spec=name, kwargs=chosen | recipe.kwargs)
    if model.endswith(".pt2"):
        return replace(recipe, kind="pt2", spec=str(policy.file(model, "model")))
    if model.endswith(PICKLE):
        raise _refused_pickle(model)
    if prefix and name:
        file, _, name = model.rpartition(":")
        spec = f"{portable_path(file, policy)}:{name}" if is_file(file) else model
        return replace(recipe, kind="callable", spec=spec)
    raise UnknownModelError(
        f"'{model}' is not a model",
        "no run, artifact folder or file of that name was found in the project",
        "give path/to/file.py:callable, package.module:callable, model.pt2, model.onnx, hf:…, timm:… or a run's id",
    )


def _weights_of(model: str, artifact: Path | None, checkpoint: str | None, policy: PathPolicy) -> list[Path]:
    """Return the files and folders with the weights, if known before loading."""
    if artifact is not None:
        return [artifact]
    names = [name for name in (checkpoint, model.removeprefix("hf:")) if name]
    return [policy.project / name for name in names if exists(policy.project, name)]


def build(recipe: Recipe, policy: PathPolicy) -> nn.Module:
    """Build the module that a recipe describes, in eval mode if the module has modes.

    Args:
        recipe: source, arguments and structural diff.
        policy: the files and modules whose code may run; the recipe's own project is only searched next.

    Raises:
        RequestError: it names code or a folder that the request does not grant.
        ModelError, UserCodeError, SetupError: building it failed.
    """
    module = _constructed(recipe, policy)
    return module if recipe.kind == "pt2" else module.eval()


def _constructed(recipe: Recipe, policy: PathPolicy) -> nn.Module:
    if recipe.kind == "callable":
        module = _build_callable(recipe, resolve_policy(recipe, policy))
    elif recipe.kind == "hf" and is_local(recipe.spec, policy):
        folder = resolve_policy(recipe, policy).file(recipe.spec, "model")
        module = _BUILDERS[recipe.kind](replace(recipe, spec=str(folder)))
    else:
        module = _BUILDERS[recipe.kind](recipe)
    if recipe.structural_diff is not None:
        apply_diff(module, recipe.structural_diff)
    _refuse_uninitialized(module, recipe)
    return module


def _refuse_uninitialized(module: nn.Module, recipe: Recipe) -> None:
    """Raise a ModelError if lazy layers have no sizes yet: no fresh process could load their weights."""
    waiting = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if waiting:
        raise ModelError(
            "the model has uninitialized lazy layers",
            ", ".join(waiting[:4]),
            f"run the module once on an example batch in {recipe.spec or 'its builder'} before returning it",
        )


def training_mode_notes(module: nn.Module) -> list[str]:
    """Return a note if layers that behave differently in training were given in training mode."""
    kinds = {type(layer).__name__ for layer in module.modules() if layer.training and isinstance(layer, WITH_MODES)}
    if not kinds:
        return []
    return [f"the model was in training mode and has {', '.join(sorted(kinds))}; it is measured in eval mode"]


def find_artifact(model: str, policy: PathPolicy) -> Path | None:
    """Find the artifact folder that `model` names, as a folder or as a run id; None if it names none."""
    if "/" not in model and "\\" not in model:
        run = policy.project / RUNS / model
        if _is_folder(run) and (run.is_symlink() or (run / "artifact").is_symlink()):
            raise ModelError(
                f"run '{model}' is not in this project", "its folder is a link", f"give the folder: {run.resolve()}"
            )
        if _is_folder(run, "artifact") and (run / "artifact" / MANIFEST).is_file():
            return _checked(run / "artifact", policy)
        if _is_folder(run):
            raise ModelError(
                f"run '{model}' has no artifact",
                _run_status(run),
                "give a finished run that saves one, such as a quantize run; `omgoptim runs list` shows them",
            )
    if _is_folder(policy.project, model):
        folder = policy.file(model, "model")
        if (folder / MANIFEST).is_file():
            return _checked(folder, policy)
        raise ModelError(
            f"folder '{model}' is not an artifact", f"it has no {MANIFEST}", "for a Hugging Face model, give hf:FOLDER"
        )
    return None


def _checked(folder: Path, policy: PathPolicy) -> Path:
    """Return the artifact's folder after its files and the code that it runs were checked."""
    check_artifact(folder, policy)
    return folder


def _is_folder(base: Path, name: str = ".") -> bool:
    try:
        return (base / Path(name).expanduser()).is_dir()
    except (OSError, RuntimeError):  # too long for a name; ~ of an unknown user
        return False


def _run_status(run: Path) -> str:
    try:
        return f"its status is {json.loads(read_regular_file(run / 'state.json', 2**20))['status']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "it has not finished"


def _refused_pickle(model: str) -> ModelError:
    return ModelError(
        f"'{model}' is a pickled model, and opening it would run the code in it",
        "omgoptim never unpickles a model",
        f"give its class and weights: {argument('model', 'net.py:Net')} {argument('checkpoint', str(model))}; or, only "
        f"if you trust where {model} comes from, open it in Python yourself and export it with torch.export.save(…, "
        "'model.pt2') or torch.onnx.export",
    )


def _build_callable(recipe: Recipe, policy: PathPolicy) -> nn.Module:
    target = load_callable(recipe.spec, policy, "model", recipe.limit_s)
    name = recipe.spec.rpartition(":")[2]
    if isinstance(target, nn.Module):
        if recipe.kwargs:
            raise ModelError(f"{name} is a module, not a callable", "model_kwargs were given with it", "leave them out")
        return _unshared(target)
    if not callable(target):
        raise ModelError(
            f"'{recipe.spec}' is a {type(target).__name__}", "a callable that returns a torch.nn.Module is needed"
        )
    require_arguments(name, target, recipe.kwargs)
    built = call_user(f"calling {name}", recipe.limit_s, target, **recipe.kwargs)
    if not isinstance(built, nn.Module):
        raise ModelError(
            f"{name} returned a {type(built).__name__}, not a torch.nn.Module",
            f"the model was given as '{recipe.spec}'",
            "give the class, or a function that builds and returns the module",
        )
    return _unshared(built)


_HANDED_OUT: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _unshared(module: nn.Module) -> nn.Module:
    """Return the object itself the first time, then copies: two artifacts of one object may be open in a process."""
    if module in _HANDED_OUT:
        return copy.deepcopy(module)
    _HANDED_OUT.add(module)
    return module


def _build_hf(recipe: Recipe) -> nn.Module:
    check_options("hf", recipe.spec, recipe.kwargs)
    if Path(recipe.spec).is_dir():
        check_folder(Path(recipe.spec), recipe.kwargs.get("subfolder"))
    transformers = _optional("transformers", "hf")
    safe = {"trust_remote_code": is_remote_code_allowed(), "weights_only": True}
    kwargs = recipe.kwargs if is_remote_code_allowed() else recipe.kwargs | {"weights_only": True}

    def pretrained() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(recipe.spec, trust_remote_code=is_remote_code_allowed())
        check_config(config.to_dict(), recipe.spec)
        named = [getattr(transformers, kind, None) for kind in getattr(config, "architectures", None) or []]
        models: list[Any] = [kind for kind in named if isinstance(kind, type)]
        models = [kind for kind in models if issubclass(kind, transformers.PreTrainedModel)]
        loaded: Any = next(iter(models), transformers.AutoModel).from_pretrained(recipe.spec, **(safe | kwargs))
        loaded.config.use_cache = False  # a cache of keys and values is not an output to compare
        module: nn.Module = loaded
        return module

    return call_user(f"loading {recipe.spec} with transformers", recipe.limit_s, pretrained)


def _build_timm(recipe: Recipe) -> nn.Module:
    check_options("timm", recipe.spec, recipe.kwargs)
    return _named("timm", _optional("timm", "timm").create_model, recipe)


def _build_torchvision(recipe: Recipe) -> nn.Module:
    check_options("torchvision", recipe.spec, recipe.kwargs)
    return _named("torchvision", _optional("torchvision", "vision").models.get_model, recipe)


def _named(package: str, create: Callable[..., nn.Module], recipe: Recipe) -> nn.Module:
    return call_user(f"loading {recipe.spec} with {package}", recipe.limit_s, create, recipe.spec, **recipe.kwargs)


def _optional(package: str, extra: str) -> Any:
    """Import an optional package, with separate errors for a missing and a broken installation."""
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise SetupError(
            f"this model source needs {package}",
            f"{error.name} is not installed in {sys.executable}",
            f'{sys.executable} -m pip install "omgoptim[{extra}]"',
        ) from error
    except (ImportError, RuntimeError, AttributeError) as error:
        raise SetupError(
            f"{package} is installed but cannot be imported", str(error).splitlines()[0], "see `omgoptim doctor`"
        ) from error


_BUILDERS = {
    "pt2": lambda recipe: open_pt2(Path(recipe.spec)),
    "hf": _build_hf,
    "timm": _build_timm,
    "torchvision": _build_torchvision,
}


def default_inputs(recipe: Recipe | None, module: nn.Module | None) -> Sequence[str]:
    """Return the input shapes that a well-known source implies, or none."""
    if recipe is None or module is None:
        return []
    if recipe.kind == "timm":
        channels, height, width = getattr(module, "default_cfg", {}).get("input_size", (3, 224, 224))
        return [f"1x{channels}x{height}x{width}"]
    if recipe.kind == "torchvision":
        return ["1x3x224x224"]
    if recipe.kind == "hf" and getattr(module, "main_input_name", "") == "input_ids":
        length = min(128, getattr(module.config, "max_position_embeddings", None) or 128)
        return [f"{name}:int64:1x{length}" for name in ("input_ids", "attention_mask")]
    return []

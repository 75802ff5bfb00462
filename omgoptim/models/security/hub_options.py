"""Validation of options for model libraries (transformers, timm, torchvision): nothing that runs code.

Their loaders take options, and read options out of a folder's own files, that import a repository's Python, fetch
kernels, open pickles or follow paths out of the folder. All of these are refused unless the request allows them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omgoptim.errors import ModelError
from omgoptim.models.security.file_integrity import read_regular_file

REMOTE_CODE_VARIABLE = "OMGOPTIM_REMOTE_CODE_GRANTED"
"""Set in the environment of a run that may run a repository's code, so that its measuring processes may too."""

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations of transformers that need no download of kernels."""
SAFE_VALUES: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False, None),
    "weights_only": (True,),
    "use_safetensors": (True, None),
    "attn_implementation": ATTENTION,
    "_attn_implementation": ATTENTION,
    "experts_implementation": ("eager", "grouped_mm", "batched_mm"),
    "_experts_implementation": ("eager", "grouped_mm", "batched_mm"),
    "use_kernels": (False, None),
    "allow_all_kernels": (False, None),
}
"""Options that have values that are safe."""
UNSAFE_OPTIONS = frozenset(
    {
        *("code_revision", "custom_generate", "custom_pipelines", "auto_map", "kernel_config", "quantization_config"),
        *("gguf_file", "adapter_kwargs", "adapter_name", "_adapter_model_path", "transformers_weights", "state_dict"),
        *("config", "generation_config", "key_mapping", "cache_dir", "offload_folder", "proxies", "tqdm_class"),
        *("device_map", "distributed_config", "fusion_config", "tp_plan", "architectures", "_from_pipeline"),
        *("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "custom_load", "pretrained_custom_load"),
        *("backbone_kwargs", "use_timm_backbone", "base_model_name_or_path", "_name_or_path", "name_or_path"),
    }
)
"""Options that run code, open pickles, or name files and repositories besides the model's own."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
"""Repository ids of the Hugging Face hub."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")
"""Model names of timm and torchvision."""
BRANCH = re.compile(r"[\w\-]+([./][\w\-]+)*")
"""Names of branches, tags and commits."""
REMOTE_CODE_FIX = "if you trust the repository's authors to run code on this machine: --allow-remote-code in the shell"
MAX_JSON_BYTES = 2**28
"""Limit of a JSON file in a model's folder: 256 MiB, since tokenizers are large."""
UNSAFE_CONFIG_KEYS = (
    "auto_map",
    "custom_pipelines",
    "quantization_config",
    "transformers_weights",
    "gguf_file",
    "kernel_config",
)
"""Options that a folder's own config.json may not give."""
FORWARDED_OPTIONS = ("model_args", "backbone_kwargs")
"""Entries of a config.json whose content becomes options of timm, which opens a checkpoint_path as a pickle."""


def allow_remote_code(allowed: bool) -> None:
    """Set whether this run, and the processes it starts, may run a repository's code."""
    if allowed:
        os.environ[REMOTE_CODE_VARIABLE] = "1"
    else:
        os.environ.pop(REMOTE_CODE_VARIABLE, None)


def is_remote_code_allowed() -> bool:
    """Return whether the request of this run allowed a repository's code."""
    return os.environ.get(REMOTE_CODE_VARIABLE) == "1"


def check_options(kind: str, spec: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse a name or an option of a model library that would run code.

    Args:
        kind: hf, timm or torchvision.
        spec: the model's name there; for hf also a folder, which `check_folder` checks.
        kwargs: options that the user gives to the library's loader.

    Raises:
        ModelError: it would, and the request did not allow it.
    """
    if is_remote_code_allowed():
        return
    pattern = REPOSITORY if kind == "hf" else NAME
    if not pattern.fullmatch(spec) and not (kind == "hf" and Path(spec).is_dir()):
        raise ModelError(
            f"{kind}:{spec[:200]} is not a model name of {kind}",
            "a name has only letters, digits, dots and underscores; anything else could refer to files or code",
            f"for a repository or folder use hf:ID or hf:FOLDER; {REMOTE_CODE_FIX}"
            if kind != "hf"
            else "use hf:ID or hf:FOLDER",
        )
    for path, value in _walk(kwargs, ()):
        option = path[-1]
        if option in SAFE_VALUES and value in SAFE_VALUES[option]:
            continue
        if option in SAFE_VALUES or option in UNSAFE_OPTIONS:
            allowed = [str(value) for value in SAFE_VALUES.get(option, ()) if value is not None]
            raise _refused(f"the option {option}={str(value)[:80]!r}", "it can run code or open a pickle", allowed)
        branch = option == "revision" and isinstance(value, str) and BRANCH.fullmatch(value) and ".." not in value
        if isinstance(value, str) and option != "token" and not branch and _is_place(value):
            raise _refused(f"the option {option}={value[:80]!r}", "it refers to another file or repository", [])


def check_folder(folder: Path, subfolder: str | None = None) -> None:
    """Refuse a model's folder whose files name code, pickled objects or places outside it.

    Args:
        folder: a model's folder in the layout of transformers.
        subfolder: the folder in it that the files are read from, if not from itself.

    Raises:
        ModelError: they do, and the request did not allow it; or a file is a link out of the folder.
    """
    root = folder.resolve()
    places = [root, root / subfolder] if subfolder else [root]
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            _refuse_link(path, root)
            if path.name.endswith(".index.json"):
                _check_index(path)
    if is_remote_code_allowed():
        return
    for place in places:
        if (place / "adapter_config.json").exists():
            raise _refused(
                f"the adapter in folder {folder.name}",
                "its adapter_config.json can refer to a model anywhere",
                [],
                "merge it into its base model with PeftModel.merge_and_unload() and save_pretrained(); ",
            )
        config = _json(place / "config.json")
        check_config(config, folder.name)
        for keys, value in _walk(config, ()):
            key = keys[-1]
            if (key in UNSAFE_CONFIG_KEYS and value) or (key in SAFE_VALUES and value not in (*SAFE_VALUES[key], None)):
                what = f"'{key}' in the config.json of folder {folder.name}"
                raise _refused(what, f"it is {str(value)[:80]!r}: code or a file to load", [])


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse a model's config that passes options to another library which open files.

    Raises:
        ModelError: it does, and the request did not allow it.
    """
    if is_remote_code_allowed():
        return
    for keys, value in _walk(config, ()):
        forwarded = any(key in FORWARDED_OPTIONS for key in keys[:-1])
        opens = keys[-1] in UNSAFE_OPTIONS and bool(value)
        is_outside = isinstance(value, str) and (":" in value or value.startswith(("/", "~", ".")) or ".." in value)
        if (forwarded and (opens or is_outside)) or (keys[-1] in ("architecture", "backbone") and is_outside):
            what = f"'{keys[-1]}' in the config of {name[:200]}"
            raise _refused(what, f"it is {str(value)[:80]!r}: code or a file to load", [])


def _refuse_link(path: Path, root: Path) -> None:
    """Refuse a file that is a link out of the model's folder or, in the hub's cache, out of the repository's."""
    cached = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    home = root.parent.parent if cached else root
    if path.is_symlink() and not path.is_dir() and not path.resolve().is_relative_to(home):
        raise ModelError(
            f"folder {root.name} is not opened: {path.name} links outside it",
            f"it links to {path.resolve()}",
            "copy the file into the folder",
        )


def _check_index(path: Path) -> None:
    places = _json(path).get("weight_map")
    if not isinstance(places, dict):
        raise ModelError(f"{path.name} cannot be read", "it has no weight_map", "save the model again")
    for place in {str(place) for place in places.values()}:
        if _is_place(place) or not (path.parent / place).resolve().is_relative_to(path.parent.resolve()):
            raise ModelError(
                f"{path.name} refers to a file outside its folder", f"it is {place[:200]!r}", "save the model again"
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(read_regular_file(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} cannot be read", f"{type(error).__name__}: {error}") from error
    if not isinstance(read, dict):
        raise ModelError(f"{path.name} cannot be read", f"it contains a {type(read).__name__}")
    return read


def _walk(value: Any, start: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value in nested dictionaries and lists, containers too, with the keys that lead to it."""
    pending = [(start, value)]
    while pending:
        path, item = pending.pop()
        if path:
            yield path, item
        if isinstance(item, Mapping):
            pending += [((*path, str(key)), inner) for key, inner in item.items()]
        elif isinstance(item, (list, tuple)):
            pending += [(path, inner) for inner in item]


def _is_place(text: str) -> bool:
    """Return whether a text can be a path, an address or the name of a repository."""
    return "/" in text or "\\" in text or ".." in text or text.startswith(("~", "."))


def _refused(what: str, why: str, allowed: list[str], first: str = "") -> ModelError:
    values = f"allowed: {', '.join(allowed)}; " if allowed else ""
    return ModelError(f"{what} is refused", why, f"{first}{values}omit it; {REMOTE_CODE_FIX}")

"""Restriction of `file.py:callable` and `package.module:callable` to the user's own code. No torch unless loaded.

Accepted are functions, classes and objects defined in the project's own files (or in a folder or module that the
request allows), and the layers of `torch.nn`. Every other target of a name is refused, without an import where that
is refused: `os:system`, `torch:load`, a project file's own imports of such (`net.py:system`, `net.py:np.load`). An
installed class may be an nn.Module and still unpickle the file that an argument names, so being a module is not enough.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import inspect
import sys
from types import FunctionType, MethodType, ModuleType
from typing import Any

from omgoptim.errors import RequestError, argument
from omgoptim.models.security.path_policy import PathPolicy

LAYERS = ("torch.nn", "torch.nn.modules")
"""Packages whose layer classes may be named as a model or a loss: their arguments are numbers."""

MAX_WRAPPERS = 8
"""Depth of decorators that are unwrapped."""


def refuse_foreign_module(place: str, name: str, policy: PathPolicy, spec: str, what: str) -> None:
    """Refuse a module that is neither of the project nor allowed, before anything of it is imported.

    Args:
        place: the module whose location is checked: first the top package of `name`, then, if its parents belong to
            the project, `name` itself.
        name: the module that was named.
        policy: the project, and the files and modules that the request allows.
        spec: the whole source or option, for the error.
        what: its role, for the error: `the model`.

    Raises:
        RequestError: it belongs to Python or to an installed package.
    """
    if policy.allows_module(name) or name in LAYERS:
        return
    found = _spec_of(place)
    if found is not None and not _of_project(found, policy):  # the import reports what is missing
        raise foreign_code(spec, what, f"'{place}' is an installed module", name)


def resolve_attribute(holder: Any, part: str, module: ModuleType, spec: str, what: str) -> Any:
    """Resolve one step of a dotted name: only in the named module, its classes and its objects.

    Raises:
        RequestError: the step is in another module, or an internal attribute of Python.
        AttributeError: there is no such attribute.
    """
    if part.startswith("__"):
        raise foreign_code(spec, what, f"'{part}' is an internal attribute of Python", "")
    if isinstance(holder, ModuleType) and holder is not module:
        raise foreign_code(spec, what, f"the name is in the module '{holder.__name__}'", holder.__name__)
    return getattr(holder, part)


def refuse_foreign_object(found: Any, module: ModuleType, policy: PathPolicy, spec: str, what: str) -> None:
    """Refuse a callable that was imported into the module it is named in.

    Raises:
        RequestError: neither it nor the function it wraps is defined in the project or an allowed module.
    """
    if not callable(found):  # the caller reports it
        return
    own = policy.holds_code(getattr(module, "__file__", None)) or policy.allows_module(module.__name__)
    if own and _is_torch_module(found):  # an object that the project made
        return
    if _is_allowed(found, policy, MAX_WRAPPERS):
        return
    place = getattr(found, "__module__", None) or type(found).__module__
    raise foreign_code(spec, what, f"it is defined in '{place}', not in the project", str(place))


def _is_allowed(found: Any, policy: PathPolicy, depth: int) -> bool:
    """Return whether the code behind a callable is defined in the project or in an allowed module."""
    if depth == 0:
        return False
    wrapped = inspect.getattr_static(found, "__wrapped__", None)
    if isinstance(found, functools.partial):
        return _is_allowed(found.func, policy, depth - 1)
    if isinstance(found, MethodType):
        return _is_allowed(found.__func__, policy, depth - 1)
    if isinstance(found, type):
        return _is_own_class(found, policy) or _is_layer(found)
    if wrapped is not None:  # functools.wraps, functools.cache, torch.no_grad
        return _is_allowed(wrapped, policy, depth - 1)
    if isinstance(found, FunctionType):
        file = found.__globals__.get("__file__") or found.__code__.co_filename
        return policy.holds_code(file) or policy.allows_module(found.__module__)
    if inspect.isbuiltin(found) or inspect.isroutine(found):
        return policy.allows_module(found.__module__)
    return _is_own_class(type(found), policy)


def _is_own_class(kind: type, policy: PathPolicy) -> bool:
    if policy.allows_module(kind.__module__):
        return True
    module = sys.modules.get(kind.__module__)
    return policy.holds_code(getattr(module, "__file__", None))


def _is_layer(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.") and sys.modules.get("torch") is not None


def _is_torch_module(found: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(found, torch.nn.Module)


def _spec_of(name: str) -> importlib.machinery.ModuleSpec | None:
    """Find the spec of a module, importing its parents but not itself; None if there is none."""
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    except ValueError:  # a loaded module without a spec, such as __main__
        return importlib.machinery.ModuleSpec(name, None)


def _of_project(found: importlib.machinery.ModuleSpec, policy: PathPolicy) -> bool:
    if found.origin is not None and found.has_location:
        return policy.holds_code(found.origin)
    places = list(found.submodule_search_locations or [])  # a folder without __init__.py
    return bool(places) and all(policy.holds_code(f"{place}/__init__.py") for place in places)


def foreign_code(spec: str, what: str, why: str, module: str) -> RequestError:
    """Return the error for a name that leads to code outside the project.

    Args:
        spec: the whole source or option.
        what: its role: `the model`.
        why: where the name leads.
        module: the module that would have to be allowed; empty if that would not help.
    """
    allow = (
        f", or allow the module with {argument('allow_module', [module])}" if module and module != "builtins" else ""
    )
    return RequestError(
        f"{what} '{spec[:200]}' is not code of the project",
        f"{why[:300]}; only what the project's own files define is run",
        f"write a function in a file of yours that calls it, and name that{allow} (OMGOPTIM_ALLOW_MODULE for a server)",
    )

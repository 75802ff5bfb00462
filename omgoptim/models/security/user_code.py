"""The user's code: which is allowed, its import, and its calls with a time limit. No torch unless loaded.

Allowed are functions, classes and objects defined in the project's own files (or in a folder or module that the
request allows), and the layers of `torch.nn`. Every other target of a name is refused, without an import where that
is refused: `os:system`, `torch:load`, a project file's own imports of such (`net.py:system`, `net.py:np.load`). An
installed class may be an nn.Module and still unpickle the file that an argument names, so being a module is not enough.

Failures become errors: the user's traceback goes to the run's log, its last line into the error. `sys.exit`, a missing
package and a timeout have errors of their own. Printed output goes to the log.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

from omgoptim.bootstrap import USER_PATH
from omgoptim.errors import ModelError, OmgoptimError, RequestError, SetupError, UserCodeError, argument, did_you_mean
from omgoptim.models.security.path_policy import PathPolicy, error_about

Result = TypeVar("Result")

DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
    "pytorch_lightning": "pytorch-lightning",
}
"""Import names whose package on the index is called something else."""

LAYERS = ("torch.nn", "torch.nn.modules")
"""Packages whose layer classes may be named as a model or a loss: their arguments are numbers."""

MAX_WRAPPERS = 8
"""Depth of decorators that are unwrapped. Chosen: a safeguard against cycles."""


class _UserCodeTimeout(BaseException):
    """Timeout in user code; a BaseException, so that no `except Exception` of theirs catches it."""


def load_callable(spec: str, policy: PathPolicy, what: str, limit_s: float) -> Any:
    """Import the object that `file.py:name` or `package.module:name` names, the project on the import path.

    Raises:
        RequestError: it is not code of the project, nor of a folder or module that the request allows.
        ModelError, DataError: no such file, module or name.
        UserCodeError, SetupError: importing it failed.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.replace(".", "").isidentifier():
        raise error_about(what)(
            f"{what} '{spec}' is not a callable", "the form is file.py:callable or package.module:callable"
        )
    module = call_user(f"importing {source}", limit_s, _import_source, source, policy, spec, what)
    found: Any = module
    for part in name.split("."):
        try:
            found = resolve_attribute(found, part, module, spec, what)
        except AttributeError:
            names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise error_about(what)(f"{source} has no '{name}'", did_you_mean(name, names)) from None
    refuse_foreign_object(found, module, policy, spec, what)
    return found


def call_user(doing: str, limit_s: float, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call the user's code with a time limit.

    Args:
        doing: the action, for the error: "calling build".
        limit_s: time limit in seconds (on the main thread of a POSIX system).
        function: the user's callable.
        *args: passed on.
        **kwargs: passed on.

    Raises:
        SetupError: a package that the code imports is not installed; the fix installs it.
        UserCodeError: the code raised, called `sys.exit` or exceeded the time limit.
    """
    try:
        with _time_limit(limit_s):
            return function(*args, **kwargs)
    except OmgoptimError:
        raise
    except ModuleNotFoundError as error:
        traceback.print_exc()
        package = (error.name or "").partition(".")[0]
        if not package or _is_project_module(package):
            raise _raised(doing, error) from error
        raise SetupError(
            f"{doing} needs the package '{package}', which this Python does not have",
            f"the run used Python {sys.executable}",
            f"{sys.executable} -m pip install {DISTRIBUTIONS.get(package, package)}",
        ) from error
    except _UserCodeTimeout:
        traceback.print_exc()
        raise UserCodeError(
            f"{doing} did not return within {limit_s:g} s",
            "the run's log shows where it was running",
            f"make it faster, or raise the limit with {argument('time_limit_s', 3600)}",
        ) from None
    except SystemExit as error:
        traceback.print_exc()
        raise UserCodeError(
            f"{doing} called sys.exit({error.code!r})",
            "importing or calling it ends the process",
            "move command-line code under if __name__ == '__main__':",
        ) from error
    except Exception as error:
        traceback.print_exc()
        raise _raised(doing, error) from error


def require_arguments(name: str, target: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise a ModelError where the callable needs other arguments than `model_kwargs` gives."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # one that does not state its arguments
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise ModelError(
            f"{name} cannot be called with these arguments",
            f"it takes {name}{signature}: {error}",
            f"give its arguments by name, for instance {argument('model_kwargs', {'width': 64})}, or give a function "
            "without arguments",
        ) from error


def _raised(doing: str, error: BaseException) -> UserCodeError:
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):  # raised by the importer, about the user's file
        frames.append((error.filename or "", error.lineno))
    where = f" ({frames[-1][0]}:{frames[-1][1]})" if frames else ""
    lines = traceback.format_exception_only(error)  # a syntax error's lines before its message; else notes after it
    last = (lines[-1] if isinstance(error, SyntaxError) else " ".join(lines)).strip()
    return UserCodeError(f"{doing} raised an error", f"{last}{where}", "the run's log has the whole traceback")


def _import_source(source: str, policy: PathPolicy, spec: str, what: str) -> ModuleType:
    for folder in (*reversed(os.environ.get(USER_PATH, "").split(os.pathsep)), str(policy.project)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    if not source.endswith(".py"):
        refuse_foreign_module(source.partition(".")[0], source, policy, spec, what)
        _require_module(source, what)  # imports the packages above it, which are the project's
        refuse_foreign_module(source, source, policy, spec, what)
        return importlib.import_module(source)
    path = policy.file(source, what)
    if not policy.holds_code(str(path)):
        raise foreign_code(spec, what, f"{path} belongs to an installed package", "")
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path:
        return known
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python file.py` does
    name = path.stem if known is None else f"_omgoptim_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise error_about(what)(f"{what} '{source}' is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _require_module(source: str, what: str) -> None:
    try:
        spec = importlib.util.find_spec(source)
    except ModuleNotFoundError as error:
        if error.name is None or not source.startswith(error.name):
            raise
        spec = None
    if spec is None:
        raise error_about(what)(
            f"{what}: there is no module '{source}'",
            "it is neither in the project nor installed in the Python that runs the model",
            "give a file with its extension: path/to/file.py:callable",
        )


def _is_project_module(package: str) -> bool:
    return any((Path(folder) / package).exists() or (Path(folder) / f"{package}.py").exists() for folder in sys.path)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signum: int, _frame: FrameType | None) -> None:
        raise _UserCodeTimeout

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refuse_foreign_module(package: str, name: str, policy: PathPolicy, spec: str, what: str) -> None:
    """Refuse a module that is neither of the project nor allowed, before anything of it is imported.

    Args:
        package: the module whose location is checked: first the top package of `name`, then, if its parents belong to
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
    module_spec = _spec_of(package)
    if module_spec is not None and not _of_project(module_spec, policy):  # the import reports what is missing
        raise foreign_code(spec, what, f"'{package}' is an installed module", name)


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


def refuse_foreign_object(target: Any, module: ModuleType, policy: PathPolicy, spec: str, what: str) -> None:
    """Refuse a callable that was imported into the module it is named in.

    Raises:
        RequestError: neither it nor the function it wraps is defined in the project or an allowed module.
    """
    if not callable(target):  # the caller reports it
        return
    own_module = policy.holds_code(getattr(module, "__file__", None)) or policy.allows_module(module.__name__)
    if own_module and _is_torch_module(target):  # an object that the project made
        return
    if _is_allowed(target, policy, MAX_WRAPPERS):
        return
    defined_in = getattr(target, "__module__", None) or type(target).__module__
    raise foreign_code(spec, what, f"it is defined in '{defined_in}', not in the project", str(defined_in))


def _is_allowed(target: Any, policy: PathPolicy, depth: int) -> bool:
    """Return whether the code behind a callable is defined in the project or in an allowed module."""
    if depth == 0:
        return False
    wrapped = inspect.getattr_static(target, "__wrapped__", None)
    if isinstance(target, functools.partial):
        return _is_allowed(target.func, policy, depth - 1)
    if isinstance(target, MethodType):
        return _is_allowed(target.__func__, policy, depth - 1)
    if isinstance(target, type):
        return _is_own_class(target, policy) or _is_layer(target)
    if wrapped is not None:  # functools.wraps, functools.cache, torch.no_grad
        return _is_allowed(wrapped, policy, depth - 1)
    if isinstance(target, FunctionType):
        file = target.__globals__.get("__file__") or target.__code__.co_filename
        return policy.holds_code(file) or policy.allows_module(target.__module__)
    if inspect.isbuiltin(target) or inspect.isroutine(target):
        return policy.allows_module(target.__module__)
    return _is_own_class(type(target), policy)


def _is_own_class(kind: type, policy: PathPolicy) -> bool:
    if policy.allows_module(kind.__module__):
        return True
    module = sys.modules.get(kind.__module__)
    return policy.holds_code(getattr(module, "__file__", None))


def _is_layer(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.") and sys.modules.get("torch") is not None


def _is_torch_module(target: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(target, torch.nn.Module)


def _spec_of(name: str) -> importlib.machinery.ModuleSpec | None:
    """Find the spec of a module, importing its parents but not itself; None if there is none."""
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    except ValueError:  # a loaded module without a spec, such as __main__
        return importlib.machinery.ModuleSpec(name, None)


def _of_project(module_spec: importlib.machinery.ModuleSpec, policy: PathPolicy) -> bool:
    if module_spec.origin is not None and module_spec.has_location:
        return policy.holds_code(module_spec.origin)
    places = list(module_spec.submodule_search_locations or [])  # a folder without __init__.py
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
        f"{why[:300]}; only code that the project's files define is run",
        f"call it in a function of the project, and give that function{allow} (OMGOPTIM_ALLOW_MODULE for a server)",
    )

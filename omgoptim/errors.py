"""Errors, with the text that a person or an agent reads.

OmgoptimError            what happened, why, and what to do next
├── RequestError         the request itself: unknown name, bound broken, path outside the project     exit 2
├── SetupError           the Python that would do the work lacks something                             exit 3
├── ModelError           the model, its checkpoint or its inputs                                       exit 3
│   └── UnknownModelError  a model is named that does not exist; crosses processes as a ModelError
├── DataError            the data or the metric                                                        exit 3
├── UserCodeError        the user's own code raised, exited or hung                                    exit 3
├── TechniqueError       a technique or an engine could not take the model                             exit 3
├── ArtifactError        an artifact is damaged or does not give what it was saved with                exit 3
└── RunError             a run that is gone, was cancelled or whose worker died                        exit 3

Every error crosses process boundaries as `to_dict()` and comes back with `from_dict()`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from omgoptim.text import clean, clean_block, clean_exact


class OmgoptimError(Exception):
    """An error that says what happened, why, and what to do next.

    Args:
        what: one sentence, what failed.
        why: the cause, with what was received; may be empty.
        fix: what to do next, ready to run where possible; may be empty.
        log: the last lines of a log that show it; may be empty.

    Example:
        >>> from omgoptim import OmgoptimError
        >>> print(OmgoptimError("no data", "metric top1 needs labels", "give data"))
        no data
        Why: metric top1 needs labels
        Fix: give data

    Each is one clean, bounded line (`omgoptim.text`), so that a name or message of a model cannot add a line to it;
    only `log` has several.
    """

    exit_code = 3

    def __init__(self, what: str, why: str = "", fix: str = "", log: str = "") -> None:
        self.what, self.why, self.fix, self.log = clean(what), clean(why), clean_exact(fix), clean_block(log)
        super().__init__(self.what)

    def __str__(self) -> str:
        parts = [self.what]
        if self.why:
            parts.append(f"Why: {self.why}")
        if self.fix:
            parts.append(f"Fix: {self.fix}")
        parts += [f"  | {line}" for line in self.log.splitlines()]
        return "\n".join(parts)

    def to_dict(self) -> dict[str, str]:
        """Return the error as plain strings, for a report or a state file."""
        record = {"kind": self.kind, "what": self.what, "why": self.why, "fix": self.fix}
        return record | ({"log": self.log} if self.log else {})

    @property
    def reason(self) -> str:
        """`what: why` on one line; `what` alone without a cause."""
        return f"{self.what}: {self.why}" if self.why else self.what

    @property
    def kind(self) -> str:
        """Name of the kind in the tree above; a subclass of a kind is of that kind."""
        return next((each.__name__ for each in type(self).__mro__ if OmgoptimError in each.__bases__), "OmgoptimError")

    @staticmethod
    def from_dict(record: dict[str, str]) -> OmgoptimError:
        """Create the error of a record that `to_dict` wrote; an unknown kind becomes an OmgoptimError."""
        kinds = {kind.__name__: kind for kind in OmgoptimError.__subclasses__()}
        kind = kinds.get(record.get("kind", ""), OmgoptimError)
        return kind(record.get("what", ""), record.get("why", ""), record.get("fix", ""), record.get("log", ""))


class RequestError(OmgoptimError):
    """The request is wrong; nothing was started."""

    exit_code = 2


class SetupError(OmgoptimError):
    """The Python that would do the work lacks a package, an engine or a device."""


class ModelError(OmgoptimError):
    """The model source, its checkpoint or its inputs do not work."""


class UnknownModelError(ModelError):
    """The model source names nothing that exists."""


class DataError(OmgoptimError):
    """The data or the metric does not work."""


class UserCodeError(OmgoptimError):
    """The user's own code raised, exited or timed out."""


class TechniqueError(OmgoptimError):
    """A technique or an engine does not support this model."""


class NoLayerChanged(TechniqueError):
    """A technique would change no layer of this model.

    Args:
        schemes: quantization schemes that would change something, the best first.
    """

    def __init__(self, what: str, why: str = "", fix: str = "", log: str = "", schemes: Iterable[str] = ()) -> None:
        super().__init__(what, why, fix, log)
        self.schemes = tuple(schemes)

    def to_dict(self) -> dict[str, str]:
        """Return the error as a TechniqueError, the kind that callers know."""
        return super().to_dict() | {"kind": TechniqueError.__name__}


class ArtifactError(OmgoptimError):
    """An artifact is damaged, or its outputs differ from those recorded when it was saved."""


class RunError(OmgoptimError):
    """A run is unknown, was cancelled, or its worker died."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that lists the known names, the nearest one first."""
    options = sorted(known)
    near = difflib.get_close_matches(name[:100], options, n=1, cutoff=0.6)
    listed = f"Known: {', '.join(options)}." if options else ""
    return f"Did you mean '{near[0]}'? {listed}" if near else listed


def argument(name: str, value: object) -> str:
    """Return an argument with its value for the text of an error, as Python writes it: `` `data='file.py:load'` ``.

    The shell shows it as an option: see `omgoptim.requests.command.in_shell`.
    """
    return f"`{name}={value!r}`"


def call(verb: str, arguments: dict[str, object]) -> str:
    """Return a call for the text of an error, as Python writes it: `` `omgoptim.quantize(model='net.py:build')` ``.

    The shell shows it as a command, as it does an `argument`.
    """
    return f"`omgoptim.{verb}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})`"

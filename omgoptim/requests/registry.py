"""Registry of the verbs: request, title in the tool list, and operation.

A new verb is a line here, its request, its operation, its function in `omgoptim.api` and its command page.
"""

from __future__ import annotations

from dataclasses import dataclass

from omgoptim.requests.base import ModelRequest, Request
from omgoptim.requests.distill import DistillRequest
from omgoptim.requests.factorize import FactorizeRequest
from omgoptim.requests.measure import CompareRequest, ProfileRequest
from omgoptim.requests.optimize import OptimizeRequest, SearchRequest
from omgoptim.requests.prune import PruneRequest
from omgoptim.requests.quantize import QuantizeRequest
from omgoptim.requests.runs import DoctorRequest, RunsRequest


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb that starts a run.

    Args:
        request: its arguments.
        title: its name in a list of tools.
        operation: `package.module:function` that does it, imported when a run starts.
    """

    request: type[Request]
    title: str
    operation: str

    @property
    def on_model(self) -> bool:
        """True if the operation takes a model, and so also a live module."""
        return issubclass(self.request, ModelRequest)


@dataclass(frozen=True, slots=True)
class Query:
    """A verb that answers without a run."""

    request: type[Request]
    title: str


REGISTRY: dict[str, Verb] = {
    "profile": Verb(ProfileRequest, "Profile a model", "omgoptim.operations.profile:profile"),
    "quantize": Verb(QuantizeRequest, "Quantize a model", "omgoptim.operations.quantize:quantize"),
    "prune": Verb(PruneRequest, "Prune a model", "omgoptim.operations.prune:prune"),
    "factorize": Verb(FactorizeRequest, "Factorize a model", "omgoptim.operations.factorize:factorize"),
    "distill": Verb(DistillRequest, "Distill a model into a smaller one", "omgoptim.operations.distill:distill"),
    "compare": Verb(CompareRequest, "Compare two artifacts", "omgoptim.operations.compare:compare"),
    "optimize": Verb(OptimizeRequest, "Reach a goal by a chain of steps", "omgoptim.operations.optimize:optimize"),
    "search": Verb(SearchRequest, "Search architectures", "omgoptim.operations.search:search"),
}
"""Verbs that start a run, in the order of the tool list."""

QUERY_REGISTRY: dict[str, Query] = {
    "runs": Query(RunsRequest, "Manage runs"),
    "doctor": Query(DoctorRequest, "Check the set-up"),
}
"""Verbs that answer without a run, in the order of the tool list."""

VERBS: dict[str, type[Request]] = {name: verb.request for name, verb in REGISTRY.items()}
"""Requests of the verbs that start a run."""

QUERIES: dict[str, type[Request]] = {name: query.request for name, query in QUERY_REGISTRY.items()}
"""Requests of the verbs that answer without a run."""

TITLES: dict[str, str] = {
    **{name: verb.title for name, verb in REGISTRY.items()},
    **{name: query.title for name, query in QUERY_REGISTRY.items()},
}
"""Titles of all verbs in a list of tools."""


def verb_of(request: Request) -> str:
    """Return the verb of a request that starts a run."""
    return next(name for name, kind in VERBS.items() if kind is type(request))

"""Search space: a user's function of a trial, or variants of the model's stages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from omgoptim.architecture_search.auto import auto_space
from omgoptim.architecture_search.define_by_run import PROBE_CALLS, DrawnTrial, build, module_of, probe_space
from omgoptim.architecture_search.space import Configuration, Space
from omgoptim.errors import OmgoptimError, RequestError, UserCodeError, argument
from omgoptim.measure.size import count_params
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.security.user_code import call_user, load_callable
from omgoptim.operations.compression_job import Job
from omgoptim.operations.loaded_model import Live
from omgoptim.requests import SearchRequest

AUTO = "auto"

TIMING_FIT_SAMPLES, TRAINING_FIT_SAMPLES = 16, 128
"""Samples that weights are fitted to: of a network that is only timed, and of one that is trained afterwards. Chosen:
the weights do not change the time."""

SpaceFunction = Callable[[Any], Any]
"""`space(trial)`."""


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Search space, and the function that builds its networks."""

    build: Callable[[Configuration], nn.Module]
    product: Space | None
    """The product of knobs; None for a conditional or continuous space."""
    parameters: Callable[[Any], Configuration] | None
    """Asks an Optuna trial for all that the space varies; None for `auto`."""
    notes: tuple[str, ...] = ()
    function: SpaceFunction | None = None
    """The user's function; None for `auto`."""
    without_model: bool = False
    """True without a model: the largest network of the space is the reference, and is trained first."""
    build_for_timing: Callable[[Configuration], nn.Module] | None = None
    """Builds a network to be timed only, its weights not fitted; None: as `build` does."""

    def build_to_time(self, configuration: Configuration) -> nn.Module:
        """Build a network to be timed only; its weights do not matter."""
        return (self.build_for_timing or self.build)(configuration)


def _space_function(request: SearchRequest, policy: PathPolicy, live: Live) -> SpaceFunction | None:
    """Return the user's space, its calls limited in time; None for `auto`.

    Raises:
        RequestError: it is not a function of a trial.
        OmgoptimError: it cannot be loaded.
    """
    if request.space == AUTO:
        return None
    name = request.space or request.model
    found = live.space or load_callable(name, policy, "space", request.time_limit_s)
    if not callable(found):
        raise RequestError(
            f"the search space '{name}' is not callable",
            f"it is a {type(found).__name__}",
            "name a function space(trial) that returns an nn.Module",
        )
    try:
        inspect.signature(found).bind(object())
    except TypeError:
        raise RequestError(
            f"the search space '{name}' takes no trial",
            "a search space is called as space(trial), once for each network",
            f"give {argument('space', AUTO)} to vary the model that it builds, or let it choose with "
            "trial.suggest_categorical",
        ) from None
    except ValueError:  # a callable without a signature
        pass
    function: Callable[[Any], Any] = found

    def limited(trial: Any) -> Any:
        return call_user(f"calling {name}", request.time_limit_s, function, trial)

    return limited


def user_space(request: SearchRequest, policy: PathPolicy, live: Live) -> tuple[SearchSpace | None, Live]:
    """Return the user's space, and the model, data and functions of a run on it; None for `auto`.

    Without a model, the largest of a few networks of the space is the reference.

    Raises:
        RequestError: the space is not a function of a trial.
        OmgoptimError: it cannot be loaded, or gives no network.
    """
    function = _space_function(request, policy, live)
    if function is None:
        return None, live
    search_space = _probed(function, request.seed)
    if request.space is not None or live.module is not None:
        return search_space, live
    largest = max(sample_networks(search_space, request.seed), key=lambda module: count_params(module)[0])
    return replace(search_space, without_model=True), replace(live, module=largest)


def _probed(function: SpaceFunction, seed: int) -> SearchSpace:
    """Return the space of a user's function; each network begins with the same random state.

    Raises:
        UserCodeError: every call failed, or none requested a choice.
    """
    torch.manual_seed(seed)
    found = probe_space(function, seed)
    notes = []
    if found.reasons:
        notes.append(f"{len(found.reasons)} of {found.calls} first calls of the space failed: {found.reasons[0]}")

    def built(configuration: Configuration) -> nn.Module:
        torch.manual_seed(seed)
        return build(function, configuration).eval()

    def parameters(trial: Any) -> Configuration:
        try:
            module_of(function, trial)
        except UserCodeError:  # the trial's own build fails by the same reason, and keeps it
            return dict(trial.params)
        return dict(trial.params)

    return SearchSpace(built, found.space, parameters, tuple(notes), function)


def automatic_space(job: Job[SearchRequest], span: tuple[float, float]) -> SearchSpace:
    """Return the space of variants of the model's stages, with inherited weights.

    Raises:
        TechniqueError: nothing of the model can be varied.
    """
    run = job.module_run(span)
    for_timing, for_training = (
        replace(run, statistics=run.statistics.split(count)[0], progress=lambda *_: None)
        for count in (TIMING_FIT_SAMPLES, TRAINING_FIT_SAMPLES)
    )
    found = auto_space(job.original, for_timing, job.request.stages, run.progress)
    return SearchSpace(
        lambda configuration: found.build(configuration, for_training),
        found.space,
        None,
        build_for_timing=lambda configuration: found.build(configuration, for_timing),
    )


def sample_networks(search_space: SearchSpace, seed: int) -> list[nn.Module]:
    """Return a few networks of a space: drawn at random, and of a product the first and last options.

    Raises:
        OmgoptimError: none could be built.
    """
    assert search_space.function is not None  # an automatic space is not drawn from
    tried: list[Configuration] = []
    if search_space.product is not None:
        ends = [np.zeros(len(search_space.product.knobs), dtype=np.int64), np.array(search_space.product.counts) - 1]
        tried += [search_space.product.configuration(row) for row in ends]
    for number in range(PROBE_CALLS):
        trial = DrawnTrial(np.random.default_rng([seed, number]))
        try:
            module_of(search_space.function, trial)
        except UserCodeError:
            continue
        tried.append(dict(trial.params))
    found: list[nn.Module] = []
    failure: OmgoptimError | None = None
    for configuration in tried:
        try:
            found.append(search_space.build(configuration))
        except OmgoptimError as error:
            failure = error
    if not found:
        raise failure or UserCodeError("the search space gave no module")
    return found

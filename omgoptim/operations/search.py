"""search: networks of a space, measured before they are trained; the best that meets the targets is delivered."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from omgoptim.architecture_search.define_by_run import LOOKS
from omgoptim.architecture_search.propose import DEFAULT
from omgoptim.architecture_search.study import optuna_library
from omgoptim.errors import DataError, RequestError, TechniqueError, argument
from omgoptim.executors import Executor, executor_on
from omgoptim.measure.measuring_process import ProcessPool
from omgoptim.measure.size import count_params
from omgoptim.models.recipe import Recipe
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.operations.architecture_search.costs import Costs, Limits, costs_of
from omgoptim.operations.architecture_search.final import TrainedTrial, measured
from omgoptim.operations.architecture_search.predictions import FEWEST, Predictions, first_rows, measured_first
from omgoptim.operations.architecture_search.prior import quality_hints
from omgoptim.operations.architecture_search.report import plan_report, search_report
from omgoptim.operations.architecture_search.spaces import (
    Searched,
    automatic_space,
    drawn_networks,
    users_space,
)
from omgoptim.operations.architecture_search.tasks import load_workers
from omgoptim.operations.architecture_search.trials import (
    FINAL_SHARE,
    Found,
    Trials,
    remove_weights,
    search_both,
    train_reference,
)
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.compression_job import Job
from omgoptim.operations.context import RunContext
from omgoptim.operations.datasets import load_datasets
from omgoptim.operations.execution import pausing, refuse_unreachable, weights_hash
from omgoptim.operations.final_report import save_finalists
from omgoptim.operations.float_program import float_program
from omgoptim.operations.goal import Goal
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.operations.optimization.floors import measure_floors, refuse_below
from omgoptim.operations.output_folder import free_output, with_output
from omgoptim.operations.prepare import prepare
from omgoptim.operations.save_module import require_module, save
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import SearchRequest
from omgoptim.runtimes import ENGINES

FOLDER = "search"
"""Folder of a run with its study, its trials and the measurements before them."""

FAR_OVER = 1.5
"""Predicted cost of the lightest network over its limit above which the search is refused. Chosen: above the error of
the predictor, so that no reachable target is refused."""

FAR_OVER_SMALLEST = 4.0
"""Like `FAR_OVER`, for the smallest of a few sampled networks of a space that cannot be enumerated. Chosen: a few
samples can miss the smallest network."""


def search(request: SearchRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Search for an architecture. See `SearchRequest`."""
    began = time.monotonic()
    optuna_library()
    refuse_unreachable(request, live)
    output = free_output(request, context)
    live = live or Live()
    searched, live = users_space(request, PathPolicy.of_request(context.project, request), live)
    if request.control == "random" and searched is not None and searched.product is None:
        raise RequestError(
            "this space has no random control",
            "the space is conditional or continuous, and its networks cannot be listed",
            "leave control out",
        )
    loaded = prepare(request, context, live)
    original = require_module(loaded, "search")
    _refuse_without_data(loaded)
    floors, launch_s = measure_floors(loaded, context, request.runtime)
    refuse_below(Goal.of(request), floors)
    _refuse_short(request, searched, time.monotonic() - began, launch_s)
    datasets = load_datasets(request, loaded, original, live)
    job = Job(request, context, loaded, datasets, original, _engine(request, loaded, context))
    searched = searched or automatic_space(job, (0.06, 0.1))
    if request.plan:
        return plan_report(job, searched)
    with executor_on(request.on, request.workers, context.project, context.progress) as executor:
        if executor is not None:
            job = replace(job, context=pausing(context, executor))
            load_workers(executor, job, "" if searched.alone else weights_hash(original))
        report = _searched(job, searched, executor, began)
    return with_output(report, context.artifact, output)


def _searched(job: Job[SearchRequest], searched: Searched, executor: Executor | None, began: float) -> EfficiencyReport:
    """Search, measure the best, and save them."""
    request, context = job.request, job.context
    folder = context.folder / FOLDER
    folder.mkdir(exist_ok=True)
    if searched.alone:
        job = _with_trained_reference(job, searched, folder, began)
    recipe = Recipe("pt2", "") if searched.function is not None else None
    with ProcessPool() as pool:
        costs = costs_of(job, baseline_on(job.runtime, job.loaded, context), recipe, folder, pool)
        predictions = None
        if searched.product is not None:
            predictions = measured_first(searched.product, searched, costs, folder, request.trials)
            _refuse_too_slow(predictions)
        elif searched.function is not None:
            _refuse_all_too_slow(searched, costs, folder, request.seed)
        rule = replace(DEFAULT, hints=quality_hints(job, searched, folder))
        teacher = None if searched.alone else job.original
        trials = Trials(job, searched, costs, predictions, teacher, began, rule, executor)
        found, control = search_both(trials, folder)
    chosen = measured(job, costs.baseline, _entries(found, control))
    reports = {one.slug: search_report(trials, found, control, chosen, one) for one in chosen.finalists}
    report = save_finalists(chosen, reports)
    remove_weights(folder)
    return report


def _entries(found: Found, control: Found | None) -> list[TrainedTrial]:
    """Return the finals of the search, and the best one of the control."""
    entries = [
        TrainedTrial(f"trial {number}", number, found.artifacts[number], found.results[number].rungs[-1], True)
        for number in found.finals
    ]
    if control is not None:
        number = control.finals[0]
        quality = control.results[number].rungs[-1]
        entries.append(TrainedTrial(f"random trial {number}", number, control.artifacts[number], quality, False))
    return entries


def _with_trained_reference(
    job: Job[SearchRequest], searched: Searched, folder: Path, began: float
) -> Job[SearchRequest]:
    """Return the job with the largest network trained, and saved in place of the untrained one."""
    unlimited = Costs(job, job.loaded.baseline, 1.0, Limits(None, None, None), None)
    reference = train_reference(Trials(job, searched, unlimited, None, None, began), job.original, folder)
    loaded = replace(job.loaded, module=reference)
    shutil.rmtree(loaded.baseline)
    save(reference, replace(loaded, recipe=Recipe("pt2", "")), "torch_eager", loaded.baseline, job.context)
    evaluator = replace(job.datasets.evaluator, original=job.datasets.evaluator.score(reference))
    return replace(job, loaded=loaded, original=reference, datasets=replace(job.datasets, evaluator=evaluator))


def _engine(request: SearchRequest, loaded: LoadedModel, context: RunContext) -> str:
    """Return the requested engine; for `auto` onnxruntime, where the model can be exported for it."""
    if request.runtime != "auto":
        if request.precision == "int8" and ENGINES[request.runtime].runs == "module":
            raise RequestError(
                f"runtime {request.runtime} does not run statically quantized networks",
                "precision int8 measures every network after static quantization, which gives a program",
                "give runtime onnxruntime or openvino, or leave precision out",
            )
        return request.runtime
    if not ENGINES["onnxruntime"].missing(loaded.device) and float_program(loaded, context).path is not None:
        return "onnxruntime"
    if request.precision == "int8":
        raise RequestError(
            "the model cannot be searched in int8",
            "it cannot be exported, and static quantization works on exported programs",
            "leave precision out",
        )
    return "torch_eager"


def _refuse_short(request: SearchRequest, searched: Searched | None, elapsed_s: float, launch_s: float) -> None:
    """Refuse a budget that is over before the first trial: preparation, and one launch per network measured first.

    Raises:
        RequestError: with the budget that it needs at least.
    """
    space = None if searched is None else searched.product
    first = FEWEST if space is None else len(first_rows(space, request.seed, request.trials))
    needed_s = elapsed_s + first * launch_s
    if request.budget_minutes is not None and 60 * request.budget_minutes < needed_s / (1 - FINAL_SHARE):
        minutes = math.ceil(20 * needed_s / (1 - FINAL_SHARE) / 60) / 10
        raise RequestError(
            f"a budget of {request.budget_minutes:g} minutes is too short",
            f"loading the model took {elapsed_s:.0f} s, and measuring {first} untrained networks takes about "
            f"{first * launch_s:.0f} s, before the first trial",
            f"give {argument('budget_minutes', f'{minutes:g}')} at least; each trial takes a training",
        )


def _refuse_without_data(loaded: LoadedModel) -> None:
    if not loaded.data.real:
        raise DataError(
            "a search needs training data",
            "every trial is trained, and no data was given",
            f"give {argument('data', 'file.py:callable')}, whose load('train') returns the training samples",
        )


def _refuse_all_too_slow(searched: Searched, costs: Costs, folder: Path, seed: int) -> None:
    """Refuse a target that the smallest of a few networks of a conditional space misses by far.

    Raises:
        TechniqueError: with how far it is over.
    """
    if (folder / "study.log").exists():  # the search is resumed
        return
    smallest = min(drawn_networks(searched, seed), key=lambda module: count_params(module)[0])
    whole = costs.job.context.work / "smallest" / "artifact"  # what cannot be delivered fails before any training
    load = max(costs.measure(smallest, whole).loads.values(), default=0.0)
    if load > FAR_OVER_SMALLEST:
        raise TechniqueError(
            "no network of the space meets the targets",
            f"the smallest of {LOOKS} sampled networks is at {load:.2f} times a limit",
            "allow more latency or size, or give a space with smaller networks",
        )


def _refuse_too_slow(predictions: Predictions) -> None:
    """Refuse a target that even the lightest network of the space is predicted to miss by far.

    Raises:
        TechniqueError: with the nearest target.
    """
    space = predictions.space
    rows = space.sample(2000, np.random.default_rng(0))
    least = float(predictions.loads({}, {})(rows).min())
    measured = predictions.measured_loads
    if min(least, *measured) <= FAR_OVER:
        return
    raise TechniqueError(
        "no network of the space meets the targets",
        f"the nearest of {len(measured)} measured networks is at {min(measured):.2f} times a limit, and the lightest "
        f"of all is predicted at {least:.2f} times",
        "allow more latency or size, or give a space with smaller networks",
    )

"""Training of a student with the teacher, or of the control without it, in this process or in several; resumable.

Several processes, of this machine or of Ray Train, load teacher, student and data by their names and train with
Accelerate, each on its part of every batch. The first one writes the trained student as a round's state.
"""

from __future__ import annotations

import copy
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omgoptim.errors import RunError
from omgoptim.executors import RETRIES, Task
from omgoptim.executors.connection import ray_library
from omgoptim.executors.local import LocalExecutor
from omgoptim.executors.task import Work, end_with_parent
from omgoptim.models.samples import as_tensors, repeat_to_size
from omgoptim.operations.compression_job import Job
from omgoptim.operations.datasets import load_datasets, loss_for
from omgoptim.operations.distillation.student import Student, load_student
from omgoptim.operations.execution import from_payload, open_workers, threads_per_worker, to_payload
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.prepare import prepare
from omgoptim.operations.rounds.checkpoint import RoundState, read_round, record_training, training_of, write_round
from omgoptim.operations.save_module import require_module
from omgoptim.reports import Round, Training
from omgoptim.requests import DistillRequest, TrainingRequest
from omgoptim.requests.distill import Given
from omgoptim.training.config import TrainingConfig, config_for_data
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.feature_losses import FeatureLoss
from omgoptim.training.layer_trace import trace
from omgoptim.training.loop import Objective, Trainer, TrainingRound

PRETRAINED_LEARNING_RATE = 3e-4
"""Peak learning rate of Adam for a student initialized with a transformer's weights; that for random initialization
would destroy them. Chosen: a third of Adam's default."""


def train_student(
    job: Job[DistillRequest],
    student: Student,
    name: str,
    span: tuple[float, float],
    *,
    teacher: nn.Module | None,
    epochs: int | None = None,
) -> RoundState:
    """Train a copy of the student; an interrupted training is resumed.

    Args:
        job: the run.
        student: with its untrained module and its signature.
        name: of this training, the same in a resumed run.
        span: start and end of its progress as fractions of the run.
        teacher: None to train on the targets only.
        epochs: default: those of the request.

    Raises:
        OmgoptimError: as `fit` does.
    """
    request, datasets = job.request, job.datasets
    folder = job.context.checkpoints / name
    done = read_round(folder / "done", student.base)
    if done is not None:
        return done
    module = copy.deepcopy(student.module)
    if request.workers > 1:
        job.context.progress(f"{name}, training on {request.workers} workers", span[0])
        train_on_workers(job, student, module, name, teacher is not None, epochs or request.epochs)
        done = read_round(folder / "done", student.base)
        assert done is not None  # written by the line before
        return done
    plan = _plan(job, student, epochs or request.epochs)
    plan = config_for_data(plan, request, datasets.batches, Objective(datasets.loss).check)

    progress = job.context.part(*span, f"{name}, " if request.control or name != "student" else "")

    objective = Objective(datasets.loss)
    if teacher is not None:
        objective = Objective(datasets.loss, teacher, _distillation(request), _features(job, module, teacher))
    trainer = Trainer(module, datasets.batches, objective, plan, datasets.evaluator)
    fitted = trainer.fit(TrainingRound(checkpoints=folder / "training"), progress, job.context.publish)
    state = RoundState(module, Round(number=1, quality_trained=fitted.quality), student.changes)
    record_training(state, fitted)
    write_round(folder / "done", state, student.base)
    shutil.rmtree(folder / "training", ignore_errors=True)
    return state


def training_record(job: Job[DistillRequest], student: Student, state: RoundState) -> Training | None:
    """Return the report's record of a training."""
    return training_of([state], _plan(job, student, job.request.epochs), job.datasets.evaluator.metric.name)


def _plan(job: Job[DistillRequest], student: Student, epochs: int) -> TrainingConfig:
    """Return the training configuration; with a lower default learning rate for pretrained transformer layers."""
    request = job.request
    plan = TrainingConfig.of(request, epochs, job.loaded.device, request.seed)
    inherits = student.loaded.recipe is None and getattr(request.student, "initialize", "teacher") == "teacher"
    return with_pretrained_rate(plan, request, student.module) if inherits else plan


def with_pretrained_rate(config: TrainingConfig, request: TrainingRequest, module: nn.Module) -> TrainingConfig:
    """Return the configuration with the default learning rate of pretrained transformer layers, if it has such."""
    adaptive = request.learning_rate is None and request.optimizer in ("adam", "adamw")
    normalized = any(isinstance(layer, nn.LayerNorm) for layer in module.modules())
    return replace(config, learning_rate=PRETRAINED_LEARNING_RATE) if adaptive and normalized else config


def _distillation(request: DistillRequest) -> DistillationLoss:
    return DistillationLoss(request.temperature, request.alpha, form=request.output_loss)


def _features(job: Job[DistillRequest], module: nn.Module, teacher: nn.Module) -> FeatureLoss | None:
    request, loaded = job.request, job.loaded
    if request.features == "none":
        return None
    inputs = as_tensors(repeat_to_size(job.datasets.statistics, 2), loaded.signature.dtypes)
    own, theirs = (trace(each, loaded.signature, inputs) for each in (module, teacher))
    return FeatureLoss.of(
        request.features, request.feature_weight, request.feature_layers, own, theirs, seed=request.seed
    )


FUNCTION = f"{__name__}:train_share"


def train_on_workers(
    job: Job[DistillRequest], student: Student, module: nn.Module, name: str, teacher: bool, epochs: int
) -> None:
    """Train a student by the workers of the request; its state is in `checkpoints/NAME/done` afterwards.

    `module` has the initial weights. Without `teacher`, it is the control and learns from the targets alone.

    Raises:
        OmgoptimError: what a worker raised.
        RunError: a worker was lost, or cannot access the run's folder.
    """
    request, context = job.request, job.context
    folder = context.checkpoints / name
    write_round(folder / "start", RoundState(module, Round(number=1), student.changes), student.base)
    threads = threads_per_worker(request)
    payload = {
        "problem": to_payload("distill", request, context, threads) | {"runtime": job.runtime},
        "name": name,
        "teacher": teacher,
        "epochs": epochs,
        "ranks": request.workers,
        "start": str(folder / "start"),
        "checkpoints": str(folder / "shared"),
    }
    trained = folder / "trained"
    if (folder / "shared" / "done").is_dir():  # trained before the run was interrupted
        os.replace(folder / "shared" / "done", trained)
    elif request.on == "ray":
        with open_workers(request, context):
            _on_ray_train(payload, trained, context.work / "train")
    else:
        _on_this_machine(payload, folder)
        os.replace(folder / "rank-0", trained)
    shutil.rmtree(folder / "done", ignore_errors=True)
    os.replace(trained, folder / "done")
    for left in (*folder.glob("rank-*"), folder / "shared", folder / "start"):
        shutil.rmtree(left, ignore_errors=True)


def _on_this_machine(payload: dict[str, Any], folder: Path) -> None:
    """Train in processes of this machine; if one is lost, all end, and a resumed run continues from the last epoch."""
    for left in folder.glob("rank-*"):
        shutil.rmtree(left, ignore_errors=True)
    ranks = payload["ranks"]
    executor = LocalExecutor(ranks, Path(payload["problem"]["project"]), retries=0)
    try:
        port = _free_port()
        futures = [
            executor.submit(Task(FUNCTION, payload | {"rank": rank, "port": port}, folder / f"rank-{rank}", "shared"))
            for rank in range(ranks)
        ]
        for future in futures:
            future.result()
    finally:
        executor.close()


def _on_ray_train(payload: dict[str, Any], trained: Path, storage: Path) -> None:
    """Train with Ray Train, which restarts all processes from the last epoch if one of them is lost."""
    train, torch_train = ray_library("train"), ray_library("train.torch")
    storage.mkdir(parents=True, exist_ok=True)
    trainer = torch_train.TorchTrainer(
        _ray_train_loop,
        train_loop_config=payload,
        scaling_config=train.ScalingConfig(num_workers=payload["ranks"], use_gpu=False),
        run_config=train.RunConfig(
            name=payload["name"].replace(" ", "-"),
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=RETRIES),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:  # Ray Train's kinds: of the loop, of a worker, of the start
        raise RunError("Ray Train ended without a result", str(error)[:300], "see the run's log") from error
    shutil.rmtree(trained, ignore_errors=True)
    result.checkpoint.to_directory(str(trained))


def _ray_train_loop(payload: dict[str, Any]) -> None:
    """Train one process's share; Ray Train has set up the process group."""
    import tempfile

    end_with_parent()
    train = ray_library("train")
    rank = train.get_context().get_world_rank()
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(Path(scratch), Path(payload["checkpoints"]), {})
        train_share(payload | {"rank": rank}, work)
        # Without a checkpoint Ray Train keeps nothing of a worker.
        train.report({"rank": rank}, checkpoint=train.Checkpoint.from_directory(scratch) if rank == 0 else None)


def train_share(payload: Mapping[str, Any], work: Work) -> None:
    """Train one process's share of a student; the first one's folder is the trained student."""
    rank, ranks = payload["rank"], payload["ranks"]
    if "port" in payload:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(payload["port"]), "WORLD_SIZE": str(ranks)}
        os.environ.update(group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)})
    job, student = _loaded(payload)
    own = job.context.folder / "checkpoints" / payload["name"]
    if rank == 0:  # the others keep theirs to themselves
        own.parent.mkdir(parents=True, exist_ok=True)
        work.checkpoints.mkdir(parents=True, exist_ok=True)
        own.symlink_to(work.checkpoints, target_is_directory=True)
    teacher = job.original if payload["teacher"] else None
    train_student(job, student, payload["name"], (0.0, 1.0), teacher=teacher, epochs=payload["epochs"])
    for file in (own / "done").iterdir():
        shutil.copy2(file, work.folder / file.name)
    if torch.distributed.is_initialized() and "port" in payload:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _loaded(payload: Mapping[str, Any]) -> tuple[Job[DistillRequest], Student]:
    """Load the teacher, the data and the initial student of the run."""
    start = Path(payload["start"])
    if not start.is_dir():
        raise RunError(
            "a worker cannot access the run's folder",
            f"there is no {start} on {socket.gethostname()}",
            "keep the project on storage that the cluster shares, or train with one worker",
        )
    request, context = from_payload(payload["problem"])
    assert isinstance(request, DistillRequest)
    loaded = prepare(request, context, Live())
    teacher = require_module(loaded, "distill")
    datasets = load_datasets(request, loaded, teacher, None)
    job = Job(request, context, loaded, datasets, teacher, payload["problem"]["runtime"])
    given = load_student(job, request.student, Live()) if isinstance(request.student, Given) else None
    base = teacher if given is None else given.base
    state = read_round(start, base)
    if state is None:
        raise RunError("the initial student was not found", f"{start} holds no state of a round", "start the run again")
    if given is None:
        loaded = replace(loaded, module=state.module)
        return job, Student("student", request.student.bare("student"), state.module, base, loaded, state.outcome)
    loss = loss_for(request, given.loaded, given.module, datasets.statistics, Live())
    job = replace(job, datasets=replace(datasets, loss=loss))
    return job, replace(given, module=state.module)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

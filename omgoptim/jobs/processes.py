"""Processes of a run: check, list and end them."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from omgoptim.jobs.folder import WorkerProcess

MARK = "OMGOPTIM_RUN"
"""Environment variable of a worker, inherited by everything it starts: the run's folder."""

KILL_LIMIT_S = 5.0
"""Time limit for killed processes to disappear. Chosen: only processes that wait for a disk take longer."""


def start_time_of(pid: int) -> float | None:
    """Return the start time of a process, which distinguishes it from later ones of the same id; None if it is gone.

    A process that has ended and waits to be reaped is gone. On Linux the clock is the kernel's own, in ticks since
    boot: unlike a time of day it does not move when the machine's clock is set.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else float(fields[19])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def this_process() -> WorkerProcess:
    """Return the current process."""
    return WorkerProcess(os.getpid(), start_time_of(os.getpid()) or 0.0)


def is_alive(process: WorkerProcess) -> bool:
    """Return whether this very process is alive, and no other of its number."""
    return start_time_of(process.pid) == process.born


def run_processes(worker: WorkerProcess, run: Path) -> list[psutil.Process]:
    """Return the living processes of a run, except the one that asks.

    These are the worker, its process group, and children that left the group: they carry the run's mark in their
    environment.
    """
    group_is_ours = start_time_of(worker.pid) in (worker.born, None)
    members = []
    for process in psutil.process_iter():
        if process.pid == os.getpid() or start_time_of(process.pid) is None:
            continue
        is_worker = process.pid == worker.pid and group_is_ours
        if is_worker or (group_is_ours and _group(process.pid) == worker.pid) or _mark(process) == str(run):
            members.append(process)
    return members


def end_processes(worker: WorkerProcess, run: Path, grace_s: float) -> None:
    """Terminate all processes of a run; kill the remaining ones after `grace_s` seconds."""
    if grace_s > 0:
        _signal(run_processes(worker, run), force=False)
        deadline = time.monotonic() + grace_s
        while run_processes(worker, run) and time.monotonic() < deadline:
            time.sleep(0.05)
    deadline = time.monotonic() + KILL_LIMIT_S
    while (left := run_processes(worker, run)) and time.monotonic() < deadline:
        _signal(left, force=True)
        time.sleep(0.02)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid) if hasattr(os, "getpgid") else None
    except OSError:
        return None


def _mark(process: psutil.Process) -> str | None:
    try:
        value = process.environ().get(MARK)
    except (psutil.Error, OSError):  # another user's, or gone meanwhile
        return None
    return str(value) if value else None


def _signal(processes: list[psutil.Process], force: bool) -> None:
    for process in processes:
        with suppress(psutil.Error, OSError):
            if force:
                process.kill()
            else:
                process.send_signal(signal.SIGTERM)

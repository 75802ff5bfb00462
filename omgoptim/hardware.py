"""Hardware of this machine: processor, cores, load by other processes, and whether work fits into memory. No torch."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

from omgoptim.errors import ModelError, OmgoptimError

try:
    import psutil
except ImportError:  # on a target, which has only what an engine needs
    psutil = None

if TYPE_CHECKING:
    from torch import nn

FEATURES = {
    "avx2": "avx2",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
}
"""Instruction sets that matter for low precision: the kernel's name (x86, then Arm) to the displayed name."""


def cpu_name() -> str:
    """Return the processor's name, or the architecture where the system does not name it."""
    for key in ("model name", "Model", "Hardware"):
        if name := _cpuinfo().get(key):
            return name
    return platform.processor() or platform.machine() or "unknown"


def cpu_features() -> list[str]:
    """Return which of `FEATURES` this processor has; empty where the system does not list them (macOS, Windows)."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for flag, name in FEATURES.items() if flag in flags]


def usable_cores() -> int:
    """Return the cores this process may use: its affinity, and a container's quota, rounded down to at least 1."""
    allowed = len(_allowed_cores())
    quota = _container_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def memory_bytes() -> int | None:
    """Return the machine's memory; None where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def other_load(seconds: float = 0.3) -> float:
    """Return the load by processes outside this process's group, as a fraction of its cores, 0..1.

    Watches for `seconds` seconds. Time that a hypervisor gave to other machines counts as used.
    """
    cores = _allowed_cores()
    busy_before, total_before = _cpu_seconds(cores)
    own_before = _own_seconds()
    time.sleep(seconds)
    own_after = _own_seconds()
    busy_after, total_after = _cpu_seconds(cores)
    total = total_after - total_before
    if total <= 0:  # the system gives no such counters
        return 0.0
    own = sum(max(0.0, own_after[pid] - own_before.get(pid, 0.0)) for pid in own_after)
    return min(1.0, max(0.0, (busy_after - busy_before - own) / total))


class LoadMeter:
    """Monitor of the load by other processes from its creation on, while children of this process come and go."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def load(self) -> float:
        """Return the load by others so far as a fraction of the cores, 0..1; running children count as others."""
        if os.name == "nt":  # which does not add up the time of children
            return 0.0
        (busy, total, own), (busy_0, total_0, own_0) = self._seconds(), self._start
        return min(1.0, max(0.0, busy - busy_0 - (own - own_0)) / max(total - total_0, 1e-9))

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        times = os.times()
        return *_cpu_seconds(_allowed_cores()), sum(times[:4])


def _cpuinfo() -> dict[str, str]:
    """Return the first value of each key of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = [line.partition(":")[::2] for line in text.splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in reversed(pairs)}


def _allowed_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _container_quota() -> float | None:
    """Return the cores that a container's quota allows, None without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()  # cgroup 2
    except (OSError, ValueError):
        try:  # cgroup 1
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return float(quota) / float(period) if quota not in ("max", "-1") else None


def _cpu_seconds(cores: list[int]) -> tuple[float, float]:
    """Return busy and total seconds of the given cores since boot."""
    busy = total = 0.0
    if psutil is None:
        return _cpu_seconds_of_linux(cores)
    per_core = psutil.cpu_times(percpu=True)
    for core in cores:
        if core >= len(per_core):
            continue
        times = per_core[core]._asdict()
        everything = sum(value for name, value in times.items() if not name.startswith("guest"))  # counted in user
        total += everything
        busy += everything - times["idle"] - times.get("iowait", 0.0)
    return busy, total


def _cpu_seconds_of_linux(cores: list[int]) -> tuple[float, float]:
    """Return busy and total seconds from /proc/stat; zeros where there is none.

    Source: proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal.
    """
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0, 0.0
    rows = {line.split()[0]: [float(text) for text in line.split()[1:9]] for line in lines if line.startswith("cpu")}
    found = [rows[f"cpu{core}"] for core in cores if f"cpu{core}" in rows]
    total = sum(sum(times) for times in found)
    ticks = os.sysconf("SC_CLK_TCK")
    return (total - sum(times[3] + times[4] for times in found)) / ticks, total / ticks


def _own_seconds() -> dict[int, float]:
    """Return the CPU seconds so far of every process of this process's group, by process id."""
    if psutil is None:
        return {os.getpid(): sum(os.times()[:4])}
    seconds = {}
    for pid in psutil.pids() if hasattr(os, "getpgid") else [os.getpid()]:
        try:
            if pid == os.getpid() or os.getpgid(pid) == os.getpgrp():
                times = psutil.Process(pid).cpu_times()
                seconds[pid] = times.user + times.system
        except (psutil.Error, OSError):  # ended meanwhile
            continue
    return seconds


FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".pt2", ".onnx")
"""Suffixes of weight files."""

TRAINING_COPIES = 5
"""Copies of a trained weight in memory: itself, its gradient, Adam's two moments, and the best so far."""


def refuse_beyond_memory(
    needed_bytes: int, what: str, available_bytes: int | None = None, kind: type[OmgoptimError] = ModelError
) -> None:
    """Raise if something does not fit into memory.

    Args:
        needed_bytes: estimate of what it takes.
        what: the action, for the error: `loading weights.pt`.
        available_bytes: default: the machine's free memory.
        kind: of the error.

    Raises:
        OmgoptimError: it needs more than is available.
    """
    available = psutil.virtual_memory().available if available_bytes is None else available_bytes
    if needed_bytes <= available:
        return
    smaller = "model" if kind is ModelError else "file"
    raise kind(
        f"{what} does not fit into memory",
        f"it needs at least about {needed_bytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free",
        f"free some memory, use a machine with more, or start from a smaller {smaller}",
    )


def training_bytes(module: nn.Module) -> int:
    """Return the least memory that training a module takes; activations are not counted."""
    return TRAINING_COPIES * sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def weight_bytes(path: Path) -> int:
    """Return the bytes of the weights in a file or folder: the least memory that reading them takes.

    A folder may hold the same weights in several formats; the largest of them counts.
    """
    if path.is_file():
        return path.stat().st_size
    by_format = {ending: sum(file.stat().st_size for file in path.glob(f"*{ending}")) for ending in FORMATS}
    return max(by_format.values())

from __future__ import annotations

import os
import subprocess
import sys

from omgoptim.hardware import FEATURES, cpu_features, cpu_name, other_load, usable_cores

SPIN = "print('.', flush=True)\nwhile True: pass"


def spin(**popen: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE, **popen)  # type: ignore[call-overload]


def test_the_processor_has_a_name_and_only_features_that_matter() -> None:
    assert cpu_name().strip() == cpu_name() != ""
    assert set(cpu_features()) <= set(FEATURES.values())
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        assert ("avx2" in cpu_features()) == (" avx2 " in file.read())


def test_a_process_may_use_no_more_cores_than_its_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
    code += "from omgoptim.hardware import usable_cores; print(usable_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_a_busy_process_of_another_group_is_load_and_one_of_our_own_is_not() -> None:
    """On one core that both share, another's spinning is most of the load; the same spinning of our own is not."""
    code = (
        "import os, subprocess, sys\n"
        "from omgoptim.hardware import other_load\n"
        "os.setsid()\n"
        "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[-1:])\n"
        f"with subprocess.Popen([sys.executable, '-c', {SPIN!r}], stdout=subprocess.PIPE,\n"
        "    start_new_session=sys.argv[1] == 'other') as spinning:\n"
        "    spinning.stdout.readline()\n"
        "    print(other_load(0.5))\n"
        "    spinning.kill()\n"
    )
    loads = [
        float(subprocess.run([sys.executable, "-c", code, whose], capture_output=True, text=True, check=True).stdout)
        for whose in ("other", "own")
    ]
    assert loads[0] > 0.8
    assert loads[1] < loads[0]


def test_load_is_a_fraction() -> None:
    assert 0.0 <= other_load(0.05) <= 1.0

from __future__ import annotations

from dataclasses import replace

from omgoptim.measure.timing import Timing
from omgoptim.operations.timing import OVERLOADED, as_fast

TIMING = Timing(1.0, 1.0, None, None, None, None, launches=5)


def test_the_less_a_measurement_can_tell_the_more_counts_as_equally_fast() -> None:
    several, once = as_fast(TIMING, 0.0), as_fast(replace(TIMING, launches=1), 0.0)
    busy = as_fast(TIMING, OVERLOADED + 0.01)
    assert 1 < several < once < busy

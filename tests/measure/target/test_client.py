from __future__ import annotations

from omgoptim.measure.target.client import Target
from omgoptim.requests.target import TargetAddress


def test_connect(server, tmp_path):
    import time

    t = time.time()
    with Target(TargetAddress.parse(server.url), "onnxruntime", "run-1", tmp_path, print) as target:
        print(target.machine.versions, target.machine.python, time.time() - t)
        print(target.other_load(), target.meter().load())
        with target.measuring():
            pass
    print(time.time() - t)
    time.sleep(0.2)
    print(server.processes())
    assert 0

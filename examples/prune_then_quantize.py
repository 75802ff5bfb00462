"""Prune half of the channels, fine-tune, then quantize to int8. `python examples/prune_then_quantize.py`."""

import sys
from pathlib import Path

import omgoptim

MODEL, DATA = "digits_cnn.py:build", "digits_cnn.py:load"
HERE = str(Path(__file__).parent)


def main(timing: str = "standard") -> tuple[omgoptim.EfficiencyReport, omgoptim.EfficiencyReport]:
    given = {"data": DATA, "project": HERE, "timing": timing, "max_quality_drop": 0.02}
    pruned = omgoptim.prune(MODEL, method="structured", pruning_ratio=0.5, epochs=2, **given)
    print(pruned.summary)
    for step in pruned.rounds:
        print(
            f"round {step.number}: {step.quality_taken} taken, {step.quality_trained} trained, {step.params} parameters"
        )
    quantized = omgoptim.quantize(pruned.run_id, **given)
    print(quantized.summary)
    print("from", " to ".join(quantized.lineage), "in", quantized.artifact.path)
    return pruned, quantized


if __name__ == "__main__":
    main(*sys.argv[1:])

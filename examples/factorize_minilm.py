"""Factorize MiniLM's Linear layers and fine-tune through LoRA adapters. `python examples/factorize_minilm.py`."""

from pathlib import Path

import omgoptim

HERE = str(Path(__file__).parent)


def main(epochs: int = 2) -> omgoptim.EfficiencyReport:
    report = omgoptim.factorize(
        "minilm.py:build",
        data="minilm.py:load",
        project=HERE,
        target_compression=1.3,  # of the whole model; half of it is an embedding table, which is not factorized
        epochs=epochs,
        recover="lora",
        max_quality_drop=0.1,
    )
    print(report.summary)
    for change in report.changed[:6]:
        print(change.path, change.before, "->", change.after)
    return report


if __name__ == "__main__":
    main()

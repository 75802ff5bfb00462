"""The numbers of the documentation are those of the code: a sentence that says another one fails here."""

from __future__ import annotations

from pathlib import Path

import pytest

from omgoptim.cli import output
from omgoptim.errors import DataError, RequestError
from omgoptim.executors import RETRIES
from omgoptim.executors.connection import PROBE_S
from omgoptim.executors.package import MOST_BYTES
from omgoptim.measure.timing import PLANS
from omgoptim.models.labels import IGNORED
from omgoptim.operations.distillation.student_training import PRETRAINED_LEARNING_RATE
from omgoptim.operations.timing import BUSY, OVERLOADED, PATIENCE_S
from omgoptim.reports.measured import SMALLER
from omgoptim.requests import DistillRequest, FactorizeRequest, ModelRequest, PruneRequest, QuantizeRequest
from omgoptim.requests.distill import Auto as AutoStudent
from omgoptim.requests.factorize import Factorization, Whitened
from omgoptim.requests.prune import Structured
from omgoptim.requests.quantize import Static
from omgoptim.requests.training import TrainingFields
from omgoptim.techniques.distill._student.derivation import DEFAULT_DEPTH
from omgoptim.training._distillation.distances import OTHERS_WEIGHT
from omgoptim.training._distillation.teacher_outputs import LIMIT_BYTES
from omgoptim.training.config import MOMENTUM

ROOT = Path(__file__).parents[2]
WORDS = {1: "one", 2: "two", 3: "three", 5: "five", 8: "eight"}


def default(request: type, name: str) -> object:
    return request.model_fields[name].get_default(call_default_factory=True)


QUICK, STANDARD, CAREFUL = (PLANS[timing] for timing in ("quick", "standard", "careful"))

SENTENCES = [
    ("docs/scaling.md", f"is an error after {WORDS[int(PROBE_S)]} seconds"),
    ("docs/scaling.md", f"At most {MOST_BYTES / 2**20:.0f} MB"),
    ("docs/scaling.md", f"begun again, {WORDS[RETRIES]} times at most"),
    ("docs/timing.md", f"Above {BUSY:.0%} of the machine a run first waits up to"),
    ("docs/timing.md", f"up to {PATIENCE_S['standard']:g} s (`careful`: {PATIENCE_S['careful']:g} s) for it to end"),
    ("docs/timing.md", f"Above {OVERLOADED:.0%} no ratio of times is given at all"),
    ("docs/timing.md", f"| `quick` | {WORDS[QUICK.launches]} |"),
    (
        "docs/timing.md",
        f"| `standard` | {WORDS[STANDARD.launches]}, and up to {WORDS[STANDARD.most_launches]} while the interval is "
        f"wider than {100 * STANDARD.narrow:g} %",
    ),
    (
        "docs/timing.md",
        f"| `careful` | {WORDS[CAREFUL.launches]}, and up to {CAREFUL.most_launches} until the interval is within "
        f"{100 * CAREFUL.narrow:g} % |",
    ),
    ("docs/distillation.md", f"({AutoStudent().compression:g} unless you say"),
    ("docs/distillation.md", f"peak learning rate of {PRETRAINED_LEARNING_RATE:.0e}".replace("e-0", "e-")),
    ("docs/distillation.md", f"plus {OTHERS_WEIGHT:g} times KL among the others"),
    ("docs/distillation.md", f"target is {IGNORED} "),
    ("docs/distillation.md", f"more than {LIMIT_BYTES / 2**20:g} MiB"),
    ("docs/distillation.md", "half by default" if DEFAULT_DEPTH == 0.5 else f"{DEFAULT_DEPTH:g} by default"),
    ("docs/quantization.md", f"{default(Static, 'calibration_samples')} samples by default"),
    ("docs/quantization.md", f"a guard of {default(QuantizeRequest, 'max_quality_drop'):g} unless you say"),
    ("docs/pruning.md", f"{Structured().goal:g} unless you say"),
    ("docs/pruning.md", f"smaller by less than {SMALLER - 1:.0%} is called about the same size"),
    ("docs/guide.md", f"| {RequestError.exit_code} | the request is wrong; nothing was started |"),
    ("docs/guide.md", f"| {DataError.exit_code} | the model, its data or the set-up"),
    ("docs/guide.md", f"| {output.GUARD_FAILED} | done, but the quality guard was not held"),
    ("docs/guide.md", f"| {output.INTERRUPTED} | interrupted; the run was cancelled |"),
]
"""A document and what it must say, made of the constants that decide it."""

DESCRIPTIONS = [
    (ModelRequest, "timing", f"{WORDS[STANDARD.launches]}, with an interval"),
    (TrainingFields, "optimizer", f"sgd has momentum {MOMENTUM:g}"),
    (Structured, "pruning_ratio", f"(default {Structured().goal:g})"),
    (AutoStudent, "target_compression", f"(default {AutoStudent().compression:g};"),
    (Factorization, "target_compression", f"default {Whitened().compression:g}"),
]
"""A request, an argument of it, and what its description must say."""


@pytest.mark.parametrize(("document", "sentence"), SENTENCES)
def test_a_number_of_the_documentation_is_that_of_the_code(document: str, sentence: str) -> None:
    text = " ".join((ROOT / document).read_text(encoding="utf-8").split()).replace(" %", "%")
    assert " ".join(sentence.split()).replace(" %", "%") in text


@pytest.mark.parametrize(("request_class", "argument", "words"), DESCRIPTIONS)
def test_a_number_of_a_description_is_that_of_the_code(request_class: type, argument: str, words: str) -> None:
    assert words in (request_class.model_fields[argument].description or "")


def test_every_verb_that_has_a_guard_has_the_same_default() -> None:
    verbs = (QuantizeRequest, PruneRequest, FactorizeRequest, DistillRequest)
    assert {default(verb, "max_quality_drop") for verb in verbs} == {0.01}

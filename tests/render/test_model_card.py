"""Tests of the card and the badge of an artifact."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from omgoptim.models.outputs import COMPARED_BY
from omgoptim.render.shared import badge_text, card_markdown
from omgoptim.reports import EfficiencyReport


def head_of(card: str) -> dict[str, Any]:
    head = yaml.safe_load(card.partition("---\n")[2].partition("\n---\n")[0])
    assert isinstance(head, dict)
    return head


def test_a_card_says_what_it_is_how_it_was_made_and_its_numbers_with_machine_and_interval(
    quantized: EfficiencyReport,
) -> None:
    card = card_markdown(quantized)
    for needed in (
        "# `examples/digits_cnn.py:build`: int8 on onnxruntime",
        "**OK** Static int8",
        quantized.repeat,
        "version 0.1.0",
        "5.79x faster (5.41 to 6.18)",
        "drop 0.0028 (-0.0041 to 0.0083)",
        quantized.warnings[0],
        "AMD EPYC 9R14",
        "## Licence",
    ):
        assert needed in card
    assert "/home" not in card
    assert card == card_markdown(quantized)


@pytest.mark.parametrize("metric", ["negative_kl", "worst_output_agreement", *COMPARED_BY.values()])
def test_an_agreement_with_the_original_is_no_result_of_a_task(quantized: EfficiencyReport, metric: str) -> None:
    after = quantized.after
    assert after is not None
    assert "model-index" in head_of(card_markdown(quantized))
    other = quantized.model_copy(update={"after": after.model_copy(update={"metric": metric})})
    assert "model-index" not in head_of(card_markdown(other))


def test_the_code_that_opens_it_is_that_of_its_own_folder(quantized: EfficiencyReport) -> None:
    artifact = quantized.artifact
    assert artifact is not None
    load = (
        f"import omgoptim; model = omgoptim.open_artifact({artifact.path!r})\n"
        f"# without omgoptim: onnxruntime.InferenceSession({artifact.path + '/model.onnx'!r})"
    )
    card = card_markdown(quantized.model_copy(update={"artifact": artifact.model_copy(update={"load": load})}))
    assert "    import omgoptim; model = omgoptim.open_artifact('./')\n" in card
    assert "    # without omgoptim: onnxruntime.InferenceSession('./model.onnx')\n" in card


def test_the_head_is_metadata_that_the_hub_reads_and_the_licence_is_left_to_the_user(
    quantized: EfficiencyReport,
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = card_markdown(quantized, base_model="org/digits")
    data = hub.ModelCard(card).data
    assert data.base_model == "org/digits"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.license is None
    assert "license:  # yours to fill in" in card
    assert {"omgoptim", "int8"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_name) == ("accuracy", 0.9833, "top1")
    assert (result.task_type, result.dataset_name) == ("other", "examples/digits_cnn.py:load (360 samples)")


def test_a_model_of_another_place_has_no_base_and_an_agreement_is_no_result(quantized: EfficiencyReport) -> None:
    assert quantized.after is not None
    after = quantized.after.model_copy(update={"metric": "top1_agreement"})
    head = head_of(card_markdown(quantized.model_copy(update={"after": after})))
    assert set(head) == {"license", "tags"}


def test_a_trained_float_model_is_a_fine_tune_of_its_base(pruned: EfficiencyReport) -> None:
    assert head_of(card_markdown(pruned, base_model="org/digits"))["base_model_relation"] == "finetune"


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("quantized", {}, "3.8x smaller, 5.8x faster"),
        ("quantized", {"outcome": "guard_failed"}, "guard failed"),
        ("quantized", {"outcome": "no_gain"}, "no gain"),
        ("pruned", {}, "7.0x smaller"),  # its interval of the speed includes 1
        ("profiled", {}, "1.25 MB, 0.412 ms"),
        ("planned", {}, "plan"),
        ("factorized", {}, "guard failed"),
    ],
)
def test_a_badge_claims_what_the_report_claims(
    name: str, changes: dict[str, Any], text: str, request: pytest.FixtureRequest
) -> None:
    assert badge_text(request.getfixturevalue(name).model_copy(update=changes)) == text

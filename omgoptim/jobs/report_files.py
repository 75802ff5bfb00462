"""Additional files of a report: page, badge, and a model card in the folder of each artifact."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.jobs.folder import NAME, RunFolder, is_run
from omgoptim.jobs.storage import write_whole
from omgoptim.models.report_file import read_report
from omgoptim.models.security.hub_options import REPOSITORY
from omgoptim.reports import EfficiencyReport


def write_report_files(folder: RunFolder, report: EfficiencyReport) -> None:
    """Write the page and the badge of a report, and the cards of its artifact and its alternatives.

    The card is not part of the artifact's manifest: it is neither measured nor signed.
    """
    from omgoptim.render.html import report_html
    from omgoptim.render.shared import badge_svg

    write_whole(folder.html_file, report_html(report))
    write_whole(folder.badge_file, badge_svg(report))
    if report.artifact is not None:
        for place in {folder.artifact, Path(report.artifact.path)}:  # the run's own, and the copy in the output folder
            _write_card(folder, place, report)
    for one in report.alternatives:
        found = read_report(folder.alternatives / f"{one.name}.json", folder.id)
        if found is not None:
            _write_card(folder, folder.alternatives / one.name, found[0])


def _write_card(folder: RunFolder, artifact: Path, report: EfficiencyReport) -> None:
    from omgoptim.render.shared import CARD, card_markdown

    if artifact.is_dir() and not artifact.is_symlink():
        with suppress(OSError):  # a folder of the user's that may no longer be written
            write_whole(artifact / CARD, card_markdown(report, _base_model(folder, report)))


def _base_model(folder: RunFolder, report: EfficiencyReport) -> str | None:
    """The hub's id of the model that a run, or the first of its lineage, began with; None where it is not there."""
    source, project = report.request.get("model"), folder.path.parents[2]
    first = next(iter(report.lineage), folder.id)
    beginning = RunFolder(folder.path.parent / first)
    if first != folder.id and NAME.fullmatch(first) and is_run(beginning.path):
        with suppress(OmgoptimError):
            source = beginning.read_request().request.get("model")
    prefix, _, name = str(source).partition(":")
    return name if prefix == "hf" and REPOSITORY.fullmatch(name) and not (project / name).is_dir() else None

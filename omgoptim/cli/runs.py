"""Commands on existing runs: runs, pick, report."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import typer

from omgoptim import requests
from omgoptim.cli.output import (
    AS_JSON,
    INTERRUPTED,
    PROJECT,
    Form,
    Shape,
    console,
    form_of,
    json_text,
    print_error,
    print_json,
    print_text,
    show,
    show_report,
    show_state,
    show_states,
    with_output_options,
)
from omgoptim.errors import RequestError, RunError, did_you_mean
from omgoptim.jobs.actions import cancel, pick, resume
from omgoptim.jobs.folder import RunFolder, find_run
from omgoptim.jobs.follow import follow
from omgoptim.jobs.project import find_project
from omgoptim.jobs.states import ENDED, list_runs, load_report, read_state
from omgoptim.jobs.storage import write_atomically
from omgoptim.render.brief import to_json
from omgoptim.render.runs import Run, runs_html, runs_json, runs_markdown, runs_section
from omgoptim.render.shared import shared_markdown

_SHELL_ONLY = ("open", "watch")
"""Actions that only the shell has."""
_ACTIONS = (*get_args(requests.RunsRequest.model_fields["action"].annotation), *_SHELL_ONLY)
_NEWEST = 10
"""Runs that a report without ids shows. Chosen: what fits a screen."""
_RUN_IDS = typer.Argument(
    None, metavar="ID...", help=f"Runs to show; without any, the newest {_NEWEST}.", show_default=False
)
_ENDINGS = {".html": "html", ".md": "markdown", ".json": "json", ".txt": "text"}
_FORMS: tuple[Form | Literal["html"], ...] = ("text", "markdown", "json", "html")


@with_output_options
def runs(
    action: str = typer.Argument(
        "list", metavar="ACTION", help="One of list, show, watch, open, wait, cancel, resume, pick."
    ),
    run_id: str | None = typer.Argument(None, metavar="ID", help="Run id; its start or end is enough."),
    name: str | None = typer.Argument(None, metavar="NAME", help="For pick: name of one of the report's alternatives."),
    project: str | None = PROJECT,
    *,
    shape: Shape,
) -> int:
    """List runs; show, watch, wait for, cancel or resume one; open its page; or pick another finalist.

    Ctrl-C ends `watch`, and the run continues; with `wait` and `resume` it cancels the run.
    """
    if action not in _ACTIONS:
        raise RequestError(f"'{action}' is not a value of action", did_you_mean(action, _ACTIONS))
    if action in _SHELL_ONLY and not run_id:
        raise RequestError(f"action '{action}' needs run_id", "it was not given", "action 'list' shows the ids")
    given = {"action": "show" if action in _SHELL_ONLY else action, "run_id": run_id, "name": name, "project": project}
    request = requests.parse("runs", {name: value for name, value in given.items() if value is not None})
    assert isinstance(request, requests.RunsRequest)  # what parse gives for this verb
    root = find_project(request.project)
    if request.action == "list":
        return show_states(list_runs(root), shape.form)
    folder = find_run(root, request.run_id or "")
    if request.action == "cancel":
        return show_state(cancel(folder), shape.form)
    if action == "open":
        return _open(folder, shape.form)
    if action == "watch":
        return _watch(folder, shape)
    if request.action == "pick":
        return show_report(pick(folder, request.name or ""), folder, shape)
    if request.action == "resume":
        resume(folder)
    if request.action in ("wait", "resume"):
        return await_report(folder, shape)
    state = read_state(folder)
    if state.status not in ENDED:
        return show_state(state, shape.form)
    return show_report(load_report(folder), folder, shape)


@with_output_options
def pick_command(
    run_id: str = typer.Argument(..., metavar="ID", help="Run id; its start or end is enough."),
    name: str = typer.Argument(..., metavar="NAME", help="Name of one of the report's alternatives."),
    project: str | None = PROJECT,
    *,
    shape: Shape,
) -> int:
    """Replace a run's artifact by another of its finalists, without a new run."""
    folder = find_run(find_project(project), run_id)
    return show_report(pick(folder, name), folder, shape)


def report(
    run_ids: list[str] | None = _RUN_IDS,
    form: str | None = typer.Option(
        None, "--format", metavar="text|markdown|json|html", help="Form of the report; default: by the file's ending."
    ),
    output: str | None = typer.Option(None, "--output", metavar="FILE", help="New file to write it to."),
    project: str | None = PROJECT,
    as_json: bool = AS_JSON,
) -> int:
    """Show one run, or put several side by side: a table in the terminal, or markdown, JSON or a page in a file."""
    target = Path(output) if output else None
    shape = _form_of_report(as_json, form, target)
    if target is not None and target.exists():
        raise RequestError(f"output '{output}' exists already", "nothing is overwritten", "name a new file")
    root = find_project(project)
    folders = [find_run(root, run_id) for run_id in dict.fromkeys(run_ids or [])]
    folders = folders or [find_run(root, state.run_id) for state in list_runs(root)[:_NEWEST]]
    if not folders:
        raise RunError("there are no runs to report on", f"{root} has none yet", "start one: omgoptim --help")
    if target is None and shape == "text":
        return _show_runs(folders)
    text = _runs_text(folders, shape)
    if target is None:
        return print_text(text)
    try:
        write_atomically(target, text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RequestError(f"cannot write '{output}'", reason, "name a file in a folder that exists") from None
    return print_text(str(target))


def _form_of_report(as_json: bool, form: str | None, target: Path | None) -> Form | Literal["html"]:
    """Return the requested form, else that of the file's ending."""
    ending = target.suffix.lower() if target else ""
    if form is None and not as_json and ending and ending not in _ENDINGS:
        endings = f"a file's ending is one of {', '.join(_ENDINGS)}"
        raise RequestError(f"unknown file ending '{ending}'", endings, "give another ending, or the format")
    given = form or (None if as_json else _ENDINGS.get(ending))
    if given is not None and given not in _FORMS:
        raise RequestError(f"unknown format '{given[:80]}'", did_you_mean(given, _FORMS))
    return "html" if given == "html" and not as_json else form_of(as_json, given)


def _show_runs(folders: Sequence[RunFolder]) -> int:
    if len(folders) == 1:
        return show_report(load_report(folders[0]), folders[0], Shape())
    section = runs_section(_runs_of(folders))
    return show({}, lambda term: term.section_view(section), "text")


def _runs_text(folders: Sequence[RunFolder], form: Form | Literal["html"]) -> str:
    """Return the runs as JSON, a page or markdown; plain text is markdown."""
    if len(folders) > 1:
        made = _runs_of(folders)
        if form == "json":
            return json_text(runs_json(made))
        return runs_html(made) if form == "html" else runs_markdown(made)
    report = load_report(folders[0])
    if form == "html":
        from omgoptim.render.html import report_html

        return report_html(report)
    return json_text(to_json(report)) if form == "json" else shared_markdown(report)


def _runs_of(folders: Sequence[RunFolder]) -> list[Run]:
    states = [(folder, read_state(folder)) for folder in folders]
    return [Run(state, load_report(folder) if state.status == "done" else None) for folder, state in states]


def await_report(folder: RunFolder, shape: Shape) -> int:
    """Follow a run to its end, showing its progress, and print its report. Ctrl-C cancels it."""
    from omgoptim.cli.progress import display

    screen = console(sys.stderr)
    screen.print(f"run {folder.id}", style="dim", markup=False, highlight=False, soft_wrap=True)
    try:
        with display(screen) as show_progress:
            for state in follow(folder, timeout_s=None):
                show_progress(state)
    except KeyboardInterrupt:
        state = cancel(folder)
        if state.status == "cancelled":
            print_error(RunError(f"cancelled run {folder.id}", "it was interrupted", ""), shape.form)
            return INTERRUPTED
    return show_report(load_report(folder), folder, shape)


def _watch(folder: RunFolder, shape: Shape) -> int:
    from omgoptim.cli.progress import watch

    if not watch(folder, console(sys.stderr)):
        return INTERRUPTED
    return show_report(load_report(folder), folder, shape)


def _open(folder: RunFolder, form: Form) -> int:
    """Write the page again from the report, show it in the browser, and print its path."""
    from omgoptim.render.html import report_html

    page = report_html(load_report(folder))
    write_atomically(folder.html_file, page)
    opened = webbrowser.open(folder.html_file.as_uri())
    if form == "json":
        print_json({"page": str(folder.html_file), "opened": opened})
        return 0
    if not opened:
        console(sys.stderr).print("no browser was found; open this file", style="dim")
    return print_text(str(folder.html_file))

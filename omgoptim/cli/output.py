"""Output of the commands: results to standard output, everything else to standard error."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import typer

from omgoptim.cli import options
from omgoptim.errors import OmgoptimError, RequestError, did_you_mean
from omgoptim.jobs.folder import RunFolder
from omgoptim.render import brief, markdown, shared
from omgoptim.reports import EfficiencyReport, RunState
from omgoptim.requests.command import in_shell
from omgoptim.text import clean_json

Form = Literal["text", "markdown", "json"]
FORMS: tuple[Form, ...] = ("text", "markdown", "json")
_WIDTH_OF_A_PIPE = 110
"""Characters of a line where the output is no terminal. Chosen: the tables fit it."""

GUARD_FAILED, INTERRUPTED = 4, 130
"""Exit codes beside those of errors. 130 is that of a shell for SIGINT; 4 is chosen."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Form of the output, and whether it is the whole report."""

    form: Form = "text"
    full: bool = False


AS_JSON = typer.Option(
    False,
    "--json",
    metavar="",
    help="Print one JSON object and nothing else on stdout.",
    rich_help_panel=options.OUTPUT,
)
FORMAT = typer.Option(
    None,
    "--format",
    metavar="text|markdown|json",
    help="Form of the result. markdown: for a pull request or $GITHUB_STEP_SUMMARY, without paths of this machine.",
    rich_help_panel=options.OUTPUT,
)
DETAIL = typer.Option(
    None, "--detail", metavar="brief|full", help="How much of the report to print.", rich_help_panel=options.OUTPUT
)
PROJECT = typer.Option(None, "--project", metavar="TEXT", help="Path of the project; default: the working directory.")


def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Return a parameter of a command that Typer reads as an option."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_signature(command: Callable[..., int], parameters: list[inspect.Parameter]) -> Callable[..., int]:
    """Give a command the signature that Typer reads its options from."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def with_output_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options --json, --format and --detail; it takes them as one argument, `shape`."""
    options = [
        parameter("as_json", bool, AS_JSON),
        parameter("form", str | None, FORMAT),
        parameter("detail", str | None, DETAIL),
    ]
    own = [one for one in inspect.signature(command, eval_str=True).parameters.values() if one.name != "shape"]

    def shaped(**given: Any) -> int:
        shape = _shape(*(given.pop(one.name) for one in options))
        return command(**given, shape=shape)

    shaped.__doc__ = command.__doc__
    return with_signature(shaped, [*own, *options])


def _shape(as_json: bool, form: str | None, detail: str | None) -> Shape:
    found = form_of(as_json, form)
    if detail not in (None, "brief", "full"):
        raise RequestError(f"unknown detail '{detail}'", "Known: brief, full.")
    return Shape(found, found == "json" if detail is None else detail == "full")


def form_of(as_json: bool, given: str | None) -> Form:
    """Return the requested form.

    Raises:
        RequestError: there is no such form, or two of them were requested.
    """
    found = next((form for form in FORMS if form == given), None)
    if given is not None and found is None:
        fix = "`omgoptim report` and `omgoptim runs open` write a page" if given == "html" else ""
        raise RequestError(f"unknown format '{given[:80]}'", did_you_mean(given, FORMS), fix)
    if as_json and found not in (None, "json"):
        raise RequestError(f"--json and --format {found} exclude each other", "", "give one of them")
    return "json" if as_json else found or "text"


def form_in(arguments: Sequence[str]) -> Form:
    """Return the output form of a command line, even an invalid one: its error is printed in that form."""
    given = [after for before, after in pairwise(arguments) if before == "--format"]
    given += [word.partition("=")[2] for word in arguments if word.startswith("--format=")]
    if "--json" in arguments:
        return "json"
    return next((form for form in FORMS if form in given), "text")


def show_report(report: EfficiencyReport, folder: RunFolder, shape: Shape) -> int:
    """Print a report; return the exit code of its run."""
    if shape.form == "markdown":
        print_text(shared.shared_markdown(report))
    else:
        content = brief.to_json(report) if shape.full else brief.brief_report(report, folder.path)
        show(content, lambda term: term.report_view(report, full=shape.full, folder=folder.path), shape.form)
    return GUARD_FAILED if report.outcome == "guard_failed" else 0


def show_state(state: RunState, form: Form) -> int:
    """Print the state of a run."""
    if form == "markdown":
        return print_text(shared.without_paths_in(markdown.state_markdown(state)))
    return show(brief.to_json(state), lambda term: term.state_view(state), form)


def show_states(states: list[RunState], form: Form) -> int:
    """Print a list of runs."""
    if form == "markdown":
        return print_text(shared.without_paths_in(markdown.runs_markdown(states, len(states))))
    return show({"runs": [brief.to_json(state) for state in states]}, lambda term: term.runs_view(states), form)


def show(content: dict[str, Any], view: Callable[[Any], Any], form: Form) -> int:
    """Print an answer: as JSON, or as what `view` makes of it with `omgoptim.render.terminal`."""
    if form == "json":
        print_json(content)
    else:
        from omgoptim.render import terminal

        console(sys.stdout).print(view(terminal), crop=False)
    return 0


def print_text(text: str) -> int:
    """Print a text as it is."""
    typer.echo(text.rstrip("\n"))
    return 0


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object."""
    typer.echo(json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """Return an object as JSON whose every text is clean."""
    return json.dumps(clean_json(content, ("load", "log")), indent=2)


def print_error(error: OmgoptimError, form: Form) -> int:
    """Print an error to standard error, and in another form than text to standard output too; return its exit code."""
    from omgoptim.render.terminal import error_view

    if form == "json":
        record = error.to_dict()
        print_json({"error": record | {"fix": in_shell(record["fix"])}})
    if form == "markdown":
        print_text(shared.error_to_share(error))
    console(sys.stderr).print(error_view(error), soft_wrap=True)
    return error.exit_code


def console(stream: Any) -> Any:
    """Return a console for a stream; of a fixed width unless it is a terminal."""
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else _WIDTH_OF_A_PIPE, highlight=False)

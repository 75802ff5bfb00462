"""The shell face: parse, submit, follow, print. No logic of its own.

Exit codes: 0 ok and no gain, 2 a bad request, 3 the model, the data, the set-up or the run, 4 the quality guard failed,
130 interrupted. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from omgoptim import __version__, requests
from omgoptim.cli import options
from omgoptim.errors import OmgoptimError, RequestError, RunError, did_you_mean
from omgoptim.jobs.cancel import cancel
from omgoptim.jobs.doctor import doctor
from omgoptim.jobs.folder import RunFolder, find_run
from omgoptim.jobs.follow import follow
from omgoptim.jobs.pick import pick
from omgoptim.jobs.project import find_project
from omgoptim.jobs.resume import resume
from omgoptim.jobs.states import list_runs, load_report, read_state
from omgoptim.jobs.submit import submit
from omgoptim.render import brief
from omgoptim.reports import DoctorReport, EfficiencyReport
from omgoptim.requests.command import in_shell
from omgoptim.text import clean_json

GUARD_FAILED = 4
INTERRUPTED = 130
_WIDTH_OF_A_PIPE = 110


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `omgoptim`."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    as_json = "--json" in arguments
    try:
        _refuse_unknown_command(arguments)
        return int(application()(args=arguments, prog_name="omgoptim", standalone_mode=False) or 0)
    except OmgoptimError as error:
        return _print_error(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 the outermost frame: a fault of ours must still answer in the promised form
        if hasattr(error, "format_message"):  # a usage error, of Typer's or of click's, whichever Typer was built on
            return _print_error(_usage_error(error), as_json)
        traceback.print_exc()
        fault = OmgoptimError(
            f"omgoptim itself failed: {error}", type(error).__name__, "please report the traceback above"
        )
        return _print_error(fault, as_json)


def _refuse_unknown_command(arguments: list[str]) -> None:
    """Raise for a command that does not exist; no option before it takes a value."""
    command = next((word for word in arguments if not word.startswith("-")), None)
    known = [*requests.VERBS, *_COMMANDS]
    if command is not None and command not in known:
        fix = "omgoptim --help shows what is possible"
        raise RequestError(f"unknown command '{command[:80]}'", did_you_mean(command, known), fix)


def application() -> typer.Typer:
    """The Typer application: one command per verb, and runs, pick, doctor, mcp."""
    app = typer.Typer(name="omgoptim", pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="rich")
    app.callback(invoke_without_command=True)(_root)
    for verb, request in requests.VERBS.items():
        app.command(verb)(_verb_command(verb, request))
    for name, command in _COMMANDS.items():
        app.command(name)(command)
    return app


def _root(
    ctx: typer.Context, version: bool = typer.Option(False, "--version", metavar="", help="Print the version.")
) -> None:
    """Make a PyTorch model smaller and faster; every number is measured on the saved artifact."""
    if version:
        typer.echo(__version__)
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _verb_command(verb: str, request: type[requests.Request]) -> Callable[..., int]:
    """The function of a verb, with the signature that Typer reads its options from."""

    def command(**given: Any) -> int:
        as_json, no_wait, detail = (given.pop(name) for name in ("as_json", "no_wait", "detail"))
        parsed = requests.parse(verb, options.given_arguments(request, given))
        full = _wants_full(detail, as_json)
        folder = submit(verb, parsed, find_project(getattr(parsed, "project", None)))
        if no_wait:
            _print_json(brief.to_json(read_state(folder))) if as_json else typer.echo(folder.id)
            return 0
        return _await_report(folder, as_json, full)

    own = [parameter for option in options.options_of(request) for parameter in option.parameters()]
    parameters = [*own, *_FACE_PARAMETERS]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = "\n\n".join(" ".join(part.split()) for part in (request.__doc__ or "").split("\n\n"))
    return command


_AS_JSON = typer.Option(
    False,
    "--json",
    metavar="",
    help="Print one JSON object and nothing else on stdout.",
    rich_help_panel=options.OUTPUT,
)
_DETAIL = typer.Option(
    None, "--detail", metavar="brief|full", help="How much of the report to print.", rich_help_panel=options.OUTPUT
)
_NO_WAIT = typer.Option(
    False, "--no-wait", metavar="", help="Print the run's id and return at once.", rich_help_panel=options.OUTPUT
)
_PROJECT = typer.Option(None, "--project", metavar="TEXT", help="Path of the project; default: the working directory.")


def _face_parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_FACE_PARAMETERS = [
    _face_parameter("as_json", bool, _AS_JSON),
    _face_parameter("detail", str | None, _DETAIL),
    _face_parameter("no_wait", bool, _NO_WAIT),
]


def _runs(
    action: str = typer.Argument("list", metavar="[list|show|wait|cancel|resume|pick]", help="What to do."),
    run_id: str | None = typer.Argument(None, metavar="[ID]", help="Run id; its start or end is enough."),
    name: str | None = typer.Argument(
        None, metavar="[NAME]", help="For pick: name of one of the report's alternatives."
    ),
    project: str | None = _PROJECT,
    as_json: bool = _AS_JSON,
    detail: str | None = _DETAIL,
) -> int:
    """List runs; show, wait for, cancel or resume one; or pick another finalist of a quantize run."""
    given = {"action": action, "run_id": run_id, "name": name, "project": project}
    request = requests.parse("runs", {name: value for name, value in given.items() if value is not None})
    assert isinstance(request, requests.RunsRequest)  # what parse gives for this verb
    root = find_project(request.project)
    if request.action == "list":
        states = list_runs(root)
        return _show({"runs": [brief.to_json(state) for state in states]}, lambda term: term.runs_view(states), as_json)
    folder = find_run(root, request.run_id or "")
    if request.action == "cancel":
        state = cancel(folder)
        return _show(brief.to_json(state), lambda term: term.state_view(state), as_json)
    full = _wants_full(detail, as_json)
    if request.action == "pick":
        report = pick(folder, request.name or "")
        _show_report(report, folder, as_json, full)
        return GUARD_FAILED if report.outcome == "guard_failed" else 0
    if request.action == "resume":
        resume(folder)
    if request.action in ("wait", "resume"):
        return _await_report(folder, as_json, full)
    state = read_state(folder)
    if state.status in ("starting", "queued", "running"):
        return _show(brief.to_json(state), lambda term: term.state_view(state), as_json)
    return _show_report(load_report(folder), folder, as_json, full)


def _pick(
    run_id: str = typer.Argument(..., metavar="ID", help="Run id; its start or end is enough."),
    name: str = typer.Argument(..., metavar="NAME", help="Name of one of the report's alternatives."),
    project: str | None = _PROJECT,
    as_json: bool = _AS_JSON,
    detail: str | None = _DETAIL,
) -> int:
    """Replace a quantize run's artifact by another of its finalists; nothing is computed again."""
    return _runs("pick", run_id, name, project, as_json, detail)


def _doctor(
    project: str | None = _PROJECT,
    python: str | None = typer.Option(None, "--python", metavar="TEXT", help="Python interpreter to check."),
    target: str | None = typer.Option(None, "--target", metavar="TEXT", help="Machine to check: ssh://[user@]host."),
    clean: bool = typer.Option(False, "--clean", help="Remove what omgoptim has stored on the target."),
    as_json: bool = _AS_JSON,
) -> int:
    """Report the engines, devices and optional packages of the project's Python, and how to install missing ones."""
    given = {"project": project, "python": python, "target": target, "clean": clean or None}
    request = requests.parse("doctor", {name: value for name, value in given.items() if value is not None})
    assert isinstance(request, requests.DoctorRequest)  # what parse gives for this verb
    report: DoctorReport = doctor(request)
    return _show(brief.to_json(report), lambda term: term.doctor_view(report), as_json)


def _mcp(
    http: bool = typer.Option(
        False, "--http", metavar="", help="Serve HTTP on the loopback interface instead of stdio."
    ),
    port: int = typer.Option(8377, "--port", help="Port for --http; 0 takes a free one.", min=0, max=65535),
) -> None:
    """Start the MCP server: over stdio, or over HTTP with a bearer token ($OMGOPTIM_TOKEN, else a new one)."""
    from omgoptim import server  # the one command that needs mcp

    server.serve_http(port) if http else server.main()


_COMMANDS: dict[str, Callable[..., Any]] = {"runs": _runs, "pick": _pick, "doctor": _doctor, "mcp": _mcp}
"""Commands beside the verbs."""


def _await_report(folder: RunFolder, as_json: bool, full: bool) -> int:
    """Follow a run to its end, showing where it stands, and print its report."""
    from omgoptim.cli.progress import display

    console = _console(sys.stderr)
    console.print(f"run {folder.id}", style="dim", markup=False, highlight=False, soft_wrap=True)
    try:
        with display(console) as shown:
            for state in follow(folder, timeout_s=None):
                shown.show(state)
    except KeyboardInterrupt:
        state = cancel(folder)
        if state.status == "cancelled":
            _print_error(RunError(f"cancelled run {folder.id}", "it was interrupted", ""), as_json)
            return INTERRUPTED
    report = load_report(folder)
    _show_report(report, folder, as_json, full)
    return GUARD_FAILED if report.outcome == "guard_failed" else 0


def _show_report(report: EfficiencyReport, folder: RunFolder, as_json: bool, full: bool) -> int:
    content = brief.to_json(report) if full else brief.brief_report(report, folder.path)
    return _show(content, lambda term: term.report_view(report, full=full, folder=folder.path), as_json)


def _show(content: dict[str, Any], view: Callable[[Any], Any], as_json: bool) -> int:
    """Print an answer: as JSON, or as what `view` makes of it with `omgoptim.render.terminal`."""
    if as_json:
        _print_json(content)
    else:
        from omgoptim.render import terminal

        _console(sys.stdout).print(view(terminal), crop=False)
    return 0


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(clean_json(content, ("load", "log")), indent=2))


def _print_error(error: OmgoptimError, as_json: bool) -> int:
    from omgoptim.render.terminal import error_view

    if as_json:
        record = error.to_dict()
        _print_json({"error": record | {"fix": in_shell(record["fix"])}})
    _console(sys.stderr).print(error_view(error), soft_wrap=True)
    return error.exit_code


def _usage_error(error: Exception) -> RequestError:
    """A usage error in the words of the request where the request has words for it."""
    context = getattr(error, "ctx", None)
    verb = context.info_name if context is not None else ""
    message = error.format_message()  # type: ignore[attr-defined]
    request = (requests.VERBS | requests.QUERIES).get(verb)
    option = getattr(error, "option_name", None)
    missing = getattr(getattr(error, "param", None), "name", None)
    raw: dict[str, Any] | None = None
    if option and message.startswith("No such option"):
        raw = {option.lstrip("-").replace("-", "_"): ""}
    elif request is not None and missing in request.model_fields:
        raw = {name: "?" for name, field in request.model_fields.items() if field.is_required() and name != missing}
    try:
        if request is not None and raw is not None:
            requests.parse(verb, raw)
    except RequestError as refused:
        return refused
    command = f"omgoptim {verb}" if request is not None else "omgoptim"
    return RequestError(message.rstrip("."), "", f"{command} --help shows what is possible")


def _wants_full(detail: str | None, as_json: bool) -> bool:
    if detail not in (None, "brief", "full"):
        raise RequestError(f"unknown detail '{detail}'", "Known: brief, full.")
    return as_json if detail is None else detail == "full"


def _console(stream: Any) -> Any:
    from rich.console import Console

    width = None if stream.isatty() else _WIDTH_OF_A_PIPE
    return Console(file=stream, width=width, highlight=False)

"""Command line: parse, submit, follow, print. No logic of its own.

Exit codes: 0 ok and no gain, 2 a bad request, 3 the model, the data, the set-up or the run, 4 the quality guard failed,
130 interrupted. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from omgoptim import __version__, requests
from omgoptim.cli import options, output, runs
from omgoptim.cli.output import INTERRUPTED, Shape
from omgoptim.errors import OmgoptimError, RequestError, did_you_mean
from omgoptim.jobs.doctor import doctor
from omgoptim.jobs.project import find_project
from omgoptim.jobs.states import read_state
from omgoptim.jobs.submit import submit
from omgoptim.render.brief import to_json


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `omgoptim`."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    form = output.form_in(arguments)
    try:
        _refuse_unknown_command(arguments)
        return int(application()(args=arguments, prog_name="omgoptim", standalone_mode=False) or 0)
    except OmgoptimError as error:
        return output.print_error(error, form)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 the outermost frame: a fault of ours must still answer in the promised form
        if hasattr(error, "format_message"):  # a usage error, of Typer's or of click's, whichever Typer was built on
            return output.print_error(_usage_error(error), form)
        traceback.print_exc()
        fault = OmgoptimError(
            f"omgoptim itself failed: {error}", type(error).__name__, "please report the traceback above"
        )
        return output.print_error(fault, form)


def _refuse_unknown_command(arguments: list[str]) -> None:
    """Raise for a command that does not exist; no option before it takes a value."""
    command = next((word for word in arguments if not word.startswith("-")), None)
    known = [*requests.VERBS, *_COMMANDS]
    if command is not None and command not in known:
        fix = "omgoptim --help lists the commands"
        raise RequestError(f"unknown command '{command[:80]}'", did_you_mean(command, known), fix)


def application() -> typer.Typer:
    """Return the Typer application: one command per verb, and runs, report, pick, doctor, mcp."""
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
    """Return the function of a verb, with the signature that Typer reads its options from."""

    def command(no_wait: bool, shape: Shape, **given: Any) -> int:
        parsed = requests.parse(verb, options.given_arguments(request, given))
        folder = submit(verb, parsed, find_project(getattr(parsed, "project", None)))
        if not no_wait:
            return runs.await_report(folder, shape)
        if shape.form == "text":
            return output.print_text(folder.id)
        return output.show_state(read_state(folder), shape.form)

    parameters = [parameter for option in options.options_of(request) for parameter in option.parameters()]
    parameters.append(output.parameter("no_wait", bool, _NO_WAIT))
    command.__doc__ = "\n\n".join(" ".join(part.split()) for part in (request.__doc__ or "").split("\n\n"))
    return output.with_output_options(output.with_signature(command, parameters))


_NO_WAIT = typer.Option(
    False, "--no-wait", metavar="", help="Print the run's id and return at once.", rich_help_panel=options.OUTPUT
)


def _doctor(
    project: str | None = output.PROJECT,
    python: str | None = typer.Option(None, "--python", metavar="TEXT", help="Python interpreter to check."),
    target: str | None = typer.Option(
        None, "--target", metavar="TEXT", help="Machine to check: ssh://\\[user@]host\\[:port]."
    ),
    clean: bool = typer.Option(False, "--clean", metavar="", help="Remove what omgoptim has stored on the target."),
    as_json: bool = output.AS_JSON,
) -> int:
    """Report the engines, devices and optional packages of the project's Python, and how to install missing ones."""
    given = {"project": project, "python": python, "target": target, "clean": clean or None}
    request = requests.parse("doctor", {name: value for name, value in given.items() if value is not None})
    assert isinstance(request, requests.DoctorRequest)  # what parse gives for this verb
    report = doctor(request)
    return output.show(to_json(report), lambda term: term.doctor_view(report), "json" if as_json else "text")


def _mcp(
    http: bool = typer.Option(
        False, "--http", metavar="", help="Serve HTTP on the loopback interface instead of stdio."
    ),
    port: int = typer.Option(
        8377, "--port", metavar="PORT", help="Port for --http; 0: any free port.", min=0, max=65535
    ),
) -> None:
    """Start the MCP server: over stdio, or over HTTP with a bearer token ($OMGOPTIM_TOKEN, else a new one)."""
    from omgoptim import server  # the one command that needs mcp

    server.serve_http(port) if http else server.main()


_COMMANDS: dict[str, Callable[..., Any]] = {
    "runs": runs.runs,
    "report": runs.report,
    "pick": runs.pick_command,
    "doctor": _doctor,
    "mcp": _mcp,
}
"""Commands beside the verbs."""


def _usage_error(error: Exception) -> RequestError:
    """Return a usage error in the words of the request where the request has words for it."""
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
    return RequestError(message.rstrip("."), "", f"{command} --help lists the commands")

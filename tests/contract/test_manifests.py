"""Every manifest, command and skill says the same as the code: names, versions, verbs, arguments, nothing missing."""

from __future__ import annotations

import ast
import json
import re
import struct
import typing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

import omgoptim
from omgoptim import blocks, cli
from omgoptim.requests import QUERIES, VERBS, Request, techniques
from omgoptim.server.tools import SHELL_ONLY, tools
from omgoptim.server.tools import options_of as options_of_tool

ROOT = Path(__file__).parents[2]
ALL = VERBS | QUERIES
COMMANDS = sorted((ROOT / "commands").glob("*.md"))
SKILLS = [ROOT / "SKILL.md", *sorted((ROOT / "skills").glob("*/SKILL.md"))]
PAGES = [*COMMANDS, *SKILLS, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PORTABLE_KEYS = {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}
COMMAND_KEYS = {"description", "argument-hint", "allowed-tools", "disable-model-invocation"}
TOOL_FORMS = ("mcp__plugin_omgoptim_omgoptim__", "mcp__omgoptim__")
"""Names of a tool in Claude Code: started by the plugin, and added by hand."""

CLOSED = {"type": "object", "additionalProperties": False}
TEXT = {"type": "string", "minLength": 1}
AUTHOR = CLOSED | {"properties": {"name": TEXT, "email": TEXT, "url": TEXT}, "required": ["name"]}
KEBAB = {"type": "string", "pattern": r"^[a-z0-9]+(-[a-z0-9]+)*$", "maxLength": 64}
ABOUT = {"name": KEBAB, "version": TEXT, "description": TEXT, "license": TEXT, "keywords": {"items": TEXT}}
STDIO = {"command": TEXT, "args": {"items": TEXT}, "env": {"additionalProperties": TEXT}}
AGENT_PLUGINS = "https://agent-plugins.org/schemas/1.0.0"

SCHEMAS: dict[str, dict[str, Any]] = {
    ".claude-plugin/plugin.json": CLOSED
    | {
        "properties": ABOUT | {"displayName": TEXT, "author": AUTHOR, "skills": {"items": TEXT}, "icon": TEXT},
        "required": [*ABOUT, "author", "skills"],
    },
    ".claude-plugin/marketplace.json": CLOSED
    | {
        "properties": {
            "name": KEBAB,
            "description": TEXT,
            "owner": AUTHOR,
            "plugins": {
                "minItems": 1,
                "maxItems": 1,
                "items": CLOSED
                | {"properties": ABOUT | {"source": {"const": "./"}, "category": TEXT}, "required": ["name", "source"]},
            },
        },
        "required": ["name", "description", "owner", "plugins"],
    },
    ".mcp.json": CLOSED
    | {
        "properties": {"mcpServers": {"additionalProperties": CLOSED | {"properties": STDIO, "required": ["command"]}}},
        "required": ["mcpServers"],
    },
    "plugin.json": CLOSED
    | {
        "properties": ABOUT | {"$schema": {"const": f"{AGENT_PLUGINS}/plugin.schema.json"}, "author": AUTHOR},
        "required": ["$schema", *ABOUT],
    },
    "mcp.json": CLOSED
    | {
        "properties": {
            "$schema": {"const": f"{AGENT_PLUGINS}/mcp.schema.json"},
            "mcpServers": {
                "additionalProperties": CLOSED
                | {"properties": STDIO | {"type": {"const": "stdio"}}, "required": ["type", "command"]}
            },
        },
        "required": ["$schema", "mcpServers"],
    },
    "server.json": CLOSED
    | {
        "properties": {
            "$schema": {"pattern": r"^https://static\.modelcontextprotocol\.io/schemas/\d{4}-\d\d-\d\d/server\.schema\.json$"},
            "name": {"pattern": r"^[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+$"},
            "title": TEXT,
            "description": TEXT | {"maxLength": 100},
            "version": TEXT,
            "packages": {"minItems": 1, "items": {"required": ["registryType", "identifier", "version", "transport"]}},
        },
        "required": ["$schema", "name", "description", "version", "packages"],
    },
}  # fmt: skip


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / name).read_text())
    return loaded


def page(path: Path) -> tuple[dict[str, Any], str]:
    """Frontmatter and body of a command or skill."""
    match = re.fullmatch(r"---\n(.*?)\n---\n(.*)", path.read_text(), re.DOTALL)
    assert match, f"{path} has no frontmatter"
    return yaml.safe_load(match[1]), match[2]


def arguments_of(request: type[Request]) -> set[str]:
    """Return the arguments of a verb: its own, and those of its techniques."""
    return {*request.model_fields, *(name for kind in techniques(request).values() for name in kind.model_fields)}


TOOLS = {tool.name: {*tool.input_schema["properties"], *options_of_tool(tool.name)} for tool in tools()}
"""The MCP tools by name, with the arguments that they list and those that they take in `options`."""
ARGUMENTS = set().union(*TOOLS.values())


SHELL = typer.main.get_command(cli.application()).commands
"""The shell's commands by name."""


def options_of(command: str) -> set[str]:
    """`--option`s of a command of the shell."""
    return {option for parameter in SHELL[command].params for option in (*parameter.opts, *parameter.secondary_opts)}


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def shell_lines(text: str) -> list[list[str]]:
    """Words of every line, in a block or inline, that calls omgoptim."""
    blocks = [
        line
        for language in ("", "sh", "shell", "console")
        for block in fences(text, language)
        for line in block.splitlines()
    ]
    lines = [line.strip().removeprefix("$ ") for line in blocks + inline_code(text)]
    return [line.partition("  #")[0].split() for line in lines if re.match(r"omgoptim( |$)", line)]  # fmt: skip


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Manifests


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_manifest_has_the_form_its_readers_accept(name: str) -> None:
    jsonschema.validate(manifest(name), SCHEMAS[name])


def test_every_manifest_carries_the_version_of_the_package() -> None:
    server = manifest("server.json")
    versions = {
        ".claude-plugin/plugin.json": manifest(".claude-plugin/plugin.json")["version"],
        ".claude-plugin/marketplace.json": manifest(".claude-plugin/marketplace.json")["plugins"][0]["version"],
        "plugin.json": manifest("plugin.json")["version"],
        "server.json": server["version"],
        "server.json, package": server["packages"][0]["version"],
        "CITATION.cff": yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"],
    }
    assert versions == dict.fromkeys(versions, omgoptim.__version__)


def test_every_manifest_describes_the_plugin_in_the_same_words() -> None:
    ours = manifest(".claude-plugin/plugin.json")
    keys = ("name", "description", "license", "keywords")
    for other in (manifest("plugin.json"), manifest(".claude-plugin/marketplace.json")["plugins"][0]):
        assert {key: other[key] for key in keys} == {key: ours[key] for key in keys}
    project = (ROOT / "pyproject.toml").read_text()
    assert f'license = "{ours["license"]}"' in project
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_both_server_entries_start_the_launcher_under_the_same_short_name() -> None:
    claude, portable = manifest(".mcp.json")["mcpServers"], manifest("mcp.json")["mcpServers"]
    assert list(claude) == list(portable) == ["omgoptim"]
    for entry, root in ((claude["omgoptim"], "${CLAUDE_PLUGIN_ROOT}"), (portable["omgoptim"], "${PLUGIN_ROOT}")):
        assert entry["command"] == "uv"
        *how, script = entry["args"]
        assert how == ["run", "--script"]
        assert script.startswith(f"{root}/")
        assert (ROOT / script.removeprefix(f"{root}/")).is_file()
    assert "PLUGIN_DATA" not in portable["omgoptim"].get("env", {}), "reserved by Agent Plugins"


def test_the_registry_entry_and_the_readme_name_the_same_server() -> None:
    server = manifest("server.json")
    assert f"<!-- mcp-name: {server['name']} -->" in (ROOT / "README.md").read_text()
    assert server["packages"][0]["identifier"] == "omgoptim"
    assert server["packages"][0]["transport"] == {"type": "stdio"}


def test_the_skill_folders_of_the_plugin_hold_every_skill() -> None:
    folders = [(ROOT / folder).resolve() for folder in manifest(".claude-plugin/plugin.json")["skills"]]
    found = {
        path.resolve() for folder in folders for pattern in ("SKILL.md", "*/SKILL.md") for path in folder.glob(pattern)
    }
    assert found == {path.resolve() for path in SKILLS}  # fmt: skip


def test_the_icon_is_a_square_image_of_an_accepted_size() -> None:
    head = (ROOT / "assets" / "icon.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width == height
    assert 512 <= width <= 2048


def test_the_launcher_needs_only_light_packages_in_the_versions_of_the_project() -> None:
    header = re.search(
        r"^# /// script\n(.*?)^# ///$", (ROOT / "plugin" / "server.py").read_text(), re.DOTALL | re.MULTILINE
    )
    assert header  # fmt: skip
    wanted = re.findall(r'^#   "(.+)",$', header[1], re.MULTILINE)
    names = {re.split(r"[<>=]", item)[0] for item in wanted}
    assert names == {"mcp", "pydantic", "filelock", "psutil", "typing-extensions"}
    listed = re.findall(r'^  "([^"]+)",', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    shared = {item for item in listed if re.split(r"[<>=]", item)[0] in names}
    assert shared <= set(wanted)


# Commands


def test_every_verb_has_one_command_and_every_command_a_verb() -> None:
    assert (
        {path.stem for path in COMMANDS} == set(ALL) == set(TOOLS) == set(SHELL) - {"mcp", "pick", "report"}
    )  # pick is an action of runs, report is for people


@pytest.mark.parametrize("path", COMMANDS, ids=page_id)
def test_a_command_has_only_known_keys_and_a_quoted_hint(path: Path) -> None:
    head, body = page(path)
    assert set(head) == COMMAND_KEYS
    assert re.search(r'^argument-hint: ".+"$', path.read_text(), re.MULTILINE)
    assert 20 <= len(head["description"]) <= 200
    assert body.count("$ARGUMENTS") == 1


@pytest.mark.parametrize("path", COMMANDS, ids=page_id)
def test_a_command_allows_its_own_tools_under_both_names_and_only_when_a_person_calls_it(path: Path) -> None:
    head, body = page(path)
    allowed = [tool.strip() for tool in head["allowed-tools"].split(",")]
    verbs = [{tool.removeprefix(form) for tool in allowed if tool.startswith(form)} for form in TOOL_FORMS]
    assert verbs[0] == verbs[1]
    assert len(allowed) == 2 * len(verbs[0])
    assert path.stem in verbs[0]
    assert verbs[0] <= set(ALL)
    assert verbs[0] == {verb for verb in ALL if re.search(rf"[Cc]all `{verb}`", body)} | {path.stem}
    assert head["disable-model-invocation"] is True


@pytest.mark.parametrize("path", COMMANDS, ids=page_id)
def test_the_hint_of_a_command_names_real_options_of_its_verb(path: Path) -> None:
    options = re.findall(r"--[a-z-]+", page(path)[0]["argument-hint"])
    assert set(options) <= options_of(path.stem)


@pytest.mark.parametrize("verb", ALL)
def test_a_tool_takes_the_arguments_of_its_request_and_few_of_its_own(verb: str) -> None:
    kinds_of_params = techniques(ALL[verb]).values()
    fields = [field for kind in kinds_of_params for field in kind.model_fields.items()]
    kinds = {
        name: (typing.get_origin(field.annotation), len(typing.get_args(field.annotation))) for name, field in fields
    }
    without_choice = {name for name, kind in kinds.items() if kind == (typing.Literal, 1)}
    told_by_the_name = {"source" for kind in kinds_of_params if kind.by_source}
    assert arguments_of(ALL[verb]) - TOOLS[verb] <= without_choice | told_by_the_name | set(SHELL_ONLY)
    assert not TOOLS[verb] & set(SHELL_ONLY)
    assert TOOLS[verb] - arguments_of(ALL[verb]) <= {"wait_s", "detail", "options"}


# Skills


@pytest.mark.parametrize("path", SKILLS, ids=page_id)
def test_a_skill_has_only_the_portable_keys_and_says_when_to_use_it(path: Path) -> None:
    head, body = page(path)
    assert {"name", "description"} <= set(head) <= PORTABLE_KEYS
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", head["name"])
    assert len(head["name"]) <= 64
    assert "Use when" in head["description"]
    assert len(head["description"]) <= 1024
    assert len(body.splitlines()) <= 300
    if path.parent != ROOT:
        assert head["name"] == path.parent.name


def test_no_skill_shares_its_name_with_a_command_or_another_skill() -> None:
    names = [page(path)[0]["name"] for path in SKILLS] + [path.stem for path in COMMANDS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_a_skill_that_a_page_points_to_exists(path: Path) -> None:
    named = set(re.findall(r"skill `([^`]+)`", path.read_text()))
    assert named <= {page(skill)[0]["name"] for skill in SKILLS}


def test_the_overview_has_every_technique_and_no_other() -> None:
    lines = [line for line in (ROOT / "SKILL.md").read_text().splitlines() if line.startswith("|")]
    here = [row.split("|")[-2].strip() for row in lines[2:]]
    present = {name for cell in here for name in re.findall(r"`(?:scheme|method|student)=(\w+)`", cell)}
    named = {name for request in VERBS.values() for name, kind in techniques(request).items() if not kind.by_source}
    assert present == named - {"auto"}
    one = r"`(?:scheme|method|student)=\w+`"
    assert [cell for cell in here if not re.fullmatch(rf"{one}(, {one})*", cell)] == []


# What the pages say to call


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_an_argument_in_backticks_exists(path: Path) -> None:
    code = inline_code(path.read_text())
    named = {name for text in code for name in re.findall(r"(?<![\w-])([a-z_]+)=", text)}
    keys = {key for text in code if text.startswith("{") for key in json.loads(text)}
    assert named | keys <= ARGUMENTS
    options = {option for text in code for option in re.findall(r"^--[a-z-]+", text)}
    assert options <= {option for command in SHELL for option in options_of(command)}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_a_shell_line_names_a_command_and_its_options(path: Path) -> None:
    for _, *words in shell_lines(path.read_text()):
        command = words[0] if words else "doctor"
        options = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
        assert command in SHELL
        assert options <= options_of(command), " ".join(words)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_a_call_in_python_uses_real_names(path: Path) -> None:
    for block in fences(path.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "omgoptim":
                assert node.attr in omgoptim.__all__
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ALL:
                assert {word.arg for word in node.keywords} <= arguments_of(ALL[node.func.attr])


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "CONTRIBUTING.md", "AGENTS.md", "SKILL.md"),
        *("docs/index.md", "docs/guide.md", "docs/how-to.md", "docs/report.md", "docs/reports.md"),
        *("docs/timing.md", "docs/quantization.md", "docs/pruning.md", "docs/distillation.md"),
    ],
)
def test_a_file_of_this_repository_that_a_page_names_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    tops = "omgoptim|tests|commands|skills|plugin|docs|examples|benchmarks"
    named = {code for code in inline_code(text) if re.fullmatch(rf"({tops})/[\w./-]*", code)}
    linked = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")}
    there = [ROOT / path for path in named] + [(ROOT / name).parent / path for path in linked]
    assert [path for path in there if not path.exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_reference_has_every_command_and_public_name() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    modules = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    documented = {name.rpartition(".")[2] for name in modules}
    public = {name: getattr(omgoptim, name).__module__ for name in omgoptim.__all__ if name != "__version__"}
    assert [name for name, home in public.items() if name not in documented and home not in modules] == []
    assert set(blocks.__all__) - {"BLOCKS"} <= documented
    homes = {verb: {request.__module__, f"{request.__module__}.{request.__name__}"} for verb, request in VERBS.items()}
    assert [verb for verb, home in homes.items() if not home & modules] == []


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f": {path.name}\n" not in navigation] == []


def test_the_readme_shows_every_verb_as_a_shell_line() -> None:
    shown = {words[1] for words in shell_lines((ROOT / "README.md").read_text()) if len(words) > 1}
    assert shown - {"pick"} == {*ALL, "mcp", "report"}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_no_page_promises_a_speed(path: Path) -> None:
    text = re.sub(r"<!-- demo:start -->.*<!-- demo:end -->", "", path.read_text(), flags=re.DOTALL)
    assert re.findall(r"\b\d+(?:\.\d+)?\s?(?:x|×|times)\s(?:faster|smaller|speed)", text) == []
    assert re.findall(r"\b\d+(?:\.\d+)?\s?ms\b", text) == []

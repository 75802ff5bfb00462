"""The plugin's slash commands as MCP prompts: one source, the files commands/*.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import omgoptim

_PACKAGE = Path(omgoptim.__file__).resolve().parent
_FRONTMATTER = re.compile(r"---\n(.*?)\n---\n(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Command:
    """One slash command."""

    name: str
    description: str
    argument_hint: str
    body: str

    def text(self, arguments: str) -> str:
        """The command as it is sent, its arguments put in."""
        if "$ARGUMENTS" in self.body:
            return self.body.replace("$ARGUMENTS", arguments)
        return f"{self.body}\n\nARGUMENTS: {arguments}" if arguments else self.body


def commands() -> list[Command]:
    """Every command, by name. In an installed package they lie in it, in a checkout beside it."""
    inside, beside = _PACKAGE / "_commands", _PACKAGE.parent / "commands"
    folder = inside if inside.is_dir() else beside
    return [_read(path) for path in sorted(folder.glob("*.md"))]


def _read(path: Path) -> Command:
    text = path.read_text(encoding="utf-8")
    match = _FRONTMATTER.fullmatch(text)
    head, body = (match[1], match[2]) if match else ("", text)
    values = dict(re.findall(r"^([a-z-]+):[ ]*(.*)$", head, re.MULTILINE))
    header = {name: value.strip().strip("\"'") for name, value in values.items()}
    return Command(path.stem, header.get("description", ""), header.get("argument-hint", ""), body.strip())

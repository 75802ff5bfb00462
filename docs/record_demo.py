"""Put the output of a real `make demo` into docs/report.md (as text) and docs/demo.svg (as a picture of the terminal).

make demo
.venv/bin/python docs/record_demo.py .omgoptim/runs/quantize-…
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from omgoptim.render.terminal import report_view
from omgoptim.reports import EfficiencyReport

DOCS = Path(__file__).parent
PAGE = DOCS / "report.md"
START, END = "<!-- demo:start -->", "<!-- demo:end -->"
BLOCK = f"""{START}
```text
{{text}}
```
{END}"""


def main() -> None:
    folder = Path(sys.argv[1])
    report = EfficiencyReport.model_validate_json((folder / "report.json").read_text())
    shown = Path(folder.parts[-3], *folder.parts[-2:])  # as seen from the project, whoever's machine it was
    report = EfficiencyReport.model_validate_json(report.model_dump_json().replace(str(folder.resolve()), str(shown)))
    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
    console.print(report_view(report, folder=shown), crop=False)
    text = "\n".join(line.rstrip() for line in console.export_text(clear=False).splitlines())
    drawn = console.export_svg(title="make demo")
    (DOCS / "demo.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))  # no fonts off the web
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BLOCK.format(text=text) + after)


if __name__ == "__main__":
    main()

"""Record the output of `make demo` in docs/report.md (as text) and docs/demo.svg (as a picture of the terminal).

make recordings
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from omgoptim.render.shared import without_paths
from omgoptim.render.terminal import report_view
from omgoptim.reports import EfficiencyReport

DOCS = Path(__file__).parent
PAGE = DOCS / "report.md"
START, END = "<!-- demo:start -->", "<!-- demo:end -->"
BUSIEST = 0.1
"""Load by other processes, as a fraction of the machine, above which times are not worth recording."""
BLOCK = f"""{START}
```text
{{text}}
```
{END}"""
DEMO = (
    *("quantize", "examples/digits_cnn.py:build"),
    *("--data", "examples/digits_cnn.py:load", "--max-quality-drop", "0.01", "--json"),
)


def main() -> None:
    command = [sys.executable, "-m", "omgoptim.cli", *DEMO]
    done = subprocess.run(command, cwd=DOCS.parent, stdout=subprocess.PIPE, text=True, check=True)
    report = without_paths(EfficiencyReport.model_validate(json.loads(done.stdout)))
    if report.environment.load is None or report.environment.load > BUSIEST:
        sys.exit("not recorded: other processes used the machine; run it again when it is idle")
    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
    console.print(report_view(report, folder=Path(".omgoptim/runs", report.run_id)), crop=False)
    text = "\n".join(line.rstrip() for line in console.export_text(clear=False).splitlines())
    drawn = console.export_svg(title="make demo")
    (DOCS / "demo.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))  # no fonts off the web
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BLOCK.format(text=text) + after)


if __name__ == "__main__":
    main()

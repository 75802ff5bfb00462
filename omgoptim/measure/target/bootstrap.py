"""First lines that run on a target: find a Python, then let it take the measuring package from its input.

No code of a target's user is run, and nothing outside of the cache folder is written.
"""

from __future__ import annotations

import shlex

MARK = "omgoptim-target "
"""Begin of the line that answers; a login shell may print others before it."""

OLDEST = (3, 10)

FIND_PYTHON = r"""
name=$(uname -sm 2>/dev/null) || name=unknown
old=
for python in python3 python3.13 python3.12 python3.11 python3.10 python; do
  command -v "$python" >/dev/null 2>&1 || continue
  found=$("$python" -c 'import sys; print(".".join(map(str, sys.version_info[:3])))' 2>/dev/null) || continue
  if "$python" -c 'import sys; sys.exit(sys.version_info[:2] < (OLDEST))' 2>/dev/null; then
    exec "$python" -u -c "$1" "$name" "$2"
  fi
  old="$old $python $found"
done
printf '\n%s{"refused": "python", "found": "%s", "uname": "%s"}\n' "MARK" "${old# }" "$name"
""".replace("OLDEST", ", ".join(map(str, OLDEST))).replace("MARK", MARK)

TAKE_PACKAGE = r"""
import io, json, os, shutil, sys, tarfile, tempfile
sys.path[:] = [entry for entry in sys.path if entry]
base = os.environ.get("XDG_CACHE_HOME", "")
if not os.path.isabs(base):
    base = os.path.join(os.path.expanduser("~"), ".cache")
cache = os.path.join(base, "omgoptim", "target")
code = os.path.join(cache, "code", sys.argv[2])
has_code = os.path.isfile(os.path.join(code, "omgoptim", "__init__.py"))
hello = {"uname": sys.argv[1], "cache": cache, "has_code": has_code}
partial = None
try:
    os.makedirs(os.path.dirname(code), mode=0o700, exist_ok=True)
    hello["free"] = shutil.disk_usage(cache).free
    if has_code:
        os.utime(code)
    else:
        partial = tempfile.mkdtemp(prefix="partial-", dir=os.path.dirname(code))
except OSError as error:
    hello = {"refused": "disk", "found": str(error), "uname": sys.argv[1]}
print("\nMARK" + json.dumps(hello), flush=True)
if "refused" in hello:
    sys.exit(0)
commands = sys.stdin.buffer
if partial is not None:
    try:
        content = commands.read(int(commands.readline()))
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                name = os.path.normpath(member.name)
                if not member.isfile() or os.path.isabs(name) or name.startswith(".."):
                    sys.exit("not a package")
                place = os.path.join(partial, name)
                os.makedirs(os.path.dirname(place), exist_ok=True)
                with open(place, "wb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file)
        try:
            os.rename(partial, code)
        except OSError:
            if not os.path.isdir(code):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
sys.path.append(code)
from omgoptim.measure.target.agent import main
main(cache, sys.argv[1], commands)
""".replace("MARK", MARK)


def remote_command(code: str) -> str:
    """Return the command line for the target's login shell, whichever it is.

    Args:
        code: hash of the measuring package.
    """
    return f"exec sh -c {shlex.quote(FIND_PYTHON)} omgoptim {shlex.quote(TAKE_PACKAGE)} {shlex.quote(code)}"

"""A target from the side of a run: what is measured there, over a connection that may be lost and made again."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from omgoptim.errors import OmgoptimError, SetupError
from omgoptim.measure.launch import LaunchParts, LaunchResult, TimingPlan, TimingSetup
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.target.connection import Connection, TargetLost
from omgoptim.measure.target.machine import Machine, prepare_machine
from omgoptim.measure.target.process import TargetProcess
from omgoptim.models.manifest import MANIFEST, read_json, sha256
from omgoptim.models.output_check import CHECK
from omgoptim.models.security.seal import SEAL
from omgoptim.requests.base import TargetAddress
from omgoptim.runtimes import engine_named

T = TypeVar("T")

RECONNECT_S = 120.0
"""For how long a lost connection is made again."""
MOST_LOSSES = 5
"""Losses during one launch or evaluation after which it is given up."""
POLL_S = 1.0


class TargetGone(Exception):
    """A lost connection that could not be made again; no OmgoptimError, which a candidate would be blamed for."""


@dataclasses.dataclass(slots=True)
class _Sent:
    """What the agent of this connection has: folders of artifacts by folder and manifest."""

    artifacts: dict[tuple[Path, str], str] = dataclasses.field(default_factory=dict)


class Target:
    """A machine to measure on, for one run; a context manager that ends the connection.

    Args:
        address: of the machine.
        runtime: the engine of the run, or auto.
        holder: name of the run, shown to others that wait for the target.
        scratch: folder for what is prepared to be sent.
        say: called with what is waited for.
        kept: file that gets the results of every launch as they come, one JSON object a line.
        reconnect_s: for how long a lost connection is tried to be made again; default: `RECONNECT_S`.

    Raises:
        SetupError: it cannot be reached or used.
    """

    def __init__(
        self,
        address: TargetAddress,
        runtime: str,
        holder: str,
        scratch: Path,
        say: Callable[[str], None],
        kept: Path | None = None,
        reconnect_s: float | None = None,
    ) -> None:
        self.address, self._runtime, self._holder, self._scratch = address, runtime, holder, scratch
        self._say, self._kept = say, kept
        self._reconnect_s = RECONNECT_S if reconnect_s is None else reconnect_s
        self._digests: dict[tuple[Path, int], str] = {}
        self._depth = 0
        self.generation = 0
        """Number of the connection: what a process of an earlier one held is gone."""
        self.machine: Machine
        self.notes: list[str]
        self._connect()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def _connect(self) -> None:
        self.connection = Connection(self.address)
        try:
            self.machine, self.notes = prepare_machine(self.connection, self._runtime)
        except TargetLost as lost:
            self.connection.close()
            fix = f"check that `ssh {self.address.login}` connects, then repeat the command"
            raise SetupError(f"the connection to {self.address} ended", str(lost), fix) from None
        except OmgoptimError:
            self.connection.close()
            raise
        self._sent = _Sent()
        self.generation += 1

    def again(self, action: Callable[[], T]) -> T:
        """Do something; if the connection is lost meanwhile, make it again and begin anew.

        Raises:
            TargetGone: it could not be made again in time.
        """
        for _ in range(MOST_LOSSES):
            try:
                return action()
            except TargetLost as lost:
                self._reconnect(lost)
        raise TargetGone(f"the connection was lost {MOST_LOSSES} times")

    def _reconnect(self, lost: TargetLost) -> None:
        self.connection.close()
        deadline, why = time.monotonic() + self._reconnect_s, str(lost)
        while time.monotonic() < deadline:
            self._say(f"the connection to {self.address} was lost: trying again")
            try:
                self._connect()
                if self._depth:
                    self._hold()
                return
            except (SetupError, TargetLost) as error:
                why = f"{error}"
                time.sleep(POLL_S)
        raise TargetGone(why)

    @property
    def is_held(self) -> bool:
        """Whether this run measures there now."""
        return self._depth > 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the target: one run at a time measures there; a turn within a turn is the same one."""
        if not self._depth:
            self.again(self._hold)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                with suppress(TargetLost):  # which gave it back
                    self.connection.request("release")

    def _hold(self) -> None:
        while (holder := self.connection.request("hold", holder=self._holder)["holder"]) is not None:
            self._say(f"waiting for {self.address}: {holder}")
            time.sleep(POLL_S)

    def other_load(self) -> float:
        """Return the fraction of the target's cores that others use now."""
        return float(self.again(lambda: self.connection.request("load"))["load"])

    def meter(self) -> TargetMeter:
        """Return a meter of the load from now on."""
        self.again(lambda: self.connection.request("meter"))
        return TargetMeter(self)

    def start(self, artifact: Path, setup: TimingSetup, batches: Mapping[str, Path]) -> MeasuringProcess:
        """Start a measuring process there, as `MeasuringProcess` does here."""
        return TargetProcess(self, artifact, setup.threads, batches)

    def launch(
        self,
        artifacts: Sequence[Path],
        setup: TimingSetup,
        plan: TimingPlan,
        seed: str,
        parts: LaunchParts,
        on_open: Callable[[int, MeasuringProcess], None] | None = None,
    ) -> list[LaunchResult | OmgoptimError]:
        """Do there what `run_launch` does here. A launch that the connection does not survive is done again."""
        results = self.again(lambda: self._launch(artifacts, setup, plan, seed, parts, on_open))
        if isinstance(results[0], OmgoptimError):
            raise results[0]
        if self._kept is not None:
            names = [artifact.name for artifact in artifacts]
            shown = [None if isinstance(one, OmgoptimError) else dataclasses.asdict(one) for one in results]
            with self._kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"target": str(self.address), "artifacts": names, "launch": shown}) + "\n")
        return results

    def _launch(
        self,
        artifacts: Sequence[Path],
        setup: TimingSetup,
        plan: TimingPlan,
        seed: str,
        parts: LaunchParts,
        on_open: Callable[[int, MeasuringProcess], None] | None,
    ) -> list[LaunchResult | OmgoptimError]:
        results: dict[int, LaunchResult | OmgoptimError] = {}
        folders: dict[int, str] = {}
        for index, artifact in enumerate(artifacts):
            try:
                folders[index] = self.send_artifact(artifact)
            except OmgoptimError as error:
                if not index:
                    raise
                results[index] = error
        places = list(folders)
        self.connection.send(
            "launch",
            artifacts=list(folders.values()),
            batches=self.send_files(setup.batches),
            threads=setup.threads,
            plan=dataclasses.asdict(plan),
            seed=seed,
            parts=dataclasses.asdict(parts),
            more=on_open is not None,
        )
        while "event" in (frame := self.connection.receive()):
            index = places[frame["index"]]
            try:
                if on_open is not None:
                    on_open(index, TargetProcess(self, artifacts[index], setup.threads, {}, number=0))
            except OmgoptimError as error:
                results[index] = error
            self.connection.send("go_on")
        for index, record in zip(places, frame["results"], strict=True):
            found = OmgoptimError.from_dict(record["error"]) if "error" in record else LaunchResult(**record)
            results.setdefault(index, found)
        return [results[index] for index in range(len(artifacts))]

    def send_artifact(self, folder: Path) -> str:
        """Send what an engine opens of an artifact, each content once; return its folder there.

        Raises:
            SetupError: its engine runs modules, which need torch and the user's code.
        """
        record = read_json(folder / MANIFEST)
        if engine_named(str(record["runtime"])).runs == "module":
            raise SetupError(
                f"artifact {folder} cannot be measured on a target",
                f"it runs on {record['runtime']}: torch, the model's code and its packages do not go over",
                "make it with runtime onnxruntime or openvino",
            )
        opened = {name: entry for name, entry in record["files"].items() if not entry.get("beside") or name == CHECK}
        record = {name: value for name, value in record.items() if name != SEAL}
        text = json.dumps(record | {"files": opened, "macs_check": None, "lineage": []})
        known = self._sent.artifacts.get((folder, text))
        if known is not None:
            return known
        manifest = self._scratch / "sent" / "manifest.json"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(text, encoding="utf-8")
        files = {name: entry["sha256"] for name, entry in opened.items()} | {MANIFEST: sha256(manifest)}
        self.send_contents({digest: manifest if name == MANIFEST else folder / name for name, digest in files.items()})
        number = str(len(self._sent.artifacts))
        place = str(self.connection.request("artifact", name=number, files=files)["folder"])
        self._sent.artifacts[folder, text] = place
        return place

    def send_files(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Send files by content; return the sha256 of each name."""
        digests = {name: self._digest(path) for name, path in files.items()}
        self.send_contents({digests[name]: path for name, path in files.items()})
        return digests

    def send_contents(self, contents: Mapping[str, Path]) -> None:
        """Send those contents that the target does not have, by sha256."""
        for digest in self.connection.request("missing", digests=list(contents))["missing"]:
            self.connection.request("put", contents[digest], digest=digest)

    def _digest(self, path: Path) -> str:
        key = (path, path.stat().st_mtime_ns)
        if key not in self._digests:
            self._digests[key] = sha256(path)
        return self._digests[key]


@dataclasses.dataclass(frozen=True, slots=True)
class TargetMeter:
    """A `LoadMeter` of a target."""

    target: Target

    def load(self) -> float:
        """Return the fraction of the cores that others used since it was made."""
        return float(self.target.again(lambda: self.target.connection.request("metered"))["load"])

"""Client of a target: measurements over a connection that is restored when it is lost."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from omgoptim.errors import OmgoptimError, SetupError
from omgoptim.measure.launch import Launch, LaunchResult
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
from omgoptim.measure.target.connection import Connection, TargetLost
from omgoptim.measure.target.machine import Machine, prepare_machine
from omgoptim.measure.target.process import TargetProcess
from omgoptim.models.manifest import MANIFEST, read_json
from omgoptim.models.output_check import CHECK
from omgoptim.models.security.file_integrity import HMAC_FIELD, sha256
from omgoptim.requests.base import TargetAddress
from omgoptim.runtimes import engine_named

T = TypeVar("T")

MAX_LOSSES = 5
"""Lost connections during one launch or evaluation after which it is given up. Chosen: patience against hanging."""
POLL_S = 1.0
"""Seconds between two attempts to connect or to take the lock. Chosen: a lost second against load on the target."""


class TargetGone(Exception):
    """A lost connection that could not be restored; no OmgoptimError, which would count as a candidate's failure."""


class Target:
    """A machine to measure on, for one run; a context manager that ends the connection.

    Args:
        address: of the machine.
        runtime: the engine of the run, or auto.
        holder: name of the run, shown to others that wait for the target.
        scratch: folder for what is prepared to be sent.
        report: called with a line on what the run waits for.
        kept: file that gets the results of every launch as they come, one JSON object a line.

    Raises:
        SetupError: it cannot be reached or used.
    """

    reconnect_s = 120.0
    """Seconds of attempts to restore a lost connection: a router's restart takes less."""

    def __init__(
        self,
        address: TargetAddress,
        runtime: str,
        holder: str,
        scratch: Path,
        report: Callable[[str], None],
        kept: Path | None = None,
    ) -> None:
        self.address, self._runtime, self._holder, self._scratch = address, runtime, holder, scratch
        self._report, self._kept = report, kept
        self._digests: dict[tuple[Path, int], str] = {}
        self._sent: dict[tuple[Path, str], str] = {}  # folders on the target, by folder here and manifest
        self._depth = 0
        self.generation = 0
        """Number of the connection; processes of earlier connections are gone."""
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
            raise SetupError(
                f"the connection to {self.address} ended",
                str(lost),
                "check that the target stays awake and its ssh server running, then start the run again",
            ) from None
        except OmgoptimError:
            self.connection.close()
            raise
        self._sent.clear()
        self.generation += 1

    def retry(self, action: Callable[[], T]) -> T:
        """Run an action; if the connection is lost, reconnect and repeat it.

        Raises:
            TargetGone: it could not be made again in time.
        """
        for _ in range(MAX_LOSSES):
            try:
                return action()
            except TargetLost as lost:
                self._reconnect(lost)
        raise TargetGone(f"the connection was lost {MAX_LOSSES} times")

    def _reconnect(self, lost: TargetLost) -> None:
        self.connection.close()
        deadline, why = time.monotonic() + self.reconnect_s, str(lost)
        while time.monotonic() < deadline:
            self._report(f"the connection to {self.address} was lost: reconnecting")
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
        """Return whether this run holds the target now."""
        return self._depth > 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the lock of the target, on which one run at a time measures; nested holds share one lock."""
        if not self._depth:
            self.retry(self._hold)
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
            self._report(f"waiting for {self.address}: {holder}")
            time.sleep(POLL_S)

    def other_load(self) -> float:
        """Return the fraction of the target's cores that other processes use now."""
        return float(self.retry(lambda: self.connection.request("load"))["load"])

    def meter(self) -> TargetMeter:
        """Return a meter of the load from now on."""
        self.retry(lambda: self.connection.request("meter"))
        return TargetMeter(self)

    def start(self, artifact: Path, setup: TimingSetup, batches: Mapping[str, Path]) -> MeasuringProcess:
        """Start a measuring process on the target."""
        return TargetProcess(self, artifact, setup.threads, batches)

    def launch(self, launch: Launch) -> list[LaunchResult | OmgoptimError]:
        """Run a launch on the target; one that the connection does not survive is repeated."""
        with launch.setup.hold():
            results = self.retry(lambda: self._launch(launch))
        if isinstance(results[0], OmgoptimError):
            raise results[0]
        if self._kept is not None:
            names = [artifact.name for artifact in launch.artifacts]
            shown = [None if isinstance(one, OmgoptimError) else dataclasses.asdict(one) for one in results]
            with self._kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"target": str(self.address), "artifacts": names, "launch": shown}) + "\n")
        return results

    def _launch(self, launch: Launch) -> list[LaunchResult | OmgoptimError]:
        results: dict[int, LaunchResult | OmgoptimError] = {}
        folders: dict[int, str] = {}
        for index, artifact in enumerate(launch.artifacts):
            try:
                folders[index] = self.send_artifact(artifact)
            except OmgoptimError as error:
                if not index:
                    raise
                results[index] = error
        places, threads = list(folders), launch.setup.threads
        self.connection.send(
            "launch",
            artifacts=list(folders.values()),
            setup={"threads": threads, "batches": self.send_files(launch.setup.batches)},
            plan=dataclasses.asdict(launch.plan),
            seed=launch.seed,
            parts=dataclasses.asdict(launch.parts),
            more=launch.on_open is not None,
        )
        while "event" in (frame := self.connection.receive()):
            index = places[frame["index"]]
            try:
                if launch.on_open is not None:
                    launch.on_open(index, TargetProcess(self, launch.artifacts[index], threads, {}, number=0))
            except OmgoptimError as error:
                results[index] = error
            self.connection.send("go_on")
        for index, record in zip(places, frame["results"], strict=True):
            found = OmgoptimError.from_dict(record["error"]) if "error" in record else LaunchResult(**record)
            results.setdefault(index, found)
        return [results[index] for index in range(len(launch.artifacts))]

    def send_artifact(self, folder: Path) -> str:
        """Send the files that an engine opens of an artifact, each content once; return the folder on the target.

        Raises:
            SetupError: its engine runs modules, which need torch and the user's code.
        """
        record = read_json(folder / MANIFEST)
        if engine_named(str(record["runtime"])).runs == "module":
            raise SetupError(
                f"artifact {folder} cannot be measured on a target",
                f"it needs runtime {record['runtime']}: torch and the model's code are not copied to a target",
                "use runtime onnxruntime or openvino",
            )
        opened = {name: entry for name, entry in record["files"].items() if not entry.get("beside") or name == CHECK}
        record = {name: value for name, value in record.items() if name != HMAC_FIELD}
        text = json.dumps(record | {"files": opened, "macs_check": None, "lineage": []})
        known = self._sent.get((folder, text))
        if known is not None:
            return known
        manifest = self._scratch / "sent" / "manifest.json"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(text, encoding="utf-8")
        files = {name: entry["sha256"] for name, entry in opened.items()} | {MANIFEST: sha256(manifest)}
        self.send_contents({digest: manifest if name == MANIFEST else folder / name for name, digest in files.items()})
        number = str(len(self._sent))
        place = str(self.connection.request("artifact", name=number, files=files)["folder"])
        self._sent[folder, text] = place
        return place

    def send_files(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Send files by content; return the sha256 of each name."""
        digests = {name: self._digest(path) for name, path in files.items()}
        self.send_contents({digests[name]: path for name, path in files.items()})
        return digests

    def send_contents(self, contents: Mapping[str, Path]) -> None:
        """Send the contents that the target lacks, by sha256."""
        for digest in self.connection.request("missing", digests=list(contents))["missing"]:
            self.connection.request("put", contents[digest], digest=digest)

    def _digest(self, path: Path) -> str:
        key = (path, path.stat().st_mtime_ns)
        if key not in self._digests:
            self._digests[key] = sha256(path)
        return self._digests[key]


@dataclasses.dataclass(frozen=True, slots=True)
class TargetMeter:
    """Monitor of the load by other processes on a target, as `LoadMeter`."""

    target: Target

    def load(self) -> float:
        """Return the fraction of the target's cores that others used since its creation."""
        return float(self.target.retry(lambda: self.target.connection.request("metered"))["load"])

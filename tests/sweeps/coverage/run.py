"""Runs cases in child processes, and keeps what came of them as lines of JSON.

A crash or a hang of one transform ends its child alone: the parent notes it and a new child goes on
behind it. Children are forked, so they start with everything imported.
"""

import importlib
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from tests.sweeps.coverage.judge import CRASH, REFUSED, WRONG, judge
from tests.sweeps.coverage.oracle import truth_of, truth_through
from tests.sweeps.coverage.samples import Skipped, Unit
from tests.sweeps.coverage.transforms import TRANSFORMS, Transform

RESULTS = Path(__file__).parents[3] / "build" / "coverage.jsonl"
# Seconds that one transform of one case may take, and a unit as a whole.
PATIENCE, LONGEST = 180, 900
ORACLE = "oracle"
Record = dict[str, Any]


def prepare() -> None:
    """Once, before children are forked."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def records_of(
    unit: Unit,
    samples: int,
    seed: int,
    done: frozenset[tuple[str, str]] = frozenset(),
    transforms: Iterable[Transform] = TRANSFORMS,
    starting: Any = lambda case, transform: None,
) -> Iterable[Record]:
    """Everything about a unit, but for what is ``done``: pairs of case and transform."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        starting("", "samples")
        source, truth = None, None
        for case in unit.cases(samples, seed):
            if isinstance(case, Skipped):
                yield {"unit": unit.name, "case": case.name, "skipped": case.reason}
                continue
            left = [t for t in transforms if (case.name, t.name) not in done]
            if not left or (case.name, ORACLE) in done:
                continue
            starting(case.name, ORACLE)
            began = time.perf_counter()
            if truth is None or source != case.source:
                source, truth = case.source, truth_of(case)
            yield {
                "unit": unit.name,
                "case": case.name,
                "torch wrong": truth.wrong,
                "loop raises": {k: f"{type(e).__name__}: {e}" for k, e in truth.errors.items()},
                "independent": case.independent,
                "kinks": truth.kinks,
                "sizes": [truth.value.shape[1], sum(s.numel() for s in truth.in_shapes)],
                "seconds": round(time.perf_counter() - began, 3),
            }
            through = None
            for transform in left:
                starting(case.name, transform.name)
                began = time.perf_counter()
                outcome = judge(case, truth, transform)
                if outcome.kind in (WRONG, REFUSED) and case.name.endswith("vmap"):
                    through = through or truth_through(case, truth)
                    outcome = judge(case, through, transform)
                yield {
                    "unit": unit.name,
                    "case": case.name,
                    "transform": transform.name,
                    "class": outcome.kind,
                    "detail": outcome.detail,
                    "seconds": round(time.perf_counter() - began, 3),
                }


def _child(pipe: Connection, *words: Any) -> None:
    prepare()
    try:
        for record in records_of(*words, starting=lambda *at: pipe.send(("at", at))):
            pipe.send(("record", record))
        pipe.send(("end", None))
    except Exception as error:  # an error of the harness, or of the database
        pipe.send(("failed", f"{type(error).__name__}: {error}"[:500]))


@dataclass
class _Job:
    """One child at work on a unit."""

    unit: Unit
    done: set[tuple[str, str]]
    process: Any = None
    pipe: Any = None
    at: tuple[str, str] = ("", "samples")
    since: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.monotonic)

    def start(self, samples: int, seed: int, transforms: list[Transform]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe(duplex=False)
        words = (theirs, self.unit, samples, seed, frozenset(self.done), transforms)
        self.process = context.Process(target=_child, args=words, daemon=True)
        self.process.start()
        theirs.close()
        self.at, self.since = ("", "samples"), time.monotonic()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Sweep:
    """All units, some children at a time; results are appended to ``path`` as they come."""

    def __init__(
        self,
        path: Path,
        samples: int,
        seed: int,
        jobs: int,
        transforms: list[Transform] = TRANSFORMS,
    ) -> None:
        self.path, self.jobs = path, jobs
        self.words = samples, seed, transforms
        # With this, a unit is done.
        self.end = [samples, seed, *[t.name for t in transforms if transforms != TRANSFORMS]]
        self.counts: dict[str, int] = {}
        self.running: list[_Job] = []

    def run(self, units: list[Unit]) -> None:
        kept = load(self.path)
        finished = {r["unit"] for r in kept if r.get("end") == self.end}
        done: dict[str, set] = {}
        for record in kept:
            if "class" in record:
                done.setdefault(record["unit"], set()).add((record["case"], record["transform"]))
        waiting = [unit for unit in units if unit.name not in finished]
        bar = Bar(len(units), len(units) - len(waiting))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as out:
            self.out = out
            try:
                while waiting or self.running:
                    while waiting and len(self.running) < self.jobs:
                        unit = waiting.pop(0)
                        job = _Job(unit, done.get(unit.name, set()))
                        job.start(*self.words)
                        self.running.append(job)
                    bar.show(len(waiting) + len(self.running), self.running, self.counts)
                    self._listen()
            finally:
                for job in self.running:
                    job.stop()
        bar.close(self.counts)

    def _write(self, record: Record) -> None:
        self.out.write(json.dumps(record) + "\n")
        self.out.flush()
        if "class" in record:
            self.counts[record["class"]] = self.counts.get(record["class"], 0) + 1

    def _listen(self) -> None:
        ready = wait([job.pipe for job in self.running], timeout=1)
        for job in list(self.running):
            if job.pipe in ready:
                self._hear(job)
            elif time.monotonic() - job.since > PATIENCE:
                self._fell(job, f"took more than {PATIENCE} seconds")
            elif time.monotonic() - job.began > LONGEST:
                self._end(job, {"cut": True})

    def _hear(self, job: _Job) -> None:
        try:
            word, what = job.pipe.recv()
        except EOFError:
            job.process.join()
            self._fell(job, f"the process died with exit code {job.process.exitcode}")
            return
        if word == "at":
            job.at, job.since = what, time.monotonic()
        elif word == "record":
            self._write(what)
            if "class" in what:
                job.done.add((what["case"], what["transform"]))
        elif word == "failed":
            case, transform = job.at
            self._write(
                {"unit": job.unit.name, "case": case, "harness": what, "transform": transform}
            )
            if transform == "samples":
                self._end(job)
            else:
                self._again(job)
        else:
            self._end(job)

    def _fell(self, job: _Job, why: str) -> None:
        """Note a crash where the child was, and go on behind it."""
        case, transform = job.at
        if transform in ("samples", ORACLE):
            self._write({"unit": job.unit.name, "case": case, "skipped": f"{transform}: {why}"})
        else:
            record = {"unit": job.unit.name, "case": case, "transform": transform}
            self._write({**record, "class": CRASH, "detail": why})
        if transform == "samples":
            self._end(job)
        else:
            self._again(job)

    def _again(self, job: _Job) -> None:
        job.done.add(job.at)
        job.stop()
        job.start(*self.words)

    def _end(self, job: _Job, words: Record | None = None) -> None:
        end = {"unit": job.unit.name, "end": self.end}
        self._write({**end, "seconds": round(time.monotonic() - job.began, 1), **(words or {})})
        job.stop()
        self.running.remove(job)


def load(path: Path) -> list[Record]:
    """What was written so far; a line cut short by a kill is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def forget(path: Path, names: set[str]) -> None:
    """Drop what is known of some units."""
    kept = [record for record in load(path) if record["unit"] not in names]
    if path.exists():
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))


class Bar:
    """Progress on stderr: a line that is written over, or one now and then in a log."""

    def __init__(self, total: int, before: int) -> None:
        self.total, self.before = total, before
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, left: int, running: list[_Job], counts: dict[str, int]) -> None:
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 30):
            return
        self.shown = now
        done = self.total - left
        fresh = done - self.before
        eta = f"{(now - self.began) / fresh * left / 60:.0f} min left" if fresh else ""
        fill = "#" * (30 * done // max(self.total, 1))
        words = ", ".join(f"{job.unit.name} {' '.join(job.at)}" for job in running)[:60]
        bad = sum(counts.get(kind, 0) for kind in counts if kind not in ("right",))
        text = f"[{fill:<30}] {done}/{self.total} {eta}, {bad} not right: {words}"
        sys.stderr.write(f"\r\033[K{text}" if self.live else text + "\n")
        sys.stderr.flush()

    def close(self, counts: dict[str, int]) -> None:
        minutes = (time.monotonic() - self.began) / 60
        words = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        sys.stderr.write(f"\n{minutes:.1f} minutes: {words or 'nothing left to do'}\n")

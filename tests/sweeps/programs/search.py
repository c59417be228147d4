"""Draws programs and checks them until the time is over."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.sweeps.programs.check import Failure, run
from tests.sweeps.programs.generate import generate
from tests.sweeps.programs.plan import checks
from tests.sweeps.programs.shrink import shrink


@dataclass
class Tally:
    programs: int = 0
    unfair: int = 0
    checks: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


def search(
    seed: int,
    seconds: float,
    *,
    share: float = 1.0,
    stop: bool = True,
    unchecked: bool = False,
    tell: Callable[[Tally, Failure | None], None] = lambda tally, failure: None,
) -> Tally:
    """Draw programs from ``seed`` on until the time is over, or the first failure."""
    tally, start = Tally(), time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        tally.seconds = elapsed
        program = generate(seed)
        if program is None:
            tally.unfair += 1
        else:
            tally.programs += 1
            failed: set[Any] = set()
            for check in checks(program, random.Random(seed), share, unchecked=unchecked):
                tally.checks += 1
                failure = run(program, check)
                if failure is None or (failure.key(), check.transform) in failed:
                    continue
                failed.add((failure.key(), check.transform))
                failure = shrink(failure)
                tally.failures.append(failure)
                tell(tally, failure)
                if stop:
                    return tally
        seed += 1
        tell(tally, None)
    return tally

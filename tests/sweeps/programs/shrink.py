"""Makes a failing program as short as it gets."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace

from tests.sweeps.programs.check import Failure, run
from tests.sweeps.programs.generate import is_fair
from tests.sweeps.programs.program import Program, Step


def shrink(failure: Failure, seconds: float = 30.0) -> Failure:
    """The shortest program found that fails alike: without steps, with variables for steps."""
    until, best, progress = time.monotonic() + seconds, failure, True
    for points in (best.check.points[:1], best.check.points[:2]):
        check = replace(best.check, points=points)
        found = _fails(best.program, replace(best, check=check))
        if found is not None:
            best = found
            break
    best = _fails(pruned(best.program), best) or best
    while progress and time.monotonic() < until:
        progress = False
        for candidate in smaller(best.program):
            candidate = pruned(candidate)
            if time.monotonic() > until:
                break
            if _size(candidate) >= _size(best.program):
                continue
            found = _fails(candidate, best)
            if found is not None:
                best, progress = found, True
                break
    return best


def _size(program: Program) -> tuple[int, int]:
    return sum(made.kind != "alias" for made in program.steps), len(program.source())


def pruned(program: Program) -> Program:
    """Without the steps that nothing of the output comes from."""
    used, kept = set(re.findall(r"\w+", program.output)), []
    for made in reversed(program.steps):
        if made.name in used:
            kept.append(made)
            used |= {word for line in made.body for word in re.findall(r"\w+", line)}
    return replace(program, steps=tuple(reversed(kept)))


def _fails(program: Program, failure: Failure) -> Failure | None:
    try:
        if not program.mixing and not is_fair(program):
            return None
        found = run(program, failure.check)
    except Exception:
        return None
    return found if found is not None and found.key() == failure.key() else None


def smaller(program: Program) -> Iterator[Program]:
    """Programs with one step less, or with a variable in its place."""
    names = [n for given in program.inputs if not given.integer for n in given.names()]
    made = [s.name for s in program.steps]
    for name in made:
        yield replace(program, output=name, out_dims=0)
    for i, gone in enumerate(program.steps):
        rest = (*program.steps[:i], *program.steps[i + 1 :])
        yield replace(program, steps=rest)
        for other in [*made[:i], *names]:
            alias = Step("alias", gone.name, (f"{gone.name} = {other}",))
            if gone.kind != "alias":
                yield replace(program, steps=(*program.steps[:i], alias, *program.steps[i + 1 :]))
        if len(gone.body) > 1 and gone.kind in ("in_place", "control_flow"):
            for k in range(1, len(gone.body) - 1):
                fewer = replace(gone, body=(*gone.body[:k], *gone.body[k + 1 :]))
                yield replace(program, steps=(*program.steps[:i], fewer, *program.steps[i + 1 :]))
    for i, given in enumerate(program.inputs[1:], 1):
        text = program.source().split("def func", 1)[1].split(":", 1)[1]
        if (
            given.name not in text.split()
            and isinstance(program.argnums, int)
            and program.argnums == 0
        ):
            yield replace(program, inputs=(*program.inputs[:i], *program.inputs[i + 1 :]))

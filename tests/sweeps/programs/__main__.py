"""``python -m tests.sweeps.programs``: random programs, and a reproducer of each failure."""

import argparse
import sys
import time

import torch

from tests.sweeps.programs.check import Failure
from tests.sweeps.programs.search import Tally, search


def main() -> None:
    parser = argparse.ArgumentParser(description="Random programs through every transform.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--share", type=float, default=0.3, help="share of the checks for each")
    parser.add_argument("--stop", action="store_true", help="stop at the first failure")
    parser.add_argument("--unchecked", action="store_true", help="also with check=False")
    given = parser.parse_args()
    torch.set_num_threads(1)
    last = [time.monotonic()]

    def tell(tally: Tally, failure: Failure | None) -> None:
        if failure is not None:
            words = f"seed {failure.program.seed}: {failure.kind}: {failure.text}"
            print(f"\n# {words}\n{failure.reproducer()}", flush=True)  # noqa: T201
        if time.monotonic() - last[0] > 5:
            last[0] = time.monotonic()
            print(  # noqa: T201
                f"{tally.seconds:6.0f} s: {tally.programs} programs, {tally.unfair} left out, "
                f"{tally.checks} checks, {len(tally.failures)} failures",
                file=sys.stderr,
                flush=True,
            )

    words = {"share": given.share, "stop": given.stop, "unchecked": given.unchecked}
    tally = search(given.seed, 60 * given.minutes, tell=tell, **words)
    print(f"{tally.programs} programs, {tally.checks} checks, {len(tally.failures)} failures")  # noqa: T201
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()

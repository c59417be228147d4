"""``python -m tests.sweeps.coverage`` runs the sweep where it was left, and writes the page."""

import argparse
import os
import re
from pathlib import Path

from tests.sweeps.coverage.page import PAGE, write
from tests.sweeps.coverage.run import RESULTS, Sweep, forget, load, prepare
from tests.sweeps.coverage.samples import units
from tests.sweeps.coverage.transforms import TRANSFORMS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps.coverage", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="units whose name this matches (re)")
    parser.add_argument("--transforms", metavar="PATTERN", help="columns whose name this matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--samples", type=int, default=2, help="samples of each unit")
    parser.add_argument("--seed", type=int, default=0, help="which samples, and where")
    parser.add_argument("--fresh", action="store_true", help="forget what these units gave before")
    parser.add_argument("--results", type=Path, default=RESULTS, help="lines of JSON")
    parser.add_argument("--page", action="store_true", help="write the page only")
    parser.add_argument("--no-page", action="store_true", help="leave the page alone")
    words = parser.parse_args()
    if not words.page:
        prepare()
        chosen = [u for u in units() if not words.only or re.search(words.only, u.name)]
        if words.fresh:
            forget(words.results, {unit.name for unit in chosen})
        columns = [t for t in TRANSFORMS if re.search(words.transforms or "", t.name)]
        Sweep(words.results, words.samples, words.seed, words.jobs, columns).run(chosen)
    if not words.no_page:
        PAGE.write_text(write(load(words.results)))


if __name__ == "__main__":
    main()

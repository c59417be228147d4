"""``docs/coverage.md``: totals for each transform, and everything that is not right."""

from pathlib import Path
from tests.coverage.run import Record
PAGE = Path(__file__).parent.parent.parent / "docs" / "coverage.md"


def write(records: list[Record]) -> str:
    return ""

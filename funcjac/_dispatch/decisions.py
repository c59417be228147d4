"""What is remembered of calls, by key, for all transforms of the process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

_MOST = 1024
_TABLE: OrderedDict[Any, Decision] = OrderedDict()
_LOCK = threading.Lock()


@dataclass
class Decision:
    """What earlier calls of a key have shown.

    Attributes:
        calls: how many there were.
        clone: whether ``func`` writes into its arguments, and is given copies.
        replaced: whether replacements run of what torch differentiates wrongly.
        inputs, outputs: elements of a row, once they are known.
        on_cpu: whether all inputs are on a processor.
        records: whether operations are recorded for Taylor propagation, once that is known.
        routes: by sizes, the one that works.
        left: engines and routes that failed, and why.
        graphs: signatures that were looked through for what torch differentiates wrongly.
        signatures: of graphs that were verified.
        rows: whether a batch of two rows or more was verified.
        failed: whether the last verification failed: the next call is verified again.
    """

    calls: int = 0
    clone: bool = False
    replaced: bool = False
    inputs: int | None = None
    outputs: int | None = None
    on_cpu: bool = True
    records: bool | None = None
    routes: dict[Any, Any] = field(default_factory=dict)
    left: dict[Any, str] = field(default_factory=dict)
    graphs: set[int] = field(default_factory=set)
    signatures: set[int] = field(default_factory=set)
    rows: bool = False
    failed: bool = False

    def is_due(self, check: bool | str, batch: int) -> bool:
        """Whether this call is verified: calls 1, 2, 4, 8, …, and the first with two rows."""
        if check is not True and check != "auto":
            return False
        power = self.calls & (self.calls - 1) == 0
        return check is True or power or self.failed or (batch > 1 and not self.rows)


def decision_of(key: Any) -> Decision:
    """The decision of a key; a new one makes the oldest go."""
    try:
        decision = _TABLE.get(key)
    except TypeError:  # something in it has no hash: nothing is remembered
        return Decision()
    if decision is None:
        with _LOCK:
            decision = _TABLE.setdefault(key, Decision())
            while len(_TABLE) > _MOST:
                _TABLE.popitem(last=False)
    return decision

"""Writes ``docs/functions.md``: each case in each engine and mode.

Run it by ``python -m tests.sweeps.functions``.
"""

import importlib
import warnings
from collections import Counter

import torch

from funcjac import EngineFallbackWarning, batch_jacobian, explain
from tests.cases.case import Case
from tests.cases.first_order import CASES
from tests.operators.test_jacobian_cases import (
    PAGE,
    ROUTES,
    SEED,
    assert_right,
    calls_of,
    is_documented,
)

CALLS = 3
REASONS = {
    "verify": "the result was verified and refused (`VerificationError`)",
    "mixing": "rows depend on one another (`BatchMixingError`)",
    "unseen": "autograd does not see how the output depends on the input (`VerificationError`)",
    "dynamic": "shapes or branches that depend on values",
    "inplace": "in-place work that torch.func does not allow",
    "rule": "an operation has no batching rule, or one that fails",
    "double": "an operation's backward has no derivative, which this mode needs",
    "function": "a custom autograd.Function lacks what torch.func needs",
    "saved": "torch.func does not support hooks on saved tensors",
    "script": "torch.func differentiates TorchScript wrongly from the second call on",
    "sparse": "torch.func has no sparse tensors",
    "shared": "the sum trick has no derivative of its own for each row of a shared argument",
    "draw": "random numbers, without leave or not drawable this way",
    "refused": "funcjac refuses the input or the output, saying why",
    "func": "func's own error",
    "one": "func does not run on a batch of one",
    "other": "another error of torch",
}
# What is said, in the order of looking.
WORDS = {
    "unseen": ["expected autograd to see"],
    "verify": ["was verified and refused"],
    "mixing": ["rows depend on one another"],
    "shared": ["argument that rows share"],
    "draw": ["same draw", "draw random numbers", "randomness", "rrelu_with_noise"],
    "script": ["TorchScript"],
    "sparse": ["Sparse", "sparse"],
    "saved": ["saved tensor hooks"],
    "function": ["autograd.Function", "You tried to vmap over"],
    "dynamic": [".item()", "dynamic shape", "masked_select"],
    "double": ["derivative for"],
    "inplace": [
        "in-place operation",
        "inplace arithmetic",
        "match the broadcast",
        "requires_grad_",
    ],
    "one": ["more than 1 value per channel"],
    "rule": [
        "return a batch of 1",
        "vmap fallback",
        "Batch norm got",
        "must match the size",
        "invalid gradient",
    ],
}


def main() -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # What torch says when it is used this way is not the point here.
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")
        rows = [(case, [outcome(case, route) for route in ROUTES], chosen(case)) for case in CASES]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows))


def outcome(case: Case, route: str) -> str:
    """``right`` if all calls are, ``WRONG`` if any is not, else class and reason of the error."""
    errors = []
    for _, call, _ in calls_of(case, route, CALLS):
        try:
            found = call()
        except Exception as error:
            errors.append(error)
            continue
        if case.expected is not None:
            return "WRONG"
        try:
            assert_right(found, case, route)
        except AssertionError:
            return "WRONG"
    return cell(case, errors[0]) if errors else "right"


def cell(case: Case, error: Exception) -> str:
    return f"{type(error).__name__}: {reason(case, error)}"


def reason(case: Case, error: Exception) -> str:
    if not is_documented(error):
        return "func" if case.expected is type(error) else "other"
    text = str(error)
    for key, words in WORDS.items():
        if any(word in text for word in words):
            return key
    return "refused" if "cannot differentiate" not in text else "other"


def chosen(case: Case) -> str:
    """Engine and mode that the rule gives ``auto``."""
    setup = case.build()
    jac = batch_jacobian(setup.func, **case.keywords)
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineFallbackWarning)
        try:
            found = explain(jac, *setup.args, **setup.kwargs)
        except Exception:
            return ""
    return f"{found.engine}/{found.mode}"


def page(rows: list[tuple[Case, list[str], str]]) -> str:
    used = {word.split(": ")[1] for _, cells, _ in rows for word in cells if ": " in word}
    lines = [
        "# Which functions, by which engine and mode",
        "",
        f"Each function of `tests/cases/first_order.py` ({len(rows)}), called {CALLS} times in "
        f"each engine and mode with PyTorch {torch.__version__.split('+')[0]}, and compared with "
        "plain `torch.autograd.grad` of one output of one row at a time.",
        "Regenerate this page with `python -m tests.sweeps.functions`.",
        "",
        "`right`: value, shape, structure, dtype, memory layout and the random state left behind "
        "agree in every call. "
        "`WRONG`: they do not. Anything else is the exception that `batch_jacobian` raises and "
        'why; with `engine="auto"` another engine takes over. The last column is what `auto` runs.',
        "",
        *[f"* **{key}**: {text}" for key, text in REASONS.items() if key in used],
        "",
    ]
    header = ["auto", *ROUTES[1:], "auto runs"]
    group = None
    for case, cells, choice in rows:
        if case.group != group:
            group = case.group
            lines += [
                "",
                f"## {group[0].upper()}{group[1:]}",
                "",
                "| function | " + " | ".join(header) + " |",
            ]
            lines += ["| --- " * (len(header) + 1) + "|"]
        lines.append(f"| `{case.name}` | " + " | ".join([*cells, choice]) + " |")
    return "\n".join([*lines, "", *totals(rows)]) + "\n"


def totals(rows: list[tuple[Case, list[str], str]]) -> list[str]:
    able = [cells for case, cells, _ in rows if case.expected is None]
    lines = [
        "## Totals",
        "",
        f"Of the {len(able)} functions that have a batched Jacobian:",
        "",
        "| | " + " | ".join(ROUTES) + " |",
        "| --- " * (len(ROUTES) + 1) + "|",
    ]
    counts = [Counter(_kind(cells[i]) for cells in able) for i in range(len(ROUTES))]
    for kind in ("right", "error", "WRONG"):
        lines.append(f"| {kind} | " + " | ".join(str(count[kind]) for count in counts) + " |")
    refused = [cells[0] for case, cells, _ in rows if case.expected is not None]
    count = sum(_kind(word) == "error" for word in refused)
    lines += ["", f"Of the {len(refused)} that have none, `auto` refuses {count}."]
    return lines


def _kind(word: str) -> str:
    return word if word in ("right", "WRONG") else "error"


if __name__ == "__main__":
    main()

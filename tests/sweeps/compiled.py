"""Writes ``docs/compiled_functions.md``: each case of both tables in a compiled function.

Run it by ``python -m tests.sweeps.compiled``.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from funcjac import batch_hessian_diagonal, batch_jacobian
from tests.cases import first_order, second_order
from tests.cases.case import Case, f64
from tests.operators import test_jacobian_cases as jacobians
from tests.operators import test_second_order_cases as hessians

PAGE = Path(__file__).parents[2] / "docs" / "compiled_functions.md"
SECOND_ORDER = {"diagonal": batch_hessian_diagonal}
# Why a function is refused, and what is said then, in the order of looking.
REASONS = {
    "mixing": ("`check=True`: samples depend on one another", ["depend on their own rows alone"]),
    "refused": ("funcjac refuses the input or the output, as in eager code", [": expected "]),
    "derivative": (
        "an operation lacks the derivative that is asked for",
        ["cannot differentiate func in compiled code"],
    ),
    "recurrent": ("Dynamo takes recurrent layers with `allow_rnn` only", ["RNN", "LSTM", "GRU"]),
    "script": (
        "Dynamo does not take TorchScript",
        ["TorchScript", "torch.jit", "ScriptM", "_CachedForward"],
    ),
    "values": (
        "branches, loops or shapes by values",
        ["Data-dependent", "data-dependent", "Dynamic shape", "item()"],
    ),
    "hooks": ("hooks on tensors, on modules or on what is saved", ["hook", "save_on_cpu"]),
    "function": (
        "a custom `autograd.Function` with a `jvp` or a vmap rule of its own",
        ["generate_vmap_rule", "jvp"],
    ),
    "autograd": (
        "`torch.autograd.grad` inside of the function",
        ["trace_autograd_ops", "autograd.grad"],
    ),
    "sparse": ("sparse tensors", ["parse"]),
    "effect": (
        "the function changes an attribute while operations are recorded",
        ["Non-nullified side effect", "side effect"],
    ),
    "unseen": (
        "not refused: only verification, which there is none, tells that autograd does not see "
        "how the output depends on the input; the derivative is zero",
        [],
    ),
    "raises": ("the function's own error", []),
    "dynamo": ("something else that Dynamo does not take", []),
}


def compiled(transform: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    run = lambda *args, **kwargs: transform(*args, **kwargs)
    return torch.compile(run, fullgraph=True, backend="aot_eager")


def outcome(call: Callable[[], Any], check: Callable[[Any], None], is_refused: bool) -> str:
    """``right``, ``WRONG`` or why it is refused."""
    try:
        found = call()
    except Exception as error:
        return reason(error)
    if is_refused:
        return "WRONG"
    try:
        check(found)
    except AssertionError:
        return "WRONG"
    return "right"


def reason(error: Exception) -> str:
    text = str(error)
    for key, (_, words) in REASONS.items():
        if any(word in text for word in words):
            return key
    is_compilers = isinstance(error, torch._dynamo.exc.TorchDynamoException)
    return "dynamo" if is_compilers else "raises"


def first_derivatives(case: Case) -> str:
    """Of ``batch_jacobian``; with ``check=True`` where it must refuse."""
    setup, words = case.build(), dict(case.keywords)
    if case.expected is not None:
        words["check"] = True
    run = compiled(batch_jacobian(setup.func, **words))
    torch.manual_seed(jacobians.SEED)

    def check(found: Any) -> None:
        (draw,) = jacobians.draws(case, "auto")
        jacobians.assert_same(found, jacobians.expected(case.name, draw)[0])

    call = lambda: run(*setup.args, **setup.kwargs)
    cell = outcome(call, check, case.expected is not None)
    is_zero = lambda: all(not leaf.any() for leaf in tree_leaves(call()))
    return "unseen" if cell == "WRONG" and case.name == "detached" and is_zero() else cell


def second_derivatives(case: Case, name: str) -> str:
    setup = case.build(f64)
    run = compiled(SECOND_ORDER[name](setup.func, **case.keywords))
    check = lambda found: hessians.assert_right(found, hessians.expected(case, name), f64)
    call = lambda: run(*setup.args, **setup.kwargs)
    return outcome(call, check, case.expected is not None)


def main() -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = {case.name: [first_derivatives(case)] for case in first_order.CASES}
        second = {
            case.name: [second_derivatives(case, name) for name in SECOND_ORDER]
            for case in second_order.CASES
            if case.expected is None and case.can("second")
        }
    PAGE.write_text(page(first, second))


def page(first: dict[str, list[str]], second: dict[str, list[str]]) -> str:
    used = {word for cells in (*first.values(), *second.values()) for word in cells}
    refused = {case.name for case in first_order.CASES if case.expected is not None}
    return "\n".join(
        [
            "# Which functions, compiled",
            "",
            "The functions of `tests/cases/first_order.py` and `tests/cases/second_order.py` in "
            '`torch.compile(fullgraph=True, backend="aot_eager")`, with PyTorch '
            f"{torch.__version__.split('+')[0]}, held against plain autograd row by row. "
            "Regenerate this page with `python -m tests.sweeps.compiled`.",
            "",
            "`right`: value, shape, structure, dtype and memory layout agree. `WRONG`: they do "
            "not. Anything else is a refusal, whose words and remedies are in "
            "[compile.md](compile.md):",
            "",
            *[f"* **{key}**: {text}" for key, (text, _) in REASONS.items() if key in used],
            "",
            "## First derivatives",
            "",
            *table(["batch_jacobian"], {k: v for k, v in first.items() if k not in refused}),
            "",
            "## Functions that have no batched Jacobian",
            "",
            "With `check=True`, as nothing is verified in compiled code otherwise.",
            "",
            *table(["batch_jacobian"], {k: v for k, v in first.items() if k in refused}),
            "",
            "## Second derivatives",
            "",
            *table(list(SECOND_ORDER), second),
            "",
        ]
    )


def table(columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = ["| function | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    counts = [Counter(kind(cell) for cell in column) for column in zip(*rows.values())]
    for word in ("right", "refused", "WRONG"):
        totals = [str(count[word]) for count in counts]
        lines.append(f"| **{word}, of {len(rows)}** | " + " | ".join(totals) + " |")
    return lines


def kind(cell: str) -> str:
    return cell if cell in ("right", "WRONG") else "refused"


if __name__ == "__main__":
    main()

"""``docs/coverage.md``: totals for each transform, and everything that is not right."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import torch

from tests.sweeps.coverage.judge import CLASSES, DOCUMENTED, RIGHT, TORCH
from tests.sweeps.coverage.reproductions import REPRODUCTIONS
from tests.sweeps.coverage.run import Record
from tests.sweeps.coverage.samples import MOST_IN, MOST_OUT, MOST_PRODUCT, ROWS
from tests.sweeps.coverage.transforms import TRANSFORMS

PAGE = Path(__file__).parents[3] / "docs" / "coverage.md"
MEANING = {
    RIGHT: "every call agrees with the loop over rows, and all of the caller's is as it was",
    DOCUMENTED: "an error that the documentation promises, of an engine or mode that was asked "
    "for, or where rows depend on one another, or where the loop over rows fails too",
    TORCH: "what PyTorch's plain autograd gives, which central differences contradict",
    "refused, though the loop is right": "a documented error of `auto`, which should be right",
    "silently wrong": "a result that neither the loop nor central differences give",
    "changed the caller's state": "values, flags, gradients, hooks, modules, random state: not "
    "as one plain run of the function leaves them",
    "crash or undocumented error": "a dead or hanging process, or an error in other words",
}
SHORT = {
    "refused, though the loop is right": "refused",
    "changed the caller's state": "changed state",
    "crash or undocumented error": "crash",
}


def write(records: list[Record]) -> str:
    """The page, of all records; the last one about a case and transform counts."""
    judged = {(r["unit"], r["case"], r["transform"]): r for r in records if "class" in r}
    results = list(judged.values())
    cases = {(r["unit"], r["case"]): r for r in records if "torch wrong" in r}
    lines = [
        *_head(records, cases),
        *_totals(results),
        *_left_out(records, judged),
        *_torch(cases),
        *_notable(results),
        *_documented(results),
    ]
    return "\n".join(lines) + "\n"


def _head(records: list[Record], cases: dict) -> list[str]:
    ends = [r for r in records if "end" in r]
    taken = {(r["unit"], r["case"], r.get("transform")): r for r in records if "end" not in r}
    minutes = sum(r.get("seconds", 0) for r in taken.values()) / 60
    samples = max((r["end"][0] for r in ends), default=0)
    seeds = {r["end"][1] for r in ends}
    units = {unit for unit, _ in cases}
    ops = sum(unit.startswith("op ") for unit in units)
    return [
        "# What the sweep over PyTorch's operators and modules found",
        "",
        f"Samples of PyTorch {torch.__version__.split('+')[0]}'s own test databases (`op_db`, "
        f"`module_db`), each made a batched function of {ROWS} rows in float64, in every "
        "transform. What is right says a loop over rows in plain `torch.autograd.grad`, itself "
        f"held against central differences. {len(cases)} cases of {ops} operators and "
        f"{len(units) - ops} modules in train or eval mode; up to {samples} samples each, seed "
        f"{', '.join(map(str, sorted(seeds)))}; {minutes:.0f} minutes of one CPU.",
        "",
        "Regenerate with `python -m tests.sweeps.coverage` (it goes on where it was left; "
        "`--fresh` starts again, `--only PATTERN` runs some units, `--transforms PATTERN` some "
        "columns, `--samples N` more of each).",
        "",
        "* `stack` runs the rows one after the other, `vmap` lets torch batch them, `batch` is a "
        "module on a batch of its own.",
        f"* A sample is taken whole up to {MOST_IN} inputs, {MOST_OUT} outputs and a product of "
        f"{MOST_PRODUCT}; of larger ones (`few`) some elements move, and some are looked at.",
        "* Rows come in another order at each call of a transform; `auto` is called two or three "
        "times.",
        "* `in torch.func.grad` is a gradient through `batch_jacobian`, judged with the Jacobian "
        "itself; `in torch.vmap` maps it over two batches, where torch can do that with the loop "
        "over rows; `check=False` starts with nothing remembered.",
        "",
        *[f"* **{kind}**: {MEANING[kind]}" for kind in CLASSES],
        "",
    ]


def _totals(results: list[Record]) -> list[str]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for record in results:
        counts[record["transform"]][record["class"]] += 1
    header = [SHORT.get(kind, kind) for kind in CLASSES]
    lines = ["## Totals", "", "| transform | " + " | ".join(header) + " |"]
    lines += ["| --- " * (len(header) + 1) + "|"]
    for transform in TRANSFORMS:
        count = counts[transform.name]
        cells = " | ".join(str(count[kind] or "") for kind in CLASSES)
        lines.append(f"| {_promised(transform)} | {cells} |")
    return [*lines, "", "In bold: must be right wherever the loop over rows is.", ""]


def _promised(transform) -> str:
    return f"**{transform.name}**" if transform.promised else transform.name


def _left_out(records: list[Record], judged: dict) -> list[str]:
    tried = {(unit, case) for unit, case, _ in judged}
    reasons: dict[str, set] = defaultdict(set)
    for record in records:
        if "skipped" in record and (record["unit"], record["case"]) not in tried:
            reasons[record["skipped"]].add((record["unit"], record["case"]))
        if record.get("cut"):
            reasons["the unit took too long, and was cut"].add((record["unit"], ""))
        if "harness" in record:
            reasons[f"the harness failed: {record['harness'][:80]}"].add(
                (record["unit"], record["case"])
            )
    lines = ["## Left out", "", "| why | samples |", "| --- | --- |"]
    for reason, found in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {_cell(reason)} | {len(found)} |")
    return [*lines, ""]


def _torch(cases: dict) -> list[str]:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (unit, case), record in cases.items():
        for name, gap in record["torch wrong"].items():
            found[unit, name].append(f"{case}: {gap}")
    lines = ["## Where plain autograd is wrong, as central differences say", ""]
    lines += ["| unit | derivative | samples |", "| --- | --- | --- |"]
    for (unit, name), gaps in found.items():
        lines.append(f"| {unit} | {name} | {_cell('; '.join(dict.fromkeys(gaps)))} |")
    lines += ["", "The smallest functions that show it:", ""]
    for one in REPRODUCTIONS:
        derivative = "first derivative" if one.order == 1 else "second derivative"
        lines += [f"**{one.name}**, {derivative}: {one.what}.", "", "```python"]
        lines += ["import torch", *one.code.strip().splitlines(), "```", ""]
    return lines


def _notable(results: list[Record]) -> list[str]:
    bad = [r for r in results if r["class"] not in (RIGHT, DOCUMENTED)]
    bad.sort(key=lambda r: (-CLASSES.index(r["class"]), r["unit"], r["case"]))
    lines = ["## Neither right nor a documented error", ""]
    lines += ["| unit | sample | transform | class | what |", "| --- " * 5 + "|"]
    for r in bad:
        kind = SHORT.get(r["class"], r["class"])
        cells = (r["unit"], r["case"], r["transform"], kind, r["detail"])
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return [*lines, ""] if bad else ["## Neither right nor a documented error", "", "None.", ""]


def _documented(results: list[Record]) -> list[str]:
    """One line for each unit and reason, with the transforms that gave it."""
    found: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for r in results:
        if r["class"] == DOCUMENTED:
            found[r["unit"], reason(r["detail"])][r["transform"]] += 1
    lines = ["## Documented errors", ""]
    lines += ["| unit | reason | transforms, and number of cases |", "| --- | --- | --- |"]
    for (unit, why), count in sorted(found.items()):
        names = ", ".join(f"{name} {n}" for name, n in count.items())
        lines.append(f"| {unit} | {_cell(why)} | {_cell(names)} |")
    return lines


def reason(detail: str) -> str:
    """An error message without what differs from sample to sample."""
    text = re.sub(r"^call \d+: ", "", detail).splitlines()[0]
    text = re.sub(r"^\w+: batch_\w+: ", "", text)
    text = re.sub(r"^engine='\w+' with mode='\w+' cannot differentiate func.*?runs: ", "", text)
    text = re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", text)
    return re.sub(r" Use engine=.*", "", text)[:140]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:240]

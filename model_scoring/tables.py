"""What a score looks like: the listing of one ruler, the summary of all, before beside after, and JSON."""

from dataclasses import asdict
from typing import Any

from engine.evaluation import Evaluation
from engine.program.report import table, with_unit
from rulers.tally import Tally, Task


def listing(tally: Tally) -> str:
    """Every layer, and every group's subtotal, whose parameters are also said in megabytes of 32-bit values."""
    headers = ["layer", "kernel at input, channels", "kept as", "weights", "zeros", "params", "mults", "adds", "MFLOP"]
    rows = []
    for group in tally.groups:
        rows += [
            [f"  {line.name}", line.shape, line.note, *_amounts(line.numel, line.nonzero), f"{line.bits / 32:,.0f}",
             f"{line.mults:,.0f}", f"{line.adds:,.0f}", f"{tally.line_mflop(line):.2f}"]
            for line in group.lines
        ]  # fmt: skip
        totals = {key: group.total(key) for key in ("numel", "nonzero", "mults", "adds")}
        megabytes = f"{tally.scoring_params(group) * 4e-6:.3f} MB"
        rows.append(
            [group.name.upper(), "", megabytes, *_amounts(totals["numel"], totals["nonzero"]),
             f"{tally.scoring_params(group):,.0f}", f"{totals['mults']:,.0f}", f"{totals['adds']:,.0f}",
             f"{tally.mflop(group):.2f}"]
        )  # fmt: skip
    return f"The {tally.ruler} ruler\n\n" + table(headers, rows)


def _amounts(numel: float, nonzero: float) -> tuple[str, str]:
    return (f"{numel:,.0f}", f"{100 * (1 - nonzero / numel):.2f}%") if numel else ("", "")


def summary(tallies: dict[str, Tally], task: Task, dataset: str, classes: int, evaluation: Evaluation | None) -> str:
    """The totals of every ruler, the score against the task's baseline, the accuracy against its threshold."""
    headers = ["ruler", "bits (value/mul/add)", "params", "zeros", "scoring params", "MB", "MFLOP", "score"]
    rows = [
        [
            name,
            f"{tally.widths.value}/{tally.widths.act or tally.widths.mul}/{tally.widths.add}",
            f"{tally.params:,}",
            f"{tally.zeros_percent:.2f}%",
            f"{tally.total_scoring_params:,.0f}",
            f"{tally.megabytes:.3f}",
            f"{tally.total_mflop:.2f}",
            f"{tally.score(task):.14f}{_incomplete(tally)}",
        ]
        for name, tally in tallies.items()
    ]
    own_task = task.is_solved_by(dataset, classes)
    foreign = (
        f" ({dataset} with {classes} classes is no task of the challenge)" if task.correct and not own_task else ""
    )
    lines = [
        "\nSummary",
        table(headers, rows),
        f"Baseline   {task.name}: {with_unit(task.base_params)} params, {with_unit(task.base_ops)} operations{foreign}",
        *(_compared(tally, task) for tally in tallies.values() if tally.ruler == "challenge"),
    ]
    if task.correct:
        lines.append(f"Threshold  {task.correct:,} of {task.images:,} right on {task.name}")
    if evaluation:
        verdict = ""
        if own_task:
            holds = evaluation.correct * task.images >= task.correct * evaluation.images
            verdict = ", which holds the threshold" if holds else ", which misses the threshold"
        value, act = next(iter(tallies.values())).widths.value, tallies["challenge"].widths.act
        lines.append(
            f"Accuracy   {evaluation.accuracy:.2f}% ({evaluation.correct:,} of {evaluation.images:,} right{verdict}; "
            f"parameters rounded to {value} bit{f', activations to {act}' if act else ''})"
        )
    if by_analogy := _by_analogy(tallies):
        lines.append(f"By analogy {by_analogy}")
    lines += [f"Uncounted  {line}" for line in _uncounted(tallies)]
    return "\n".join(lines)


def _compared(tally: Tally, task: Task) -> str:
    """The two parts of a score, and how many times smaller than the baseline each is."""
    params, ops = tally.total_scoring_params / task.base_params, tally.total_mflop * 1e6 / task.base_ops
    times = [f"{1 / part:,.1f} times" if part else "no" for part in (params, ops)]
    return (
        f"Score      {params:.5f} of its parameters + {ops:.5f} of its operations on {tally.ruler}\n"
        f"           {times[0]} smaller, {times[1]} fewer operations"
    )


def _incomplete(tally: Tally) -> str:
    return " (incomplete)" if tally.uncounted else ""


def _by_analogy(tallies: dict[str, Tally]) -> str:
    """The operations that the challenge's rules do not name, and what share of each ruler's operations they are."""
    names = sorted({name for tally in tallies.values() for name, mflop in tally.by_analogy.items() if mflop})
    shares = ", ".join(
        f"{sum(tally.by_analogy.values()) / tally.total_mflop:.2%} of the operations on {name}"
        for name, tally in tallies.items()
        if any(tally.by_analogy.values())
    )
    return f"{', '.join(names)}: {shares}" if names else ""


def _uncounted(tallies: dict[str, Tally]) -> list[str]:
    """A line for each kind of operation without a rule: how often it runs, and where."""
    lines: dict[str, None] = {}
    for tally in tallies.values():
        for kind in dict.fromkeys(entry.operation for entry in tally.uncounted):
            entries = [entry for entry in tally.uncounted if entry.operation == kind]
            where = entries[0].place or "the network" if len(entries) == 1 else f"{len(entries)} modules"
            lines[f"{kind}, {sum(entry.count for entry in entries)} times in {where}"] = None
    return list(lines)


def before_and_after(
    before: Tally, after: Tally, task: Task, evaluations: tuple[Evaluation | None, Evaluation | None]
) -> str:
    """Two tallies, and two accuracies, side by side; no accuracy where there is none of the second."""
    rows = [
        ["zeros", f"{before.zeros_percent:.2f}%", f"{after.zeros_percent:.2f}%"],
        ["scoring params", *(with_unit(t.total_scoring_params) for t in (before, after))],
        ["FLOP", *(with_unit(t.total_mflop * 1e6) for t in (before, after))],
        ["score", *(f"{t.score(task):.5f}{_incomplete(t)}" for t in (before, after))],
    ]
    if evaluations[1]:
        rows.insert(0, ["accuracy", *(f"{one.accuracy:.2f}%" if one else "-" for one in evaluations)])
    return table(["", "before", "after"], rows)


def as_dict(tally: Tally, task: Task) -> dict[str, Any]:
    """A tally with its sums, ready for JSON."""
    return {
        **asdict(tally),
        "zeros_percent": tally.zeros_percent,
        "scoring_params": tally.total_scoring_params,
        "megabytes": tally.megabytes,
        "mflop": tally.total_mflop,
        "score": tally.score(task),
        "incomplete": bool(tally.uncounted),
        "subtotals": {
            group.name: {"scoring_params": tally.scoring_params(group), "mflop": tally.mflop(group)}
            for group in tally.groups
        },
    }

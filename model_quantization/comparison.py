"""All finished pairs of a grid side by side: the table, the plots, and the best network."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from engine.images.batches import Data
from engine.program.report import short, table
from engine.store.checkpoint import Checkpoint, Content, expecting, read_network
from engine.store.files import write_text
from engine.store.run_folder import Record, Run, publish
from engine.store.run_list import differences, runs_in
from rulers.tally import task_of


@dataclass(frozen=True)
class Choice:
    """What makes a pair the best one: "accuracy", or the smallest "score" that holds `threshold` percent.

    `threshold` None is that of the data set's task.
    """

    by: str = "accuracy"
    threshold: float | None = None


@dataclass(frozen=True)
class Best:
    """The best of some results: its place among them, its file, the plots, and by what it was selected."""

    index: int
    path: Path
    pictures: list[Path]
    rule: str


def write(
    finished: list[tuple[Run, Record]], runs: list[Run], checkpoint: Checkpoint, data: Data, choice: Choice
) -> Best:
    """Write the finished runs' results, the plots, and the best network, beside them, by the name of `checkpoint`.

    `runs` are all of this command's.
    """
    from model_quantization.plots import plot_layers, plot_sweep  # imports matplotlib: no earlier than it is needed

    name = checkpoint.path.stem
    results = [result for _, result in finished]
    save_dir, task = runs[0].folder.parent, task_of(data.name)
    threshold = task.threshold_percent if choice.threshold is None else choice.threshold
    best, rule = select(results, choice.by, threshold)
    run, row = finished[best]
    path = save_dir / "Ternary_best_acc.pt"
    content = read_best(run, row["phase"])
    publish({key: value for key, value in content.items() if key != "layers"}, path, run, runs)
    write_text(save_dir / f"{name}_sweep.json", json.dumps(results, indent=2) + "\n")
    is_own_task = task.is_solved_by(data.name, len(data.classes))
    lines = {"to hold": threshold} if is_own_task or choice.threshold is not None else {}
    before = checkpoint.extra
    if isinstance(before.get("accuracy"), float) and before.get("dataset") == data.name:
        lines["full precision"] = before["accuracy"]
    title = f"{name}, {data.name}"
    pictures = [
        plot_sweep(results, best, lines, title, save_dir / f"{name}_sweep.png"),
        plot_layers(content["assignments"], row, title, save_dir / f"{name}_layers.png"),
    ]
    return Best(best, path, pictures, rule)


def shown(finished: list[tuple[Run, Record]], runs: list[Run], best: Best) -> str:
    """The table of the results, those of earlier commands with what differs, and which is best by what."""
    results = [result for _, result in finished]
    row = results[best.index]
    lines = [table_of(results, best.index), "", ruler_line(results)]
    if len({result["seed"] for result in results}) > 1:
        lines += ["", means(results)]
    if earlier := others(runs):
        lines += ["", "Earlier pairs of this network on these images, and what differs from this command", earlier]
    lines += [
        "",
        f"Plots: {' '.join(map(str, best.pictures))}",
        f"Best by {best.rule}: s {short(row['s'])}, g {row['g']:g}, {row['accuracy']:.2f}%, "
        f"{row['zeros']:.2f}% zeros -> {best.path}",
    ]
    return "\n".join(lines)


def others(runs: list[Run]) -> str:
    """A table of the finished runs beside `runs` that are of the same network and images; empty without any."""
    own, names = runs[0].arguments, {run.folder.name for run in runs}
    same = [
        found
        for found in runs_in(runs[0].folder.parent)
        if found.result
        and found.folder.name not in names
        and all(found.arguments.get(key) == own.get(key) for key in ("sha256", "data", "dataset"))
    ]
    if not same:
        return ""
    of_pairs = {key: own.get(key) for key in ("s", "g")}  # they have columns of their own
    rows = []
    for found in same:
        result, theirs = found.result or {}, found.arguments | of_pairs
        values = [short(found.arguments["s"]), f"{found.arguments['g']:g}"]
        values += [f"{result[key]:.2f}%" for key in ("accuracy", "zeros")]
        rows.append([*values, f"{result['score']:.5f}", differences([theirs, own])[0]])
    return table(["s", "g", "accuracy", "zeros", "score", "what differs"], rows)


def read_best(run: Run, phase: str) -> Content:
    """Read the best network of a phase: tensors, assignments and centroids by layer."""
    path = run.folder / f"best_{phase}.pt"
    checkpoint = read_network(path)
    with expecting(path, "the best network of this run"):
        assignments, centroids = checkpoint.extra["assignments"], checkpoint.extra["centroids"]
        if not assignments or assignments.keys() != centroids.keys():
            raise ValueError("assignments and centroids of different layers")
        for name, assignment in assignments.items():
            if assignment.shape != checkpoint.state_dict[name].shape:
                raise ValueError(f"the assignment of {name} is {list(assignment.shape)}")
    return {"model": checkpoint.spec, "state_dict": checkpoint.state_dict, **checkpoint.extra}


def select(results: list[Record], by: str, threshold: float) -> tuple[int, str]:
    """The index of the best result, and by what: the highest accuracy, or the smallest score that holds `threshold` %.

    The score is that of 16-bit parameters, and so is the accuracy that must hold the threshold. Where none holds it,
    the highest accuracy is best by score too. Among equal accuracies the smallest score is best.
    """
    rule = "accuracy"
    if by == "score":
        holding = [i for i, r in enumerate(results) if r["accuracy_16_bit"] >= threshold]
        if holding:
            return min(holding, key=lambda i: results[i]["score"]), f"score at {threshold:g}% or more"
        rule = f"accuracy, as none holds {threshold:g}% with 16 bit"
    return max(range(len(results)), key=lambda i: (results[i]["accuracy"], -results[i]["score"])), rule


def table_of(results: list[Record], best: int) -> str:
    """The table of all finished pairs, the best one marked."""
    seeds = ["seed"] * (len({r["seed"] for r in results}) > 1)
    params = ["params"] * differ_in_size(results)
    headers = [
        "s",
        "g",
        *seeds,
        "accuracy",
        "16 bit",
        "zeros",
        "entropy",
        *params,
        "MFLOP",
        "score",
        "best epoch",
        "time",
        "",
    ]
    rows = [
        [
            short(r["s"]),
            f"{r['g']:g}",
            *(r[key] for key in seeds),
            f"{r['accuracy']:.2f}%",
            f"{r['accuracy_16_bit']:.2f}%",
            f"{r['zeros']:.2f}%",
            f"{r['entropy']:.3f} bit",
            *(f"{r['scoring_params']:,.0f}" for _ in params),
            f"{r['mflop']:.2f}",
            f"{r['score']:.5f}",
            f"{r['phase']} {r['epoch']}",
            f"{r['seconds']:.0f} s",
            ", ".join(["best"] * (i == best) + ["diverged"] * bool(r.get("diverged"))),
        ]
        for i, r in enumerate(results)
    ]
    return table(headers, rows)


def differ_in_size(results: list[Record]) -> bool:
    """Whether scoring params tell the results apart: on the published ruler they do not depend on zeros."""
    return len(results) == 1 or len({r["scoring_params"] for r in results}) > 1


def ruler_line(results: list[Record]) -> str:
    """On which ruler the results are counted, and what is the same for all of them."""
    rulers = " or ".join(dict.fromkeys(r["ruler"] for r in results))
    same = "" if differ_in_size(results) else f"; scoring params are {results[0]['scoring_params']:,.0f} for all"
    return f"Counted on the {rulers} ruler, with values of 16 bit{same}"


def means(results: list[Record]) -> str:
    """A table of each pair's mean and standard deviation (of a sample) over its seeds."""
    pairs: dict[tuple[object, float], list[Record]] = {}
    for result in results:
        pairs.setdefault((result["s"], result["g"]), []).append(result)
    rows = []
    for (s, g), of_seeds in pairs.items():
        shown = []
        for key, form, unit in (("accuracy", ".2f", "%"), ("zeros", ".2f", "%"), ("score", ".5f", "")):
            values = [result[key] for result in of_seeds]
            deviation = f"{stdev(values):{form}}" if len(values) > 1 else "-"
            shown.append(f"{fmean(values):{form}}{unit} +- {deviation}")
        rows.append([short(s), f"{g:g}", len(of_seeds), *shown])
    return table(["s", "g", "seeds", "accuracy", "zeros", "score"], rows)

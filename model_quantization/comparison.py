"""All finished pairs of a grid side by side: the table, the plots, and the best network."""

import json
from dataclasses import dataclass
from pathlib import Path

from engine.images.batches import Data
from engine.program.report import say, short, table
from engine.store.checkpoint import Content, expecting, read_network, save
from engine.store.files import write_text
from engine.store.run_folder import Record, Run
from model_quantization.plots import plot_layers, plot_sweep
from rulers.tally import task_of


@dataclass(frozen=True)
class Choice:
    """What makes a pair the best one: "accuracy", or the smallest "score" that holds `threshold` percent.

    `threshold` None is that of the data set's task.
    """

    by: str = "accuracy"
    threshold: float | None = None


def compare(finished: list[tuple[Run, Record]], name: str, data: Data, choice: Choice) -> Path:
    """Compare runs by their results; write the table, the plots and the best network beside them, under `name`.

    Returns the best network's file.
    """
    runs, results = [run for run, _ in finished], [result for _, result in finished]
    save_dir, task = runs[0].folder.parent, task_of(data.name)
    threshold = task.threshold_percent if choice.threshold is None else choice.threshold
    best = select(results, choice.by, threshold)
    say("\n" + table_of(results, best))
    best_path = save_dir / "Ternary_best_acc.pt"
    content = read_best(runs[best], results[best]["phase"])
    save({key: value for key, value in content.items() if key != "layers"}, best_path)
    write_text(save_dir / f"{name}_sweep.json", json.dumps(results, indent=2) + "\n")
    is_own_task = task.is_solved_by(data.name, len(data.classes))
    held = threshold if is_own_task or choice.threshold is not None else None
    title = f"{name}, {data.name}"
    pictures = [
        plot_sweep(results, best, held, title, save_dir / f"{name}_sweep.png"),
        plot_layers(content["assignments"], results[best], title, save_dir / f"{name}_layers.png"),
    ]
    say(f"\nPlots: {' '.join(map(str, pictures))}")
    row = results[best]
    rule = "accuracy" if choice.by == "accuracy" else f"score at {threshold:g}% or more"
    say(
        f"Best by {rule}: s {short(row['s'])}, g {row['g']:g}, {row['accuracy']:.2f}%, "
        f"{row['zeros']:.2f}% zeros -> {best_path}"
    )
    return best_path


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


def select(results: list[Record], by: str, threshold: float) -> int:
    """The index of the best result: the highest accuracy, or the smallest score that holds `threshold` percent.

    The score is that of 16-bit parameters, and so is the accuracy that must hold the threshold. Where none holds it,
    the highest accuracy is best by score too. Among equal accuracies the smallest score is best.
    """
    if by == "score":
        holding = [i for i, r in enumerate(results) if r["accuracy_16_bit"] >= threshold]
        if holding:
            return min(holding, key=lambda i: results[i]["score"])
        say(f"\nNo network holds {threshold:g}% with 16 bit: the highest accuracy counts")
    return max(range(len(results)), key=lambda i: (results[i]["accuracy"], -results[i]["score"]))


def table_of(results: list[Record], best: int) -> str:
    """The table of all finished pairs, the best one marked."""
    headers = [
        "s",
        "g",
        "accuracy",
        "at 16 bit",
        "zeros",
        "entropy",
        "scoring params",
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
            f"{r['accuracy']:.2f}%",
            f"{r['accuracy_16_bit']:.2f}%",
            f"{r['zeros']:.2f}%",
            f"{r['entropy']:.3f} bit",
            f"{r['scoring_params']:,.0f}",
            f"{r['mflop']:.2f}",
            f"{r['score']:.5f}",
            f"{r['phase']} {r['epoch']}",
            f"{r['seconds']:.0f} s",
            ", ".join(["best"] * (i == best) + ["diverged"] * bool(r.get("diverged"))),
        ]
        for i, r in enumerate(results)
    ]
    return table(headers, rows)

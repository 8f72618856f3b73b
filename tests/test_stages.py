"""The three programs on real images (scikit-learn's digits), run in this process: results, resuming, selection."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import engine.training
import model_compound_scaling.search
import model_quantization.sweep
import model_scoring.scoring
from engine.checkpoint import network_content, read, save
from model import build
from model_compound_scaling.arguments import parser as scaling_parser
from model_compound_scaling.training import learning_rate_factor
from model_quantization.arguments import parser as quantization_parser
from model_scoring.arguments import parser as scoring_parser
from model_scoring.layers import load_layer

DIGITS = "--dataset digits --image-size 8 --batch-size 479 --no-cuda --amp off".split()  # three steps an epoch
FILES = ("last.pt", "log.jsonl", "arguments.json")


def scale(save_dir: Path, *arguments: str) -> int:
    command = [*DIGITS, "--phi", "1", "--save-dir", str(save_dir), *arguments]
    return model_compound_scaling.search.run(scaling_parser().parse_args(command))


def quantize(checkpoint: Path, save_dir: Path, *arguments: str) -> int:
    command = ["--model-dict", str(checkpoint), *DIGITS, "--save-dir", str(save_dir), *arguments]
    return model_quantization.sweep.run(quantization_parser().parse_args(command))


def score(checkpoint: Path, *arguments: str) -> int:
    command = ["--t-model", str(checkpoint), "--no-cuda", *arguments]
    return model_scoring.scoring.run(scoring_parser().parse_args(command))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    """A ResNet-20 for digits, untrained: enough wherever accuracy does not matter."""
    torch.manual_seed(0)
    spec = {"name": "resnet20", "num_classes": 10}
    path = tmp_path_factory.mktemp("fp") / "resnet.pt"
    save(network_content(spec, build(spec), dataset="digits", image_size=8), path)
    return path


def interrupt_after(monkeypatch, epochs: int) -> None:
    """Let Ctrl-C arrive in the middle of the epoch after `epochs` whole ones."""
    calls = itertools.count()
    original = engine.training.F.cross_entropy

    def cross_entropy(*args, **kwargs):
        if "reduction" not in kwargs and next(calls) == 3 * epochs + 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(engine.training.F, "cross_entropy", cross_entropy)


def runs(save_dir: Path) -> list[Path]:
    return sorted(p for p in save_dir.iterdir() if p.is_dir())


def assert_same_runs(first: Path, second: Path, files: tuple[str, ...]) -> None:
    assert [p.name for p in runs(first)] == [p.name for p in runs(second)] != []
    for one, two in zip(runs(first), runs(second)):
        for name in files:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_scaling_trains_compares_and_keeps_every_point(tmp_path, capsys):
    assert scale(tmp_path, "--grid", "0.14", "1", "0.14", "0.5", "--epochs", "2", "--lr", "0.05") == 0
    assert len(runs(tmp_path)) == 2
    results = [json.loads((run / "result.json").read_text()) for run in runs(tmp_path)]
    best = max(results, key=lambda r: r["accuracy"])
    content = read(tmp_path / "best_model.pt")
    assert content["model"] == best["spec"] and content["accuracy"] == best["accuracy"]
    table = capsys.readouterr().out.split("\n\n")[-2]
    assert "1-1-1" in table and "16-32-64" in table and "8-16-32" in table
    for result in results:
        assert f"{result['accuracy']:.2f}%" in table


@pytest.mark.parametrize("whole_epochs", [0, 1])
def test_scaling_resumes_bit_identically(tmp_path, monkeypatch, whole_epochs):
    arguments = ["--grid", "0.14", "0.5", "--epochs", "3", "--lr", "0.05"]
    scale(tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, whole_epochs)
        scale(tmp_path / "parts", *arguments)
    scale(tmp_path / "parts", *arguments)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", (*FILES, "best.pt"))
    assert (tmp_path / "whole/best_model.pt").read_bytes() == (tmp_path / "parts/best_model.pt").read_bytes()


def rates(run: Path) -> list[float]:
    """The learning rate of each epoch that a run notes."""
    return [json.loads(line)["lr"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ([], [0.05, 0.05 * (1 + 0.5**0.5) / 2, 0.025, 0.05 * (1 - 0.5**0.5) / 2]),
        (["--start-epoch", "2"], [0.025, 0.00732]),
    ],
)
def test_scaling_lets_the_learning_rate_fall_along_a_half_cosine(start, expected, tmp_path):
    scale(tmp_path, "--grid", "0.14", "0.5", "--epochs", "4", "--lr", "0.05", *start)
    (run,) = runs(tmp_path)
    assert rates(run) == pytest.approx(expected, rel=1e-3)


def test_scaling_on_imagenet_lets_the_learning_rate_fall_in_steps():
    factors = [learning_rate_factor("ImageNet", epoch, 100) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize(("flag", "value"), [("--momentum", "0"), ("--weight-decay", "0.1")])
def test_scaling_heeds_momentum_and_weight_decay(flag, value, tmp_path):
    arguments = "--grid 0.14 0.5 --epochs 1 --lr 0.05".split()
    losses = []
    for folder, changed in ((tmp_path / "default", []), (tmp_path / "changed", [flag, value])):
        scale(folder, *arguments, *changed)
        (run,) = runs(folder)
        losses.append(json.loads((run / "log.jsonl").read_text())["val_loss"])
    assert losses[0] != losses[1]


def test_sustained_lambda_reaches_the_small_layers(resnet, tmp_path):
    arguments = "--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.5".split()
    zeros = []
    for sigma in ("0", "0.5"):
        quantize(resnet, tmp_path / sigma, *arguments, "--lambda-sustain", sigma)
        assignments = read(tmp_path / sigma / "Ternary_best_acc.pt")["assignments"]
        zeros.append((assignments["layer1.0.conv1.weight"] == 0).double().mean().item())
    assert zeros[1] > zeros[0] + 0.02


def test_cosine_schedule_falls_to_nothing_in_each_phase(resnet, tmp_path):
    arguments = "--epochs 3 --retrain-epochs 2 --lr 1e-3 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split()
    quantize(resnet, tmp_path, *arguments, "--schedule", "cosine")
    (run,) = runs(tmp_path)
    assert rates(run) == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.25e-3, 1e-3, 0.5e-3])  # before training, then each epoch


@pytest.mark.parametrize("amp", ["auto", "bf16", "fp16"])
def test_mixed_precision_trains_and_the_log_says_which(resnet, tmp_path, amp):
    arguments = "--epochs 1 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0".split()
    quantize(resnet, tmp_path / "off", *arguments)
    quantize(resnet, tmp_path / amp, *arguments, "--amp", amp)
    (reference,), (run,) = runs(tmp_path / "off"), runs(tmp_path / amp)
    records = [json.loads((folder / "log.jsonl").read_text().splitlines()[1]) for folder in (reference, run)]
    used = records[1]["amp"]
    assert records[0]["amp"] == "off" and (used == amp or amp == "auto" and used in ("bf16", "off"))
    losses = [record["train_loss"] for record in records]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (losses[1] == losses[0]) == (used == "off")


FOUR_EPOCHS = (
    "--epochs 2 --retrain-epochs 2 --lr 1e-3 --schedule cosine --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split()
)


@pytest.fixture(scope="module")
def whole(resnet, tmp_path_factory) -> Path:
    """The results of FOUR_EPOCHS, and in the folder `--do-prune` of pruning, that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    quantize(resnet, folder, *FOUR_EPOCHS)
    quantize(resnet, folder / "--do-prune", *FOUR_EPOCHS, "--do-prune")
    return folder


def assert_same_results(whole: Path, parts: Path) -> None:
    (one,), (two,) = ([run for run in runs(folder) if run.name != "--do-prune"] for folder in (whole, parts))
    assert one.name == two.name
    networks = [path.name for path in one.glob("best*.pt")]
    assert networks
    for name in (*FILES, *networks, "../Ternary_best_acc.pt"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize(("whole_epochs", "prune"), [(0, ""), (1, ""), (2, ""), (3, ""), (2, "--do-prune")])
def test_quantization_resumes_bit_identically(resnet, whole, tmp_path, monkeypatch, whole_epochs, prune):
    arguments = [*FOUR_EPOCHS, *filter(None, [prune])]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, whole_epochs)
        quantize(resnet, tmp_path, *arguments)
    quantize(resnet, tmp_path, *arguments)
    assert_same_results(whole / prune, tmp_path)


@pytest.mark.parametrize("bests_before", [0, 1])
def test_a_best_network_that_was_not_saved_in_time_follows_from_the_state(
    resnet, whole, tmp_path, monkeypatch, bests_before
):
    """A process that ends between `last.pt` and the best network's file."""
    saved, original = itertools.count(), model_quantization.training.save

    def save_until_killed(content: dict, path: Path) -> None:
        if next(saved) == bests_before:
            raise KeyboardInterrupt
        original(content, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_quantization.training, "save", save_until_killed)
        quantize(resnet, tmp_path, *FOUR_EPOCHS)
    quantize(resnet, tmp_path, *FOUR_EPOCHS)
    assert_same_results(whole, tmp_path)


def test_time_is_counted_over_all_processes_of_a_run(tmp_path, monkeypatch):
    arguments = ["--grid", "0.14", "0.5", "--epochs", "2", "--lr", "0.05"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        scale(tmp_path, *arguments)
    (run,) = runs(tmp_path)
    assert float((run / "seconds").read_text()) > 0
    (run / "seconds").write_text("1000\n")
    scale(tmp_path, *arguments)
    assert 1000 < json.loads((run / "result.json").read_text())["seconds"] < 1100


def test_resume_refuses_states_of_other_runs(resnet, tmp_path, monkeypatch):
    arguments = "--epochs 2 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        quantize(resnet, tmp_path / "first", *arguments)
    (last,) = (run / "last.pt" for run in runs(tmp_path / "first"))
    with pytest.raises(engine.UserError, match="lr was 0.0001 and is 0.5"):
        quantize(resnet, tmp_path / "second", *arguments, "--lr", "0.5", "--resume", str(last))
    with pytest.raises(engine.UserError, match="no run's state"):
        quantize(resnet, tmp_path / "second", *arguments, "--resume", str(resnet))


def test_a_finished_point_is_not_run_again_unless_wanted(resnet, tmp_path, capsys):
    arguments = "--epochs 1 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split()
    quantize(resnet, tmp_path, *arguments)
    capsys.readouterr()
    quantize(resnet, tmp_path, *arguments)
    assert "finished before" in capsys.readouterr().out
    quantize(resnet, tmp_path, *arguments, "--no-resume")
    assert "finished before" not in capsys.readouterr().out


def test_grid_points_are_independent_of_each_other_and_of_shards(resnet, tmp_path):
    """The second point of a sweep equals the same point run alone; shards together equal the sweep."""
    common = "--epochs 1 --retrain-epochs 1 --lambda-max-divrs 0.1".split()
    quantize(resnet, tmp_path / "sweep", *common, "--ini-c-divrs", "0.3", "0.5")
    quantize(resnet, tmp_path / "alone", *common, "--ini-c-divrs", "0.5")
    (alone,) = runs(tmp_path / "alone")
    assert (alone / "last.pt").read_bytes() == (tmp_path / "sweep" / alone.name / "last.pt").read_bytes()

    for shard in ("1/2", "2/2"):
        quantize(resnet, tmp_path / "shards", *common, "--ini-c-divrs", "0.3", "0.5", "--shard", shard)
        done = json.loads((tmp_path / "shards" / "resnet_sweep.json").read_text())
        assert len(done) == int(shard[0])
    assert_same_runs(tmp_path / "sweep", tmp_path / "shards", FILES)


def test_ternary_checkpoint_holds_what_it_says(resnet, tmp_path):
    quantize(resnet, tmp_path, *"--epochs 1 --retrain-epochs 1 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split())
    content = read(tmp_path / "Ternary_best_acc.pt")
    assert len(content["assignments"]) == 18
    for name, assignment in content["assignments"].items():
        w_p, w_n = content["centroids"][name]
        weight = torch.where(assignment > 0, w_p, torch.where(assignment < 0, -w_n, 0.0))
        assert torch.equal(weight, content["state_dict"][name])
        assert {-1, 0, 1} == set(assignment.unique().tolist())


def test_pruning_leaves_ternary_layers_bit_identical(tmp_path):
    torch.manual_seed(0)
    spec = {"name": "resnet20", "num_classes": 10}
    content = network_content(spec, build(spec), dataset="digits", image_size=8)
    for name in ("layer1.0.conv1.weight", "layer3.2.conv2.weight"):
        weight = content["state_dict"][name]
        content["state_dict"][name] = 0.1 * weight.sign() * (weight.abs() > weight.std())
    save(content, tmp_path / "half_ternary.pt")
    arguments = "--do-prune --epochs 2 --retrain-epochs 1 --lr 1e-3 --weight-decay 0.1".split()
    quantize(tmp_path / "half_ternary.pt", tmp_path, *arguments, "--ini-c-divrs", "0.3", "--lambda-max-divrs", "0.1")
    (run,) = runs(tmp_path)
    state = read(run / "last.pt")["state"]["network"]
    for name, weight in content["state_dict"].items():
        if name in ("layer1.0.conv1.weight", "layer3.2.conv2.weight"):
            assert torch.equal(state[name], weight)
        elif ".conv" in name:
            assert (state[name] == 0).any() and state[name].unique().numel() > 100
        elif name == "linear.weight":
            assert not torch.equal(state[name], weight)


def test_pruning_a_network_without_dense_layers_is_refused(resnet, tmp_path):
    quantize(resnet, tmp_path, *"--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split())
    with pytest.raises(engine.UserError, match="all layers that --do-prune prunes are ternary"):
        quantize(tmp_path / "Ternary_best_acc.pt", tmp_path, "--do-prune", "--ini-c-divrs", "0.3")


def test_where_every_pair_diverges_that_is_an_error(resnet, tmp_path, capsys):
    arguments = "--ini-c-divrs 0.3 0.5 --lambda-max-divrs 0.1 --epochs 1 --retrain-epochs 0 --lr 1e35 --lr2 1e30"
    with pytest.raises(engine.UserError, match="every pair diverged, see above; try a smaller --lr than 1e"):
        quantize(resnet, tmp_path, *arguments.split())
    said = capsys.readouterr().out
    assert said.count("best, diverged") == 1 and said.count("diverged\n") == 2


@pytest.mark.parametrize(("accuracies", "losses", "best"), [((5, 6, 6), (1, 3, 2), 2), ((6, 6, 5), (1, 1, 0), 0)])
def test_among_equally_accurate_epochs_the_smallest_loss_is_best(accuracies, losses, best, tmp_path):
    run = engine.runs.Run(tmp_path, "x", {})
    run.history = [{"accuracy": a, "val_loss": loss} for a, loss in zip(accuracies, losses)]
    assert run.best is run.history[best]


@pytest.mark.parametrize(("threshold", "said"), [([], "at 80% or more"), (["--threshold", "1.5"], "at 1.5% or more")])
def test_the_threshold_is_the_users_or_the_challenges_and_is_said(resnet, tmp_path, capsys, threshold, said):
    arguments = "--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1 --select score".split()
    quantize(resnet, tmp_path, *arguments, *threshold)
    out = capsys.readouterr().out
    assert f"Best by score {said}" in out and ("No network holds 80%" in out) == (not threshold)


def test_a_loss_that_becomes_nan_stops_the_point_and_keeps_the_last_good_network(tmp_path, capsys):
    with pytest.raises(engine.UserError, match="smaller --lr"):
        scale(tmp_path, "--grid", "0.14", "0.5", "--epochs", "2", "--lr", "1e30")
    assert "stopped: the training loss became" in capsys.readouterr().out
    assert not (tmp_path / "best_model.pt").exists()


@pytest.mark.parametrize(
    ("rows", "by", "best"),
    [
        ([(80.5, 3), (80.1, 2), (79.9, 1)], "accuracy", 0),
        ([(80.5, 3), (80.0, 2), (79.999, 1)], "score", 1),
        ([(70.0, 3), (71.0, 9)], "score", 1),
        ([(96.0, 3), (96.0, 2), (95.0, 1)], "accuracy", 1),
    ],
)
def test_selection(rows, by, best):
    results = [{"accuracy": accuracy, "accuracy_16_bit": accuracy, "score": points} for accuracy, points in rows]
    assert model_quantization.sweep.select(results, by, 80.0) == best


def test_the_threshold_must_hold_with_the_parameters_that_the_score_counts():
    results = [
        {"accuracy": 80.2, "accuracy_16_bit": 80.1, "score": 3},
        {"accuracy": 80.0, "accuracy_16_bit": 79.9, "score": 2},
    ]
    assert model_quantization.sweep.select(results, "score", 80.0) == 0


@pytest.mark.parametrize("coo", [False, True])
def test_exported_layers_read_back_to_the_same_weights(resnet, tmp_path, monkeypatch, coo):
    quantize(resnet, tmp_path, *"--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split())
    monkeypatch.setattr(model_scoring.scoring, "SAVED_LAYERS", str(tmp_path / "layers"))
    score(tmp_path / "Ternary_best_acc.pt", *["--save", "--pt-sparse"][: 1 + coo])
    state_dict = read(tmp_path / "Ternary_best_acc.pt")["state_dict"]
    files = list((tmp_path / "layers" / "Ternary_best_acc").iterdir())
    assert len(files) == 18
    for file in files:
        weight = state_dict[f"{file.stem}.weight"]
        assert torch.equal(load_layer(file), weight)
        if not coo and weight.numel() > 30_000:
            assert file.stat().st_size < weight.numel() / 4 + 2500  # two bits a weight, and torch's container


def test_scoring_prints_every_layer_and_the_score(resnet, tmp_path, capsys):
    quantize(resnet, tmp_path, *"--epochs 1 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split())
    (row,) = json.loads((tmp_path / "resnet_sweep.json").read_text())
    capsys.readouterr()
    for bits, accuracy in (("no-halfprecision", row["accuracy"]), ("halfprecision", row["accuracy_16_bit"])):
        score(tmp_path / "Ternary_best_acc.pt", "--eval", f"--{bits}")
        out = capsys.readouterr().out
        assert sum(line.startswith("  layer") for line in out.splitlines()) >= 18
        assert f"Accuracy   {accuracy:.2f}%" in out and f"{row['zeros']:.2f}%" in out


OWN_BUILDER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.linear = nn.Linear(8, 10)

    def forward(self, x):
        return self.linear(torch.softmax(self.conv(x), 1).mean((2, 3)))
"""


def test_a_users_own_network_is_counted_and_strict_names_what_has_no_rule(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_builder.py").write_text(OWN_BUILDER)
    monkeypatch.chdir(tmp_path)
    shapes = {"conv.weight": (8, 3, 3, 3), "linear.weight": (10, 8), "linear.bias": (10,)}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, "own.pt")
    command = [tmp_path / "own.pt", "--model", "own_builder:Net", "--json", "own.json"]
    assert score(*command) == 0
    assert "_softmax, 1 times" in capsys.readouterr().out
    report = json.loads(Path("own.json").read_text())
    assert set(report["rulers"]) == {"challenge", "improved"}
    # 30 x 30 outputs of 27 products and their sums, the mean, and the linear layer with its bias
    subtotals = report["rulers"]["challenge"]["groups"]
    mults = {group["name"]: sum(line["mults"] for line in group["lines"]) for group in subtotals}
    assert mults == {"convolutions": 27 * 8 * 900, "linear layers": 80, "poolings": 8}
    with pytest.raises(engine.UserError, match="_softmax"):
        score(*command, "--strict")
    with pytest.raises(engine.UserError, match="leave --pack"):
        score(*command, "--pack", "own.safetensors")
    with pytest.raises(engine.UserError, match="no form"):
        score(*command, "--accounting", "published")


def test_a_packed_file_scores_as_its_checkpoint_and_unpacks_to_it(resnet, tmp_path):
    quantize(resnet, tmp_path, *"--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split())
    packed, json_1, json_2 = tmp_path / "net.safetensors", tmp_path / "1.json", tmp_path / "2.json"
    score(tmp_path / "Ternary_best_acc.pt", "--pack", str(packed), "--json", str(json_1))
    score(packed, "--unpack", str(tmp_path / "again.pt"), "--json", str(json_2))
    one, two = (json.loads(path.read_text())["rulers"] for path in (json_1, json_2))
    assert {r: one[r]["score"] for r in one} == {r: two[r]["score"] for r in two}
    before, after = (read(tmp_path / name)["state_dict"] for name in ("Ternary_best_acc.pt", "again.pt"))
    for name in before:
        if ".conv" in name:
            assert torch.equal(before[name], after[name])


def test_evaluating_changes_nothing_of_what_is_exported(resnet, tmp_path):
    quantize(resnet, tmp_path, *"--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split())
    files = [tmp_path / "plain.safetensors", tmp_path / "evaluated.safetensors"]
    for file, evaluation in zip(files, ([], ["--eval"])):
        score(tmp_path / "Ternary_best_acc.pt", "--pack", str(file), "--unpack", f"{file}.pt", *evaluation)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert Path(f"{files[0]}.pt").read_bytes() == Path(f"{files[1]}.pt").read_bytes()


def test_a_users_own_network_may_end_in_batch_norm(tmp_path, monkeypatch):
    """The number of classes is that of its outputs, whatever its last tensor is."""
    layers = "nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7), nn.AdaptiveAvgPool2d(1), nn.Flatten()"
    (tmp_path / "ends_in_norm.py").write_text(
        f"from torch import nn\n\ndef net():\n    return nn.Sequential({layers})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import ends_in_norm

    torch.save(ends_in_norm.net().state_dict(), "own.pt")
    assert score(tmp_path / "own.pt", "--model", "ends_in_norm:net", "--json", "own.json") == 0
    assert json.loads(Path("own.json").read_text())["model"]["num_classes"] == 7


def test_what_can_not_be_compared_or_written_is_said_before_the_evaluation(resnet, tmp_path, monkeypatch):
    monkeypatch.setattr(model_scoring.scoring, "evaluate_network", None)
    for arguments, said in (
        (["--before", "nowhere.pt"], "no file 'nowhere.pt'"),
        (["--json", str(tmp_path)], "is a folder; pass the name of a file"),
    ):
        with pytest.raises(engine.UserError, match=said):
            score(resnet, "--eval", "--pack", str(tmp_path / "x.safetensors"), *arguments)


def test_a_network_of_other_classes_has_no_accuracy_before(resnet, tmp_path, capsys):
    spec = {"name": "resnet20", "num_classes": 20}
    save(network_content(spec, build(spec)), tmp_path / "other.pt")
    assert score(resnet, "--eval", "--before", str(tmp_path / "other.pt")) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy"))
    assert row[1] == "-" and row[2].endswith("%")


def test_before_and_after_stand_side_by_side(resnet, tmp_path, capsys):
    quantize(resnet, tmp_path, *"--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split())
    capsys.readouterr()
    score(tmp_path / "Ternary_best_acc.pt", "--eval", "--before", str(resnet))
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line.split()[-2:] for line in lines[lines.index("") :] if line}
    assert rows["zeros"][0].startswith("0") and float(rows["zeros"][1].rstrip("%")) > 40
    assert float(rows["score"][0]) > 5 * float(rows["score"][1])
    assert rows["accuracy"][0].endswith("%")

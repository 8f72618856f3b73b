"""Stage 2 on real images: results, resuming, independence, selection."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine
import engine.fit
import model_quantization.comparison
import model_quantization.grid
from engine.store.checkpoint import network_content, read, save
from helpers import ROOT
from helpers.refusals import refusal
from helpers.stages import FILES, assert_same_runs, interrupt_after, quantize, rates, runs
from model import build


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


ONE_EPOCH = "--epochs 1 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0".split()
FEW_IMAGES = ["--holdout", "0.95"]  # float16 is slow on CPUs


def first_epoch(save_dir: Path) -> dict:
    (run,) = runs(save_dir)
    return json.loads((run / "log.jsonl").read_text().splitlines()[1])


@pytest.fixture(scope="module")
def in_32_bit(resnet, tmp_path_factory) -> float:
    """The training loss of ONE_EPOCH on few images."""
    folder = tmp_path_factory.mktemp("32_bit")
    quantize(resnet, folder, *ONE_EPOCH, *FEW_IMAGES)
    assert first_epoch(folder)["amp"] == "off"
    return first_epoch(folder)["train_loss"]


@pytest.mark.parametrize(
    ("amp", "capability", "used"),
    [
        ("auto", "avx2", "off"),
        ("auto", "amx_bf16", "bf16"),
        pytest.param("bf16", "avx2", "bf16", marks=pytest.mark.robustness),
        pytest.param("fp16", "avx2", "fp16", marks=pytest.mark.robustness),
    ],
)
def test_mixed_precision_trains_and_the_log_says_which(resnet, in_32_bit, tmp_path, monkeypatch, amp, capability, used):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    quantize(resnet, tmp_path, *ONE_EPOCH, *FEW_IMAGES, "--amp", amp)
    epoch = first_epoch(tmp_path)
    assert epoch["amp"] == used
    assert epoch["train_loss"] == pytest.approx(in_32_bit, rel=0.02)
    assert (epoch["train_loss"] == in_32_bit) == (used == "off")


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
@pytest.mark.robustness
def test_quantization_resumes_bit_identically(resnet, whole, tmp_path, monkeypatch, whole_epochs, prune):
    arguments = [*FOUR_EPOCHS, *filter(None, [prune])]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, whole_epochs)
        quantize(resnet, tmp_path, *arguments)
    quantize(resnet, tmp_path, *arguments)
    assert_same_results(whole / prune, tmp_path)


@pytest.mark.parametrize("bests_before", [0, 1])
@pytest.mark.robustness
def test_a_best_network_that_was_not_saved_in_time_follows_from_the_state(
    resnet, whole, tmp_path, monkeypatch, bests_before
):
    """A process that ends between `last.pt` and the best network's file."""
    saved, original = itertools.count(), engine.fit.save

    def save_until_killed(content: dict, path: Path) -> None:
        if next(saved) == bests_before:
            raise KeyboardInterrupt
        original(content, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.fit, "save", save_until_killed)
        quantize(resnet, tmp_path, *FOUR_EPOCHS)
    quantize(resnet, tmp_path, *FOUR_EPOCHS)
    assert_same_results(whole, tmp_path)


def test_resume_refuses_states_of_other_runs(resnet, tmp_path, monkeypatch):
    arguments = "--epochs 2 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        quantize(resnet, tmp_path / "first", *arguments)
    (last,) = (run / "last.pt" for run in runs(tmp_path / "first"))
    with pytest.raises(engine.program.errors.UserError, match=r"lr was 0\.0001 and is 0\.5"):
        quantize(resnet, tmp_path / "second", *arguments, "--lr", "0.5", "--resume", str(last))
    with pytest.raises(engine.program.errors.UserError, match="no run's state"):
        quantize(resnet, tmp_path / "second", *arguments, "--resume", str(resnet))


def test_a_finished_point_is_not_run_again_unless_wanted(resnet, tmp_path, capsys):
    arguments = "--epochs 1 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split()
    quantize(resnet, tmp_path, *arguments)
    capsys.readouterr()
    quantize(resnet, tmp_path, *arguments)
    assert "finished before" in capsys.readouterr().out
    quantize(resnet, tmp_path, *arguments, "--no-resume")
    assert "finished before" not in capsys.readouterr().out


@pytest.mark.robustness
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
    with pytest.raises(engine.program.errors.UserError, match="all layers that --do-prune prunes are ternary"):
        quantize(tmp_path / "Ternary_best_acc.pt", tmp_path, "--do-prune", "--ini-c-divrs", "0.3")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_where_every_pair_diverges_that_is_an_error(bits, resnet, tmp_path, capsys):
    arguments = "--ini-c-divrs 0.3 0.5 --lambda-max-divrs 0.1 --epochs 1 --retrain-epochs 0 --lr 1e35 --lr2 1e30"
    said = refusal(quantize, resnet, tmp_path, *arguments.split(), "--bits", str(bits))
    assert "every pair diverged, see above; try a smaller --lr than 1e" in said
    said = capsys.readouterr().out
    assert said.count("best, diverged") == 1 and said.count("diverged\n") == 2


@pytest.mark.parametrize(
    ("threshold", "said"),
    [([], "accuracy, as none holds 80% with 16 bit"), (["--threshold", "1.5"], "score at 1.5% or more")],
)
def test_the_threshold_is_the_users_or_the_challenges_and_is_said(resnet, tmp_path, capsys, threshold, said):
    arguments = "--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1 --select score".split()
    quantize(resnet, tmp_path, *arguments, *threshold)
    out = capsys.readouterr().out
    assert f"Best by {said}: s 0.3, g 0.1, " in out


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
    assert model_quantization.comparison.select(results, by, 80.0)[0] == best


def test_the_threshold_must_hold_with_the_parameters_that_the_score_counts():
    results = [
        {"accuracy": 80.2, "accuracy_16_bit": 80.1, "score": 3},
        {"accuracy": 80.0, "accuracy_16_bit": 79.9, "score": 2},
    ]
    assert model_quantization.comparison.select(results, "score", 80.0)[0] == 0


QUICK = "--epochs 0 --retrain-epochs 0 --lambda-max-divrs 0.1".split()


def test_pairs_at_several_seeds_have_a_mean_and_a_deviation(resnet, tmp_path, capsys):
    arguments = "--epochs 1 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1 --lr 1e-3".split()
    quantize(resnet, tmp_path, *arguments, "--seed", "0", "1")
    out = capsys.readouterr().out
    assert "Pair 2 of 2, about " in out and ": s 0.3, g 0.1, seed 1" in out
    results = json.loads((tmp_path / "resnet_sweep.json").read_text())
    assert [result["seed"] for result in results] == [0, 1]
    first, second = (result["accuracy"] for result in results)
    mean, deviation = (first + second) / 2, abs(first - second) / 2**0.5
    assert f"{mean:.2f}% +- {deviation:.2f}" in out
    quantize(resnet, tmp_path / "alone", *arguments, "--seed", "1")
    (alone,) = runs(tmp_path / "alone")
    assert (alone / "last.pt").read_bytes() == (tmp_path / alone.name / "last.pt").read_bytes()


def test_a_later_sweep_knows_the_earlier_ones_and_says_what_it_replaces(resnet, tmp_path, capsys):
    quantize(resnet, tmp_path, *QUICK, "--ini-c-divrs", "0.3")
    assert "REPLACED" not in capsys.readouterr().out
    quantize(resnet, tmp_path, *QUICK, "--ini-c-divrs", "0.3", "0.5")
    assert "REPLACED" not in capsys.readouterr().out  # the pair is among this command's
    quantize(resnet, tmp_path, *QUICK, "--ini-c-divrs", "0.4", "--bits", "4")
    out = capsys.readouterr().out
    assert "REPLACED: " in out and "_g0.1-" in out.partition("REPLACED: ")[2]
    earlier = out.partition("Earlier pairs")[2].partition("Plots")[0].splitlines()[3:-1]
    assert [line.split()[:2] for line in earlier] == [["0.3", "0.1"], ["0.5", "0.1"]]
    assert all("bits" not in line for line in earlier)  # the others have none
    quantize(resnet, tmp_path, "--list")
    listed = capsys.readouterr().out
    assert listed.count("finished") == 3 and "s 0.4, bits [*=4]" in listed


def test_what_is_finished_is_compared_after_every_pair(resnet, tmp_path, monkeypatch):
    original, begun = model_quantization.grid.run_pair, itertools.count()

    def interrupted(learner, run):
        if next(begun):
            raise KeyboardInterrupt
        return original(learner, run)

    monkeypatch.setattr(model_quantization.grid, "run_pair", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(resnet, tmp_path, *QUICK, "--ini-c-divrs", "0.3", "0.5", drawn=True)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"Ternary_best_acc.pt", "resnet_sweep.json", "resnet_sweep.png", "resnet_layers.png"} <= files


def test_any_shard_takes_pairs_that_nobody_is_at(resnet, tmp_path, capsys):
    arguments = [*QUICK, "--ini-c-divrs", "0.3", "0.5"]
    quantize(resnet, tmp_path / "all", *arguments)
    first = next(run.name for run in runs(tmp_path / "all") if "s0.3" in run.name)
    other = start_holder(tmp_path / "any" / first / "lock")
    try:
        quantize(resnet, tmp_path / "any", *arguments, "--shard", "any")
    finally:
        other.kill()
        other.wait()
    assert "another process is working on it" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "any" / "resnet_sweep.json").read_text())) == 1
    quantize(resnet, tmp_path / "any", *arguments, "--shard", "any")
    assert len(json.loads((tmp_path / "any" / "resnet_sweep.json").read_text())) == 2


def start_holder(lock: Path) -> subprocess.Popen:
    """A process that holds a lock."""
    body = "from engine.store.files import hold; import pathlib, sys\nlock = hold(pathlib.Path(sys.argv[1]))\n"
    body += "print(1, flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", body, lock], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == b"1\n"
    return process


@pytest.mark.parametrize("bits", [2, 4])
def test_retraining_on_its_own_keeps_every_level(resnet, tmp_path, bits):
    """From any checkpoint with quantized layers: those are found, and only centroids and dense parameters learn."""
    quantize(resnet, tmp_path, *QUICK, "--ini-c-divrs", "0.3", "--bits", str(bits))
    before = read(tmp_path / "Ternary_best_acc.pt")["state_dict"]
    save({"state_dict": before}, tmp_path / "quantized.pt")
    quantize(tmp_path / "quantized.pt", tmp_path / "again", "--retrain-only", "--retrain-epochs", "2", "--lr2", "1e-2")
    after = read(tmp_path / "again" / "Ternary_best_acc.pt")
    (run,) = runs(tmp_path / "again")
    assert [json.loads(line)["phase"] for line in (run / "log.jsonl").read_text().splitlines()] == ["retrain"] * 3
    assert len(after["assignments"]) == 18
    for name, assignment in after["assignments"].items():
        for side in (before[name] > 0, before[name] < 0):
            step = before[name][side] / assignment[side]
            assert torch.allclose(step, step[:1], rtol=1e-5)
        assert torch.equal(assignment == 0, before[name] == 0)


def test_retraining_needs_quantized_layers(resnet, tmp_path):
    assert "holds no quantized layer to retrain" in refusal(quantize, resnet, tmp_path, "--retrain-only")

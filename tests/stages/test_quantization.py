"""Stage 2 on real images: results, resuming, independence, selection."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import engine
import engine.fit
import model_quantization.comparison
import model_quantization.grid
from engine.store.checkpoint import network_content, read, save
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


@pytest.mark.parametrize(
    ("amp", "capability", "used"),
    [("auto", "avx2", "off"), ("auto", "avx512_bf16", "bf16"), ("bf16", "avx2", "bf16"), ("fp16", "avx2", "fp16")],
)
def test_mixed_precision_trains_and_the_log_says_which(resnet, tmp_path, monkeypatch, amp, capability, used):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    arguments = "--epochs 1 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0".split()
    quantize(resnet, tmp_path / "off", *arguments)
    quantize(resnet, tmp_path / amp, *arguments, "--amp", amp)
    (reference,), (run,) = runs(tmp_path / "off"), runs(tmp_path / amp)
    records = [json.loads((folder / "log.jsonl").read_text().splitlines()[1]) for folder in (reference, run)]
    assert [record["amp"] for record in records] == ["off", used]
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
    with pytest.raises(engine.program.errors.UserError, match="lr was 0.0001 and is 0.5"):
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


def test_where_every_pair_diverges_that_is_an_error(resnet, tmp_path, capsys):
    arguments = "--ini-c-divrs 0.3 0.5 --lambda-max-divrs 0.1 --epochs 1 --retrain-epochs 0 --lr 1e35 --lr2 1e30"
    with pytest.raises(engine.program.errors.UserError, match="every pair diverged, see above; try a smaller --lr than 1e"):
        quantize(resnet, tmp_path, *arguments.split())
    said = capsys.readouterr().out
    assert said.count("best, diverged") == 1 and said.count("diverged\n") == 2


@pytest.mark.parametrize(("threshold", "said"), [([], "at 80% or more"), (["--threshold", "1.5"], "at 1.5% or more")])
def test_the_threshold_is_the_users_or_the_challenges_and_is_said(resnet, tmp_path, capsys, threshold, said):
    arguments = "--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1 --select score".split()
    quantize(resnet, tmp_path, *arguments, *threshold)
    out = capsys.readouterr().out
    assert f"Best by score {said}" in out and ("No network holds 80%" in out) == (not threshold)


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
    assert model_quantization.comparison.select(results, by, 80.0) == best


def test_the_threshold_must_hold_with_the_parameters_that_the_score_counts():
    results = [
        {"accuracy": 80.2, "accuracy_16_bit": 80.1, "score": 3},
        {"accuracy": 80.0, "accuracy_16_bit": 79.9, "score": 2},
    ]
    assert model_quantization.comparison.select(results, "score", 80.0) == 0

"""Stage 1 on real images: results, resuming, learning rates."""

import json

import pytest

import engine
from engine.store.checkpoint import read
from helpers.stages import FILES, assert_same_runs, interrupt_after, rates, runs, scale
from model_compound_scaling.training import learning_rate_factor


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


def test_a_loss_that_becomes_nan_stops_the_point_and_keeps_the_last_good_network(tmp_path, capsys):
    with pytest.raises(engine.program.errors.UserError, match="smaller --lr"):
        scale(tmp_path, "--grid", "0.14", "0.5", "--epochs", "2", "--lr", "1e30")
    assert "stopped: the training loss became" in capsys.readouterr().out
    assert not (tmp_path / "best_model.pt").exists()

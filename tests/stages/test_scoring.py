"""Stage 3 on real networks: what it prints, exports and compares."""

import json
import re
from pathlib import Path

import pytest
import torch

import engine
import model_scoring.export
import model_scoring.scoring
from engine.store.checkpoint import network_content, read, save
from helpers.stages import quantize, score
from model import build
from model_scoring.masks import load_layer


@pytest.mark.parametrize("coo", [False, True])
def test_exported_layers_read_back_to_the_same_weights(resnet, tmp_path, monkeypatch, coo):
    quantize(resnet, tmp_path, *"--epochs 0 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split())
    monkeypatch.setattr(model_scoring.export, "SAVED_LAYERS", str(tmp_path / "layers"))
    score(tmp_path / "Ternary_best_acc.pt", "--save", "--pt-sparse")
    state_dict = read(tmp_path / "Ternary_best_acc.pt")["state_dict"]
    files = list((tmp_path / "layers" / ["Ternary_best_acc", "Ternary_best_acc_coo"][coo]).iterdir())
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
        score(tmp_path / "Ternary_best_acc.pt", "--eval", "--layers", f"--{bits}")
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
        return self.linear(torch.i0(self.conv(x)).mean((2, 3)))
"""


def test_a_users_own_network_is_counted_and_strict_names_what_has_no_rule(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_builder.py").write_text(OWN_BUILDER)
    monkeypatch.chdir(tmp_path)
    shapes = {"conv.weight": (8, 3, 3, 3), "linear.weight": (10, 8), "linear.bias": (10,)}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, "own.pt")
    command = [tmp_path / "own.pt", "--model", "own_builder:Net", "--json", "own.json"]
    assert score(*command) == 0
    assert "i0, 1 times in the network" in capsys.readouterr().out
    report = json.loads(Path("own.json").read_text())
    assert set(report["rulers"]) == {"challenge", "improved"}
    # 30 x 30 outputs of 27 products and their sums, the mean, and the linear layer with its bias
    subtotals = report["rulers"]["challenge"]["groups"]
    mults = {group["name"]: sum(line["mults"] for line in group["lines"]) for group in subtotals}
    assert mults == {"convolutions": 27 * 8 * 900, "linear layers": 80, "poolings": 8}
    with pytest.raises(engine.program.errors.UserError, match="i0"):
        score(*command, "--strict")
    with pytest.raises(engine.program.errors.UserError, match="no form"):
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
    for file, evaluation in zip(files, ([], ["--eval"]), strict=True):
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


@pytest.mark.parametrize("bits", ["--halfprecision", "--no-halfprecision"])
def test_a_users_own_network_is_evaluated_as_it_is_packed(bits, tmp_path, monkeypatch):
    layers = "nn.Conv2d(3, n, 3), nn.BatchNorm2d(n), nn.ReLU(), nn.Flatten(), nn.Linear(36 * n, 10)"
    (tmp_path / "with_norm.py").write_text(f"from torch import nn\n\ndef net(n):\n    return nn.Sequential({layers})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import with_norm

    network = with_norm.net(8)
    network(torch.randn(64, 3, 8, 8))  # running statistics that are no 16-bit numbers
    torch.save(network.state_dict(), "own.pt")
    own = "--model with_norm:net --model-args n=8 --dataset digits --image-size 8".split()
    score("own.pt", *own, bits, "--eval", "--pack", "own.safetensors", "--json", "1.json")
    score("own.safetensors", *own, bits, "--eval", "--unpack", "again.pt", "--json", "2.json")
    score("again.pt", *own, "--no-halfprecision", "--eval", "--json", "3.json")
    one, two, three = (json.loads(Path(f"{i}.json").read_text())["evaluation"] for i in (1, 2, 3))
    assert one == two == three  # the loss to its last bit
    with pytest.raises(engine.program.errors.UserError, match="does not fit what with_norm:net builds"):
        score("own.safetensors", *[argument.replace("n=8", "n=9") for argument in own])
    monkeypatch.setattr("model.own._built", set())  # as a new process knows none
    with pytest.raises(engine.program.errors.UserError, match=r"that with_norm:net builds, .* pass --model with_norm"):
        score("own.safetensors")


def test_what_can_not_be_compared_or_written_is_said_before_the_evaluation(resnet, tmp_path, monkeypatch):
    monkeypatch.setattr(model_scoring.scoring, "evaluate_network", None)
    for arguments, said in (
        (["--before", "nowhere.pt"], "no file 'nowhere.pt'"),
        (["--json", str(tmp_path)], "is a folder; pass the name of a file"),
    ):
        with pytest.raises(engine.program.errors.UserError, match=said):
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


def test_a_baseline_of_ones_own(resnet, capsys):
    score(resnet, "--baseline", "1e6,4.2e7", "--no-halfprecision", "--mul-bits", "32", "--add-bits", "32")
    out = capsys.readouterr().out
    assert "Baseline   yours: 1.00M params, 42.00M operations\n" in out and "Threshold" not in out
    params, operations, score_of_both = (
        float(text)
        for text in re.findall(r"challenge .* ([\d,]+) +[\d.]+ +([\d.]+) +([\d.]+)\n", out)[0][:3]
        for text in [text.replace(",", "")]
    )
    assert score_of_both == pytest.approx(params / 1e6 + operations / 42, rel=1e-3)
    parts = re.findall(r"Score +([\d.]+) of its parameters \+ ([\d.]+) of its operations on challenge", out)
    assert [float(part) for part in parts[0]] == pytest.approx([params / 1e6, operations / 42], rel=1e-3)
    with pytest.raises(SystemExit):
        score(resnet, "--baseline", "1e6")
    assert "'1e6' is neither CIFAR-100 nor ImageNet nor two numbers above 0" in capsys.readouterr().err

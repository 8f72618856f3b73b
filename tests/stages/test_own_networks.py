"""Any network through all three stages: which layers are chosen, what a checkpoint says, teachers, held-out images."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.images.augment import Mixed
from engine.objective import Objective
from engine.store.checkpoint import read
from helpers.programs import run_here
from helpers.stages import no_pictures
from model.own import OwnCodeError, run_once
from model.selection import NoSuchLayer, Patterns, chosen, is_ternary, ternary_candidates

MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.head = nn.Linear(width, classes)  # registered first, runs last
        self.stem = nn.Conv2d(3, width, 3)
        self.wise = nn.Conv2d(width, width, 3, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 1)
        self.unused = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.head(self.inner(self.norm(self.wise(self.stem(x)))).mean((2, 3)))

def net(width=4, classes=10):
    return Net(width, classes)

def pair(num_classes=10):
    class Two(nn.Module):
        def forward(self, x):
            return x, x
    return Two()

def lazy(num_classes=10):
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConv2d(6, 3), nn.Flatten(), nn.LazyLinear(num_classes))
"""
DIGITS = "--dataset digits --image-size 8 --batch-size 479 --no-cuda --amp off"
ONE_PAIR = "--epochs 1 --retrain-epochs 1 --ini-c-divrs 0.3 --lambda-max-divrs 0.1 --lr 1e-3"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds `mine.py`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("model.own._built", set())  # as a new process knows none
    for name in [name for name in sys.modules if name.startswith("own_mine")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


@pytest.fixture
def shell(here, monkeypatch, capfd):
    """Runs a command line; returns its exit code and what it printed."""

    def run(command: str) -> tuple[int | str | None, str]:
        with no_pictures():
            code = run_here(command, monkeypatch)
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


def test_a_network_of_a_file_through_all_stages(shell, here, monkeypatch):
    network = "--model mine.py:net"
    code, said = shell(f"run_compound_scaling.py {network} --model-args width=6 {DIGITS} --epochs 2 --save-dir one")
    assert code == 0 and "Best: mine.py:net with " in said
    assert read(here / "one" / "best_model.pt")["model"]["arguments"] == {"width": 6}

    two = f"run_quantization.py --model-dict one/best_model.pt {DIGITS} {ONE_PAIR} --save-dir two"
    monkeypatch.setattr("model.own._built", set())
    code, said = shell(two)
    assert code == 2 and said.endswith("pass --model mine.py:net --model-args width=6\n")
    code, said = shell(f"{two} {network}")
    assert code == 0
    assert "Quantized: 1 layers with 36 of 394 parameters (9.1%)" in said  # neither first, last, depthwise nor unused
    content = read(here / "two" / "Ternary_best_acc.pt")
    assert list(content["assignments"]) == ["inner.weight"] and is_ternary(content["state_dict"]["inner.weight"])

    three = f"run_scoring.py {network} --t-model two/Ternary_best_acc.pt --dataset digits --no-cuda --json s.json"
    code, said = shell(f"{three} --eval --image-size 8")
    assert code == 0
    accuracy = json.loads((here / "s.json").read_text())["evaluation"]["accuracy"]
    (log,) = (here / "two").glob("*/result.json")
    assert accuracy == json.loads(log.read_text())["accuracy_16_bit"]


def test_torchvisions_networks_need_no_flag_later(shell, here):
    network = "--model torchvision.models:squeezenet1_1 --model-args num_classes=10"
    size = DIGITS.replace("--image-size 8", "--image-size 32").replace("479", "700")
    code, _ = shell(f"run_quantization.py {network} {size} {ONE_PAIR} --epochs 0 --retrain-epochs 0 --save-dir two")
    assert code == 0
    content = read(here / "two" / "Ternary_best_acc.pt")
    assert content["model"] == {
        "name": "torchvision.models:squeezenet1_1",
        "arguments": {"num_classes": 10},
        "num_classes": 10,
    }
    assert shell("run_scoring.py --t-model two/Ternary_best_acc.pt --no-cuda")[0] == 0


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            "--model mine.py:net --layers inner nothing.*",
            "no layer's name matches 'nothing.*' (there are head.weight, ",
        ),
        ("--model mine.py:net --except inner", "no layer is left to quantize; pass --layers PATTERN"),
        ("--model mine.py:pair", "the network returns tuple, not logits [N, classes]"),
        ("--model mine.py:net --model-args classes=7", "mine.py:net takes no num_classes, and builds 7 where digits"),
        ("--model mine.py:net --model-args width=0", "mine.py:net"),
        ("--model torchvision.models:alexnet", "does not run on an image of 8 px"),
        ("--model mine.py:net --teacher none.pt", "no file 'none.pt'"),
        ("--model resnet21", "unknown model 'resnet21' (choose from "),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(flags, said, shell):
    code, text = shell(f"run_quantization.py {flags} {DIGITS} {ONE_PAIR} --save-dir two")
    assert code == 2 and said in text.splitlines()[-1]


def test_a_dry_run_lists_the_layers_and_trains_nothing(shell, here):
    command = f"run_quantization.py --model mine.py:net {DIGITS} {ONE_PAIR} --save-dir two --dry-run"
    code, said = shell(f"{command} --layers * --except head")
    assert code == 0 and not (here / "two").exists()
    listed = [line.split()[:3] for line in said.splitlines() if ".weight" in line]
    assert listed == [
        ["stem.weight", "4x3x3x3", "108"],
        ["wise.weight", "4x1x3x3", "36"],
        ["inner.weight", "4x4x1x1", "16"],
        ["unused.weight", "4x4x1x1", "16"],
    ]
    assert "\n250 parameters, 9.52K FLOP an image of 8 px\nAn epoch of 3 steps will take about " in said


def test_lazy_modules_learn_their_sizes_from_an_image(shell, here):
    code, said = shell(f"run_quantization.py --model mine.py:lazy {DIGITS} {ONE_PAIR} --save-dir two")
    assert code == 0 and "Quantized: 1 layers with 216 of " in said
    code, said = shell(
        "run_scoring.py --model mine.py:lazy --t-model two/Ternary_best_acc.pt --dataset digits --no-cuda --eval"
    )
    assert code == 0 and "Accuracy " in said


# ------------------------------------------------------------------------------------- layers by type


def candidates(network: nn.Module, size: int = 32) -> list[str]:
    return ternary_candidates(network, "mine:net", run_once(network, size).layers)


def test_layers_of_torchvisions_networks():
    from torchvision import models

    names = candidates(models.densenet121(num_classes=5))
    assert len(names) == 119 and "features.conv0.weight" not in names and "classifier.weight" not in names
    assert candidates(models.vgg11(num_classes=5))[0] == "features.3.weight"
    names = candidates(models.mobilenet_v2(num_classes=5))
    assert len(names) == 34 and "features.18.0.weight" in names and "features.1.conv.0.0.weight" not in names


def test_attention_is_made_of_linear_layers():
    network = nn.Sequential(
        nn.Flatten(2),
        nn.Linear(16, 8),
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    inner = "self_attn.in_proj_weight self_attn.out_proj.weight linear1.weight linear2.weight".split()
    assert candidates(network, 4) == [f"2.{name}" for name in inner]


def test_patterns_name_weights_or_modules():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    assert chosen(network, [], Patterns(("0", "2.w*"))) == {"0.weight": 2, "2.weight": 2}
    assert chosen(network, ["0.weight", "2.weight"], Patterns((), ("0",))) == {"2.weight": 2}
    bits = (("*", 4), ("2", 8))
    assert chosen(network, ["0.weight", "2.weight"], Patterns(bits=bits)) == {"0.weight": 4, "2.weight": 8}
    with pytest.raises(NoSuchLayer, match=r"no chosen layer's name matches '1' \(there are 2.weight\)"):
        chosen(network, ["2.weight"], Patterns(bits=(("1", 4),)))
    with pytest.raises(NoSuchLayer, match=r"'1' \(there are 0.weight, 2.weight\)"):
        chosen(network, [], Patterns(("1",)))


def test_a_network_is_what_it_was_after_a_run():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 5))
    state = torch.get_rng_state()
    assert run_once(network, 4).classes == 5
    assert not network[2]._forward_pre_hooks and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(OwnCodeError, match="does not run on an image of 5 px"):
        run_once(network, 5)


# ------------------------------------------------------------------------------------- teachers and held-out images


def epochs(folder: Path) -> list[dict]:
    (log,) = folder.glob("*/log.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_teacher_of_weight_1_needs_no_labels(shell, here):
    """Before the first step the network's own distance to itself is that of its quantization alone."""
    command = f"run_quantization.py --model mine.py:net {DIGITS} --epochs 1 --retrain-epochs 0 --ini-c-divrs 0.3"
    command += " --lambda-max-divrs 0 --lr 1e-30 --lr2 1e-30"
    losses = []
    for i, flags in enumerate(
        ("--teacher self", "--teacher self --teacher-weight 0.25", "", "--teacher self --temperature 2")
    ):
        assert shell(f"{command} {flags} --save-dir q{i}")[0] == 0
        losses.append(epochs(here / f"q{i}")[-1]["train_loss"])
    distance, mixed, labels, _ = losses
    assert 0 < distance < labels / 2 and mixed == pytest.approx(0.25 * distance + 0.75 * labels, rel=1e-5)
    assert losses[3] != distance


def test_a_mixed_image_counts_for_both_its_labels():
    logits, labels, others = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 0])
    batch = Mixed(torch.zeros(4, 3, 8, 8), labels, others, torch.tensor(0.25))
    loss = Objective().loss(logits, batch)
    wanted = 0.75 * nn.functional.one_hot(labels, 3) + 0.25 * nn.functional.one_hot(others, 3)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, wanted))
    half = Objective(lambda images: logits, weight=0.5)  # a teacher that agrees
    torch.testing.assert_close(half.loss(logits, batch), loss / 2)


def test_cutmix_is_a_flag_of_both_trainings(shell, here):
    for stage, program in enumerate(("run_compound_scaling.py --epochs 1", f"run_quantization.py {ONE_PAIR}")):
        losses = []
        for probability in (0, 1):
            folder = f"{stage}{probability}"
            command = f"{program} --model mine.py:net {DIGITS} --cutmix {probability} --save-dir {folder}"
            assert shell(command)[0] == 0
            losses.append([epoch["train_loss"] for epoch in epochs(here / folder)])
        assert losses[0] != losses[1]


def test_frozen_batch_norm_keeps_its_statistics(shell, here):
    for flags, frozen in (("--freeze-batch-norm", True), ("", False)):
        folder = f"q{frozen}"
        command = f"run_quantization.py --model mine.py:net {DIGITS} {ONE_PAIR} --save-dir {folder} {flags}"
        assert shell(command)[0] == 0
        mean = read(here / folder / "Ternary_best_acc.pt")["state_dict"]["norm.running_mean"]
        assert bool((mean == 0).all()) == frozen


def test_held_out_images_are_for_choosing(shell, here):
    command = f"--model mine.py:net {DIGITS} --holdout 0.2 --save-dir"
    code, said = shell(f"run_compound_scaling.py {command} one --epochs 2")
    assert code == 0 and "1,150 training images and 287 held-out images of 8 px, and 360 test images" in said
    assert "% of 360 test images, on which nothing was chosen" in said
    code, said = shell(f"run_quantization.py --model-dict one/best_model.pt {ONE_PAIR} {command} two")
    assert code == 0 and "% of 360 test images, on which nothing was chosen" in said

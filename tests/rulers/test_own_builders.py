"""`run_scoring.py` on networks of the user's own: where they are found, what they are run on, what is said of them."""

import json
import sys
from pathlib import Path

import pytest

from engine.program.errors import UserError
from model.own import OwnCodeError
from model_scoring.arguments import parser
from model_scoring.scoring import run

MODEL = """
from torch import nn

def net(num_classes=7, act="GELU"):
    return nn.Sequential(nn.Conv2d(1, 4, 3), getattr(nn, act)(), nn.Flatten(), nn.LazyLinear(num_classes))
"""
MINE = """
import torch
from torch import nn
from blocks import Conv

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Conv(3, 4, 3)

    def forward(self, x, y):
        return {"features": self.conv(x), "other": [torch.i0(torch.i0(y)), self.conv(x).mul(2)]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine.py").write_text(MINE)
    (tmp_path / "nets" / "blocks.py").write_text("from torch import nn\nConv = nn.Conv2d\n")
    return tmp_path


def score(*arguments: str) -> dict:
    """The `challenge` ruler's part of the report."""
    assert run(parser().parse_args(["--no-cuda", "--json", "out.json", *arguments])) == 0
    return json.loads(Path("out.json").read_text())["rulers"]["challenge"]


def test_the_users_model_py_goes_before_our_package(folder, capsys):
    tally = score(*["--model", "model:net", "--input-shape", "1x9x7", "--model-args", "num_classes=5", "act=ReLU"])
    assert tally["params"] == 40 + 4 * 7 * 5 * 5 + 5 and not tally["incomplete"]
    assert "(CIFAR100 with 5 classes is no task" in capsys.readouterr().out


def test_a_file_with_several_inputs_and_operations_without_a_rule(folder, capsys):
    arguments = ["--model", "nets/mine.py:Mine", "--input-shape", "3x8x8", "--input-shape", "5:float32"]
    tally = score(*arguments)
    assert tally["incomplete"] and {group["name"] for group in tally["groups"]} == {"convolutions", "products"}
    said = capsys.readouterr().out
    assert "operations of one input of 3x8x8, 5" in said and "Uncounted  i0, 2 times in the network" in said
    assert said.count("(incomplete)") == 2
    with pytest.raises(UserError, match=r"without a rule .i0."):
        score(*arguments, "--strict")


def test_torchvision_as_it_is_built(folder, capsys):
    tally = score(*["--model", "torchvision.models:resnet18", "--image-size", "64"])
    assert tally["params"] == 11_689_512 and tally["uncounted"] == []
    assert "By analogy max_pool2d_with_indices: 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "no file 'best_ternary_cifar_micronet.pt'"),
        ("--model resnet20", "no file 'best_ternary_cifar_micronet.pt'"),
        ("--model nets/no.py:net", "FileNotFoundError: no file nets/no.py; it must name a function"),
        ("--model model:nothing", "no attribute 'nothing'"),
        ("--model model:net --model-args classes=3", "unexpected keyword argument 'classes'.*takes these arguments"),
        ("--model model:net", "does not run on an image of 32 px .*channels.*pass --image-size or --input-shape"),
        ("--model model:net --input-shape 1x1x1", "does not run on 1x1x1"),
        ("--model model:net --input-shape 1x9x9 --eval", "--eval is for images"),
        ("--t-model x.pt --model resnet20 --model-args a=1", "are for a builder of your own"),
    ],
)
def test_what_is_wrong_is_said(folder, arguments, said):
    with pytest.raises((UserError, OwnCodeError), match=said):
        score(*arguments.split())

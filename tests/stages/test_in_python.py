"""Compression in a training loop of one's own, without the three programs."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import rulers
from engine.program.errors import UserError
from model import build
from model.selection import NoSuchLayer, is_ternary
from model_quantization import EC2T
from model_scoring import pack, unpack

README = Path(__file__).parents[2] / "README.md"


class Small(nn.Module):
    """Three convolutions, of which the middle one runs twice, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.inner(F.relu(self.inner(x))))
        return self.head(self.last(x).mean((2, 3)))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 3, 8, 8), torch.arange(16) % 4


def train(runner: nn.Module, optimizer, steps: int) -> float:
    images, labels = batch()
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(runner(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


def quantized(**options) -> tuple[nn.Module, EC2T]:
    torch.manual_seed(0)
    network = Small()
    return network, EC2T(network, **options)


def test_layers_are_chosen_by_type_and_learn():
    network, quantizer = quantized(s=0.3, g=0.1)
    assert quantizer.names == ["inner.weight", "last.weight"]
    first = train(network, quantizer.optimizer(lr=1e-2), 1)
    assert train(network, quantizer.optimizer(lr=1e-2), 30) < 0.7 * first
    assert is_ternary(network.inner.weight) and is_ternary(network.last.weight)
    assert not is_ternary(network.stem.weight)
    assert 0 < quantizer.entropy() < 1.585


def test_g_may_differ_between_layers():
    network, _ = quantized(s=0.3, g={"*": 0.05, "last": 0.4})
    even, _ = quantized(s=0.3, g=0.05)
    uneven, alone = ((n.last.weight == 0).sum() for n in (network, even))
    assert torch.equal(network.inner.weight, even.inner.weight) and uneven > alone
    with pytest.raises(NoSuchLayer):
        quantized(g={"nowhere": 0.1})


def test_frozen_layers_keep_their_levels():
    network, quantizer = quantized(bits={"*": 2, "last": 4})
    train(network, quantizer.optimizer(lr=1e-2), 5)
    levels, centroids = quantizer.assignment.clone(), quantizer.centroids.detach().clone()
    quantizer.freeze()
    train(network, quantizer.optimizer(lr=1e-2, lr2=1e-3), 5)
    assert torch.equal(quantizer.assignment, levels)
    assert not torch.equal(quantizer.centroids, centroids)
    assert len(network.last.weight.unique()) <= 15


@pytest.mark.parametrize("wrapper", ["compiled", "distributed"])
def test_wrapped_networks_train_as_plain_ones(wrapper, tmp_path):
    network, quantizer = quantized(s=0.3)
    plain = train(network, quantizer.optimizer(lr=1e-3), 3)
    other, quantizer = quantized(s=0.3)
    if wrapper == "compiled":
        assert train(torch.compile(other, backend="eager"), quantizer.optimizer(lr=1e-3), 3) == plain
        return
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        assert train(DistributedDataParallel(other), quantizer.optimizer(lr=1e-3), 3) == plain
    finally:
        distributed.destroy_process_group()


def test_parameters_that_require_no_gradient_stay():
    torch.manual_seed(0)
    network = Small()
    network.stem.requires_grad_(False)
    before = copy.deepcopy(network.stem.state_dict())
    train(network, EC2T(network, s=0.3).optimizer(lr=1e-2), 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.stem.state_dict().items())


def test_schedulers_take_the_optimizers_adam():
    network, quantizer = quantized(s=0.3)
    optimizer = quantizer.optimizer(lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.adam, T_max=2)
    for _ in range(2):
        train(network, optimizer, 1)
        scheduler.step()
    assert optimizer.lr == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"layers": ["nothing"]}, NoSuchLayer),
        ({"without": ["*"]}, ValueError),
        ({"bits": 9}, ValueError),
        ({"bits": {"inner": 1}}, ValueError),
        ({"s": 1.5}, ValueError),
        ({"s": "best"}, ValueError),
        ({"g": 1.0}, ValueError),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(options, error):
    torch.manual_seed(0)
    network = Small()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(error):
        EC2T(network, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_packed_and_unpacked_into_another_network(tmp_path):
    network, quantizer = quantized(s=0.3, bits=3)
    train(network, quantizer.optimizer(lr=1e-2), 5)
    report = pack(network, tmp_path / "small.safetensors")
    assert report.file_bytes == (tmp_path / "small.safetensors").stat().st_size
    again = unpack(tmp_path / "small.safetensors", Small()).eval()
    assert torch.equal(again.inner.weight, network.inner.weight)
    images, _ = batch()
    assert torch.allclose(again(images), network.eval()(images), atol=1e-2)
    with pytest.raises(UserError, match=r"holds another network: head\.weight is 4x16 where"):
        other = Small()
        other.head = nn.Linear(16, 5)
        unpack(tmp_path / "small.safetensors", other)
    with pytest.raises(UserError, match="Small built; pass one"):
        unpack(tmp_path / "small.safetensors")


def test_a_packed_built_in_network_needs_no_other(tmp_path):
    network = build({"name": "resnet20", "num_classes": 10})
    pack(network, tmp_path / "r.safetensors", half_precision=False)
    again = unpack(tmp_path / "r.safetensors", build({"name": "resnet20", "num_classes": 10}))
    assert torch.equal(again.linear.weight, network.linear.weight)


@pytest.mark.robustness
def test_the_lines_in_readme_run(tmp_path, monkeypatch):
    """With a small network, one batch, and as README has them otherwise."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"batches": [batch()] * 2, "image": batch()[0][:1]}
    exec(code, names)
    assert (tmp_path / "resnet18.safetensors").is_file()
    assert names["tally"].uncounted == []
    assert rulers.count(names["network"], 64)["challenge"].total_scoring_params == names["tally"].total_scoring_params


def test_the_example_runs(tmp_path):
    """A whole program: trained, ternary, counted, packed, predicting; with its pictures."""
    run = subprocess.run(
        [sys.executable, README.parent / "examples" / "own_network.py", "--epochs", "1", "--folder", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(README.parent)},
    )
    assert run.returncode == 0, run.stderr
    assert "the packed file is right on the same" in run.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"digits.safetensors", "training.png", "weights.png"}


def test_a_scaler_of_gradients_changes_nothing_and_skips_what_overflows():
    plain, quantizer = quantized(s=0.3)
    train(plain, quantizer.optimizer(lr=1e-2), 3)
    other, quantizer = quantized(s=0.3)
    optimizer, scaler = quantizer.optimizer(lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    images, labels = batch()
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(other(images), labels)).backward()
        if step == 1:
            other.head.bias.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    for name in ("inner.weight", "last.weight", "head.weight"):
        assert torch.allclose(other.get_parameter(name), plain.get_parameter(name), atol=1e-6)

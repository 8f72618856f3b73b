"""`--merge-batch-norm`: the same answers from two numbers a channel."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model import build
from model_scoring.arguments import parser
from model_scoring.batch_norm import merge_batch_norm
from model_scoring.packing import read_packed
from model_scoring.scoring import run


def trained(network: nn.Module, seed: int) -> nn.Module:
    """The network with numbers of a training in its BatchNorms."""
    torch.manual_seed(seed)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.01, 3)
            if norm.affine:
                nn.init.normal_(norm.weight, 1, 0.3)
                nn.init.normal_(norm.bias)
    return network.eval()


@given(st.integers(0, 1000), st.sampled_from([1e-5, 1e-3, 0.1]))
def test_answers_stay_and_merging_twice_changes_nothing_more(seed, eps):
    network = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps), nn.BatchNorm2d(8, eps)), seed)
    images, merged = torch.randn(4, 3, 8, 8), copy.deepcopy(network)
    merge_batch_norm(merged)
    torch.testing.assert_close(merged(images), network(images), rtol=1e-4, atol=1e-4)
    assert all((n.running_mean == 0).all() and (n.running_var == 1).all() for n in merged[1:])
    again = copy.deepcopy(merged)
    merge_batch_norm(again)
    torch.testing.assert_close(again.state_dict(), merged.state_dict())


def test_layers_without_statistics_or_factors_stay():
    kinds = nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4)
    network = trained(nn.Sequential(*kinds), 0)
    before = copy.deepcopy(network.state_dict())
    merge_batch_norm(network)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_the_packed_file_is_smaller_and_scores_the_same(tmp_path, capsys):
    spec = {"name": "resnet20", "num_classes": 10}
    path, sizes, said = tmp_path / "resnet20.pt", [], []
    torch.save(trained(build(spec), 0).state_dict(), path)
    for flags in ([], ["--merge-batch-norm"]):
        packed = tmp_path / f"{len(flags)}.safetensors"
        assert run(parser().parse_args(["--t-model", str(path), "--pack", str(packed), *flags])) == 0
        sizes.append(packed.stat().st_size)
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("improved")])
    channels = 688  # of ResNet-20's 19 layers
    assert sizes[0] - sizes[1] > 0.8 * 4 * channels and said[0] == said[1]
    answers = [read_packed(tmp_path / f"{i}.safetensors").network().eval()(torch.ones(1, 3, 32, 32)) for i in range(2)]
    torch.testing.assert_close(*answers, rtol=2e-2, atol=2e-2)

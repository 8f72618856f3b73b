"""Networks that come pruned: masks beside weights, zeros that stay, KAIST AI's files; and activations of few bits."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.utils import prune

from engine.store.checkpoint import network_content, read, read_network, save
from examples import kaist_micronet
from helpers import ROOT
from helpers.stages import quantize, runs, score
from model import build

SPEC = {"name": "resnet20", "num_classes": 10}
QUICK = "--epochs 1 --retrain-epochs 0 --ini-c-divrs 0.3 --lambda-max-divrs 0.05 --lr 1e-2".split()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A ResNet-20 with half of each convolution's weights zero."""
    torch.manual_seed(0)
    network = build(SPEC)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter *= torch.rand_like(parameter) < 0.5
    path = tmp_path_factory.mktemp("pruned") / "pruned.pt"
    save(network_content(SPEC, network, dataset="digits", image_size=8), path)
    return path


@pytest.mark.parametrize("flags", [["--bits", "4"], ["--do-prune"]])
def test_zeros_stay_with_keep_zeros_and_come_back_without(pruned, tmp_path, flags):
    zero = read(pruned)["state_dict"]["layer2.0.conv2.weight"] == 0
    alive = {}
    for keep in ([], ["--keep-zeros"]):
        quantize(pruned, tmp_path / str(len(keep)), *QUICK, *flags, *keep)
        (run,) = runs(tmp_path / str(len(keep)))
        weight = read(run / "last.pt")["state"]["network"]["layer2.0.conv2.weight"]
        alive[bool(keep)] = int((weight[zero] != 0).sum())
        assert (weight[~zero] != 0).any()
    assert alive[True] == 0
    assert alive[False] > 0 or "--do-prune" in flags


def test_masks_of_torch_are_multiplied_in(tmp_path, capsys):
    network = build(SPEC)
    for module in (network.layer1[0].conv1, network.layer3[2].conv2):
        prune.random_unstructured(module, "weight", 0.7)
    torch.save(network.state_dict(), tmp_path / "masked.pt")
    assert "layer1.0.conv1.weight_mask" in torch.load(tmp_path / "masked.pt")
    tensors = read_network(tmp_path / "masked.pt", SPEC).state_dict
    assert torch.equal(tensors["layer1.0.conv1.weight"], network.layer1[0].conv1.weight)
    assert "weights multiplied by the masks beside them" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_example_reads_files_as_kaist_published_them(version, tmp_path):
    """Each weight of theirs has a mask of its module beside it, under `net`."""
    torch.manual_seed(0)
    network = getattr(kaist_micronet, version)()
    state, expected = {}, {}
    for name, tensor in network.state_dict().items():
        state[name] = expected[name] = tensor
        if tensor.ndim > 1:
            mask = (torch.rand_like(tensor) < 0.5).float()
            state[name.replace("weight", "mask")], expected[name] = mask, tensor * mask
    torch.save({"net": state, "acc": 80.0}, tmp_path / "kaist.t7")
    spec = {"name": f"{ROOT / 'examples' / 'kaist_micronet.py'}:{version}"}
    found = read_network(tmp_path / "kaist.t7", spec)
    assert found.state_dict.keys() == expected.keys()
    assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in expected.items())


def test_activations_of_few_bits_are_counted_and_evaluated(resnet, tmp_path, capsys):
    quantize(resnet, tmp_path, *QUICK)
    checkpoint, reports = tmp_path / "Ternary_best_acc.pt", {}
    for bits in ("16", "8", "2"):
        score(checkpoint, "--eval", "--act-bits", bits, "--json", str(tmp_path / f"{bits}.json"))
        reports[bits] = json.loads((tmp_path / f"{bits}.json").read_text())
    scores = [reports[bits]["rulers"]["challenge"]["score"] for bits in reports]
    losses = [reports[bits]["evaluation"]["loss"] for bits in reports]
    assert scores[0] > scores[1] > scores[2]
    assert abs(losses[1] - losses[0]) < abs(losses[2] - losses[0])
    assert "activations to 2" in capsys.readouterr().out


def test_the_ranges_of_activations_are_of_images_of_all_classes(resnet, make_folders, tmp_path):
    """The first batch is all of the first class, of which each image is black."""
    path = make_folders(classes=tuple("abcdefghij"), number=4)
    for file in path.rglob("a/*.png"):
        Image.new("RGB", (8, 8)).save(file)
    flags = ["--dataset", "folder", "--data-path", str(path), "--val-batch-size", "4", "--eval"]
    losses = []
    for width in ([], ["--act-bits", "12"]):
        score(resnet, *flags, *width, "--json", str(tmp_path / "score.json"))
        losses.append(json.loads((tmp_path / "score.json").read_text())["evaluation"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)

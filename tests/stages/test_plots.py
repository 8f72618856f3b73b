"""What the plots of stage 2 show, and that they are pictures."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from helpers.stages import quantize, runs
from model_quantization.drawing import label_points
from model_quantization.plots import kept_and_deleted, pareto_front, plot_layers, plot_sweep
from model_quantization.quantized_layers import QuantizedLayers
from model_quantization.ternarization_plot import observed_thresholds, trained_weights

RESULTS = [
    {"s": 0.3, "g": g, "accuracy": accuracy, "zeros": zeros, "phase": "retrain", "epoch": 1}
    | {"accuracy_16_bit": accuracy - 0.1, "score": 0.1 / zeros, "ruler": "challenge"}
    for g, accuracy, zeros in ((0.1, 81.0, 60.0), (0.2, 79.0, 70.0), (0.3, 79.5, 75.0), (0.4, 70.0, 90.0))
]


def test_the_front_leaves_out_what_another_point_beats_in_both():
    zeros, accuracy = (np.array([result[key] for result in RESULTS]) for key in ("zeros", "accuracy"))
    assert pareto_front(zeros, accuracy) == [3, 2, 0]


def test_a_weight_is_deleted_with_its_channel_or_within_its_kernel():
    assignment = torch.ones(4, 5, 3, 3, dtype=torch.int8)
    assignment[0] = 0  # an output channel: 45 of 180 weights
    assignment[:, 1] = 0  # an input channel: 9 more in each of the three others
    assignment[2, 2, 0] = 0  # three weights of a kernel that lives
    assert kept_and_deleted(assignment) == pytest.approx([105 / 180, 3 / 180, 72 / 180])
    assert kept_and_deleted(torch.tensor([[1, 0], [0, -1]])) == pytest.approx([0.5, 0.5, 0])


def test_of_equally_accurate_points_the_one_with_most_zeros_is_on_the_front():
    assert pareto_front(np.array([70.0, 75.0, 72.0, 75.0]), np.array([96.0, 96.0, 96.0, 95.0])) == [1]


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("lines", [{}, {"to hold": 80.0, "full precision": 83.0}])
def test_plots_are_pictures(lines, number, tmp_path):
    layers = {f"{i}.weight": torch.randint(-1, 2, (4, 5, 3, 3)) for i in range(6)}
    pictures = [
        plot_sweep(RESULTS[:number], 0, lines, "net, CIFAR100", tmp_path / "sweep.png"),
        plot_layers(layers, RESULTS[0], "net, CIFAR100", tmp_path / "layers.png"),
    ]
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(2**20)) > 10
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_what_a_run_did_is_a_picture(resnet, tmp_path):
    flags = "--epochs 1 --retrain-epochs 1 --s 0.3 --g 0.1 --plot-ternarization".split()
    quantize(resnet, tmp_path, *flags)
    (run,) = runs(tmp_path)
    with Image.open(run / "ternarization.png") as picture:
        assert min(picture.size) > 1000 and len(picture.convert("RGB").getcolors(2**20)) > 10
    assert (run / "ternarization.pdf").read_bytes().startswith(b"%PDF")


def test_labels_of_near_points_do_not_cover_each_other():
    axes = Figure().subplots()
    points = [(0.5, 0.5), (0.51, 0.5), (0.5, 0.51), (0.99, 0.99)]
    axes.plot(*zip(*points, strict=True), "o")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_points(axes, points, [f"0.45, 0.{i}" for i in range(4)])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


@pytest.mark.parametrize("bits", [2, 3])
def test_thresholds_are_where_the_assignment_changes(bits):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 50, 3), torch.nn.Conv2d(50, 7, 3))
    before = [network[i].weight.detach().flatten().clone() for i in (0, 1)]
    layers = QuantizedLayers(network, {"0.weight": bits, "1.weight": bits}, 0.9, 0.1)
    content = {"layers": layers.state_dict(), **layers.by_layer()}
    for (weights, assignment), original in zip(trained_weights(content), before, strict=True):
        assert torch.equal(weights, original)
        edges = torch.tensor(observed_thresholds(weights, assignment))
        levels, rank = assignment.unique(return_inverse=True)
        assert len(levels) == len(edges) + 1 > 2 and (bits == 2 or len(levels) > 3)
        assert torch.equal(torch.bucketize(weights, edges), rank)

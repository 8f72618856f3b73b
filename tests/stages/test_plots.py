"""What the plots of stage 2 show, and that they are pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from model_quantization.plots import kept_and_deleted, pareto_front, plot_layers, plot_sweep

RESULTS = [
    {"s": 0.3, "g": g, "accuracy": accuracy, "zeros": zeros, "phase": "retrain", "epoch": 1}
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


@pytest.mark.parametrize("threshold", [None, 80.0])
def test_plots_are_pictures(threshold, tmp_path):
    layers = {f"{i}.weight": torch.randint(-1, 2, (4, 5, 3, 3)) for i in range(6)}
    pictures = [
        plot_sweep(RESULTS, 0, threshold, "net, CIFAR100", tmp_path / "sweep.png"),
        plot_layers(layers, RESULTS[0], "net, CIFAR100", tmp_path / "layers.png"),
    ]
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(2**20)) > 10

#!/usr/bin/env python3
"""What EC2T adds to a training step: ours against a literal implementation, side by side in one run.

    python benchmarks/ec2t_step.py [--networks micronet efficientnet-b1] [--bits 2 4 8] [--rounds 5] [--compile]

Measured, on the CPU and on a GPU where there is one, each as the median over alternating rounds:

    plain          a training step with Adam over all weights
    EC2T           a training step with EC2T as this project does it; less `plain`, what the quantizer costs
    literal        the same with the formulas as they are printed: for each layer three distance tensors, an argmin,
                   a dense quantized copy; one Adam a parameter group; ternary whatever --bits says
    fused Adam     torch.optim.Adam(fused=True) over the ternarized weights alone: the yardstick
    quantizer      scaling gradients, Adam on the centroids, assigning, timed without the rest of the step
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.program.report import table
from model import build
from model.selection import ternary_candidates
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import QuantizedLayers

S, G = 0.45, 0.15
NETWORKS = {
    "micronet": ({"name": "cifar_micronet", "depth": 1.4**3.5, "width": 1.2**3.5}, 32),
    "efficientnet-b1": ({"name": "efficientnet-b1"}, 224),
    "resnet20": ({"name": "resnet20"}, 32),
}


class LiteralEC2T:
    """EC2T as printed, a layer at a time, with a host read-back wherever the text compares two numbers."""

    def __init__(self, network: nn.Module, names: list[str]):
        self.q = [p for name, p in network.named_parameters() if name in names]
        others = [p for name, p in network.named_parameters() if name not in names]
        self.w = [q.detach().clone() for q in self.q]
        self.centroids = [[S * w.max().abs(), S * w.min().abs()] for w in self.w]
        self.assignment = [torch.zeros_like(w) for w in self.w]
        self.largest = max(w.numel() for w in self.w)
        flat = [c for pair in self.centroids for c in pair]
        self.adams = [torch.optim.Adam(group, lr=lr) for group, lr in ((self.w, 1e-4), (flat, 1e-5), (others, 1e-4))]
        self.assign()

    def zero_grad(self) -> None:
        for optimizer in self.adams:
            optimizer.zero_grad()
        for q in self.q:
            q.grad = None

    def step(self) -> None:
        for w, q, a, (w_p, w_n) in zip(self.w, self.q, self.assignment, self.centroids, strict=True):
            plus, minus = (a == 1).float(), (a == -1).float()
            w_p.grad, w_n.grad = (q.grad * plus).sum(), -(q.grad * minus).sum()
            w.grad = q.grad * (w_p * plus + w_n * minus + (a == 0).float())
        for optimizer in self.adams:
            optimizer.step()
        self.assign()

    @torch.no_grad()
    def assign(self) -> None:
        for i, (w, q, pair) in enumerate(zip(self.w, self.q, self.centroids, strict=True)):
            for c in pair:
                c.clamp_(min=0.675 * w.std().item())
            w_p, w_n = pair
            distances = torch.stack([(w + w_n) ** 2, w**2, (w - w_p) ** 2])
            nearest = distances.argmin(0)
            p = torch.stack([(nearest == k).sum() for k in range(3)]) / w.numel()
            if p[1].item() < 0.5:
                p = torch.stack([p[0] / (p[0] + p[2]) / 2, torch.full_like(p[1], 0.5), p[2] / (p[0] + p[2]) / 2])
            info = -torch.log2(p)
            top, bottom = w.max(), -w.min()
            limit_p = (top**2 - (w_p - top) ** 2) / (info[2] - info[1])
            limit_n = (bottom**2 - (w_n - bottom) ** 2) / (info[0] - info[1])
            lam = G * w.numel() / self.largest * min(limit_p.item(), limit_n.item())
            cost = distances + lam * info.view(3, *[1] * w.ndim)
            self.assignment[i] = cost.argmin(0).float() - 1
            a = self.assignment[i]
            q.copy_(w_p * (a == 1).float() - w_n * (a == -1).float())


def one_step(network: nn.Module, optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    optimizer.step()


def medians(functions: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function; the functions alternate, so that a slow moment of the machine hits all."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):  # the first round warms up
        for name, function in functions.items():
            _synchronise(device)
            start = time.perf_counter()
            function()
            _synchronise(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(name: str, bits: int, device: torch.device, batch_size: int, rounds: int, compile: bool) -> list:
    """One row of the table: network `name` on `device`, its layers of so many bits."""
    spec, image_size = NETWORKS[name]
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    networks = [build(spec).to(device).train() for _ in range(3)]
    names = ternary_candidates(networks[0], spec["name"])
    labels = torch.randint(10, (batch_size,), device=device)

    plain = torch.optim.Adam(networks[0].parameters(), lr=1e-4, fused=True)
    layers = QuantizedLayers(networks[1], dict.fromkeys(names, bits), S, G)
    if compile:
        layers.compile()
    others = [p for n, p in networks[1].named_parameters() if n not in names]
    ours = EC2TOptimizer(layers, others, 1e-4, 1e-5, 5e-6)
    literal = LiteralEC2T(networks[2], names)
    steps = medians(
        {
            "plain": lambda: one_step(networks[0], plain, images, labels),
            "ours": lambda: one_step(networks[1], ours, images, labels),
            "literal": lambda: one_step(networks[2], literal, images, labels),
        },
        rounds,
        device,
    )
    weights = nn.Parameter(torch.randn_like(layers.weights))
    weights.grad = torch.randn_like(weights)
    adam = torch.optim.Adam([weights], lr=1e-4, fused=True)
    parts = medians(
        {"adam": adam.step, "quantizer": lambda: (layers.scale_gradients(), layers.assign())}, 3 * rounds, device
    )
    number = sum(layers.parameters[i].numel() for i in range(len(names)))
    state = [layers.weights, layers.gradient, layers.assignment]  # and Adam's two moments
    floats = sum(t.numel() * t.element_size() for t in state) / 4 + 2 * layers.weights.numel()
    quantizer, literal_quantizer = steps["ours"] - steps["plain"], steps["literal"] - steps["plain"]
    return [
        f"{name}, {bits} bit, {device.type}",
        f"{number / 1e6:.2f}M",
        *(f"{1e3 * steps[key]:.1f}" for key in ("plain", "ours", "literal")),
        f"{1e3 * quantizer:.1f}",
        f"{1e3 * parts['quantizer']:.1f}",
        f"{1e3 * parts['adam']:.1f}",
        f"{literal_quantizer / parts['quantizer']:.1f}x",
        f"{parts['quantizer'] / parts['adam']:.1f}x",
        f"{floats / number:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["micronet", "efficientnet-b1"])
    parser.add_argument("--bits", type=int, nargs="+", default=[2], choices=range(2, 9))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the quantizer, as --compile does in the sweep")
    args = parser.parse_args()
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    settings = args.batch_size, args.rounds, args.compile
    rows = [
        compare(name, bits, device, *settings) for device in devices for name in args.networks for bits in args.bits
    ]
    headers = [
        *("milliseconds a step", "weights", "plain", "EC2T", "literal", "EC2T - plain", "quantizer", "fused Adam"),
        *("literal / ours", "ours / Adam", "floats a weight"),
    ]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}")
    print(table(headers, rows))


if __name__ == "__main__":
    main()

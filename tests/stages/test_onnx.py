"""ONNX files: small, equal to the network that is evaluated, and readable without this toolkit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from onnxruntime import InferenceSession
from PIL import Image
from torch import Tensor, nn

from engine.evaluation import as_stored
from engine.program.errors import UserError
from engine.store.checkpoint import network_content, save
from helpers.programs import run_apart, run_here
from model import build
from model.selection import ternary_candidates
from model_quantization import EC2T
from model_scoring.onnx_decoding import bits_of, compact, words_of
from model_scoring.onnx_file import write_onnx

ROOT = Path(__file__).parents[2]


def built(name: str, bits: int = 2, **arguments) -> nn.Module:
    """A network whose layers are quantized, and whose BatchNorms do something."""
    torch.manual_seed(0)
    network = build({"name": name, **arguments})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    EC2T(network, s=0.4, g=0.1, bits=bits, layers=ternary_candidates(network, name))
    return as_stored(network.eval())


class Attention(nn.Module):
    """Patches, one encoder layer, a classifier."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def written(network: nn.Module, size: int, path: Path, opset: int = 18):
    report = write_onnx(network, [torch.zeros(3, size, size)], path, opset, {"image_size": size})
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return report


def outputs(path: Path, images: Tensor) -> np.ndarray:
    return InferenceSession(path).run(None, {"images": images.numpy()})[0]


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("resnet20", 32, {"num_classes": 10}),
        ("cifar_micronet", 16, {"depth": 0.3, "width": 0.2, "num_classes": 7}),
        ("efficientnet-b1", 64, {"num_classes": 10}),
    ],
)
def test_built_in_networks_at_any_batch(name, size, arguments, tmp_path):
    network = built(name, **arguments)
    report = written(network, size, tmp_path / "n.onnx")
    assert set(report.quantized) == set(ternary_candidates(network, name))
    assert report.equal == 16
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert np.allclose(outputs(tmp_path / "n.onnx", images), network(images).numpy(), atol=1e-3)
    assert outputs(tmp_path / "n.onnx", images[:1]).shape == (1, arguments["num_classes"])


def test_ternary_weights_take_less_than_two_bits(tmp_path):
    network = built("resnet20", num_classes=10)
    report = written(network, 32, tmp_path / "r.onnx")
    weights = sum(network.get_parameter(name).numel() for name in report.quantized)
    assert report.file_bytes < weights * 1.62 / 8 + 22_000
    assert onnx.load(tmp_path / "r.onnx").ir_version == 8


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_wider_layers(bits, tmp_path):
    report = written(built("resnet20", bits, num_classes=10), 32, tmp_path / "r.onnx", opset=20)
    assert len(report.quantized) == 18
    assert report.file_bytes < 268_000 * (bits + 0.1) / 8 + 22_000


def test_a_network_with_attention_packs_its_matrices(tmp_path):
    torch.manual_seed(0)
    network = Attention()
    EC2T(network, s=0.4, layers=["encoder.linear?", "head"], bits={"*": 4, "head": 2})
    report = written(as_stored(network.eval()), 16, tmp_path / "a.onnx")
    assert "head.weight" in report.quantized and len(report.quantized) >= 3  # the exporter names what it transposes
    assert report.equal == 16


def test_pruned_weights_are_masks_and_values(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(1, 3, 12, 12))
    with torch.no_grad():
        network[2].weight *= torch.rand_like(network[2].weight) > 0.9
    stored = as_stored(network.eval())
    report = written(stored, 12, tmp_path / "p.onnx")
    nonzero = int(stored[2].weight.count_nonzero())
    rest = sum(p.numel() for p in stored.parameters()) - stored[2].weight.numel()
    assert report.file_bytes < stored[2].weight.numel() / 8 + 2 * nonzero + 2 * rest + 3300


@given(st.integers(2, 255))
def test_words_hold_their_digits(base):
    dtype, digits = words_of(base)
    assert base**digits - 1 <= np.iinfo(dtype).max
    assert np.log2(base) <= bits_of(base) <= 8


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 12), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_decoded_weights_are_the_stored_ones(seed, filters, values, zeros):
    """Whatever way they are stored in: the graph computes what was there, times the factors of merged BatchNorms."""
    numbers = np.random.default_rng(seed)
    book = numbers.standard_normal(values).astype(np.float32)
    weight = numbers.choice(book, (filters, 4, 3, 3)) * (numbers.random((filters, 4, 3, 3)) >= zeros)
    dense = numbers.standard_normal((filters, 90)).astype(np.float16).astype(np.float32)
    scale = numbers.uniform(0.5, 2, (filters, 1, 1, 1)).astype(np.float32)
    made = {"merged": weight.astype(np.float32) * scale, "dense": dense}
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name} again"]) for name in made]
    shown = [onnx.helper.make_tensor_value_info(f"{name} again", 1, a.shape) for name, a in made.items()]
    stored = [numpy_helper.from_array(array, name) for name, array in made.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], shown, stored)
    compact(graph, {"merged": weight.astype(np.float32), "dense": dense})
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    again = InferenceSession(model.SerializeToString()).run(None, {})
    assert np.allclose(again[0], made["merged"], rtol=1e-6, atol=0)
    assert np.array_equal(again[1], dense)


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    def halved(graph, weights):
        for initializer in (one for one in graph.initializer if one.data_type == 1):
            initializer.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(initializer) / 2, initializer.name))
        return []

    monkeypatch.setattr("model_scoring.onnx_file.compact", halved)
    with pytest.raises(UserError, match="outputs differ from torch's by"):
        written(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)), 4, tmp_path / "f.onnx")
    assert not (tmp_path / "f.onnx").exists()


def test_what_torch_cannot_export_is_said_in_one_line(tmp_path):
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"torch\.onnx\.export can't export this network") as raised:
        written(Odd(), 4, tmp_path / "o.onnx")
    assert "\n" not in str(raised.value)


@pytest.mark.robustness
def test_in_a_shell(tmp_path):
    """The file's accuracy, and a prediction by the example, which knows nothing of this toolkit."""
    network = built("resnet20", num_classes=10)
    classes = [f"digit {i}" for i in range(10)]
    save(
        network_content({"name": "resnet20", "num_classes": 10}, network, dataset="digits", classes=classes),
        tmp_path / "net.pt",
    )
    code, output, error = run_apart(
        f"run_scoring.py --t-model {tmp_path}/net.pt --onnx {tmp_path}/net.onnx --image-size 32 --no-cuda"
    )
    assert (code, error) == (0, "")
    assert "predictions are equal" in output
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "i.png")
    predicted = subprocess.run(
        [sys.executable, ROOT / "examples" / "predict_onnx.py", "net.onnx", "i.png"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert predicted.returncode == 0, predicted.stderr
    assert predicted.stdout.splitlines()[0].split("  ")[-1] in classes
    about = InferenceSession(tmp_path / "net.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == classes


def test_wrong_flags_are_said_before_anything_is_counted(tmp_path, monkeypatch, capsys):
    save(network_content({"name": "resnet20", "num_classes": 10}, built("resnet20", num_classes=10)), tmp_path / "n.pt")
    for flags, said in ((f"--onnx {tmp_path}", "is a folder"), ("--onnx-opset 9", "invalid choice")):
        assert run_here(f"run_scoring.py --t-model {tmp_path}/n.pt {flags}", monkeypatch) == 2
        assert said in capsys.readouterr().err

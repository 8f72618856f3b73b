"""What only a GPU can show: a step replayed as a CUDA graph trains as the step itself."""

import copy

import pytest
import torch

from engine.device import Machine
from engine.images.augment import Augmentation
from engine.images.batches import ImagesInMemory
from engine.objective import Objective
from engine.training import Epoch, train_epoch
from model import build
from model.selection import ternary_candidates
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import QuantizedLayers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STEPS, BATCH = 12, 64


@pytest.fixture(autouse=True)
def same_kernels_every_time():
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic = False


@pytest.fixture
def images():
    torch.manual_seed(0)
    data = torch.randint(256, (STEPS * BATCH, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (STEPS * BATCH,))
    on_gpu = tuple(tensor.cuda() for tensor in data)
    return ImagesInMemory("x", ["a"] * 10, on_gpu, on_gpu, Augmentation(True, 4, (0.3, 0.3, 0.3, 0.075), 16), BATCH, 64)


def both(images, amp, build_optimizer, spec, objective=None):
    """Two networks after two epochs, one with graphs; what their optimizers are; and their losses."""
    results = []
    for graphs in (False, True):
        machine = Machine(torch.device("cuda"), amp, graphs=graphs)
        torch.manual_seed(1)
        network = machine.place(build(spec))
        optimizer = build_optimizer(network)
        asked = objective(copy.deepcopy(network)) if objective else Objective()
        losses = [train_epoch(network, optimizer, images, machine, Epoch(i, ""), asked).loss for i in range(2)]
        results.append((network, optimizer, losses))
    return results


def same(one, other) -> None:
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_sgd_and_dropout(images, amp):
    spec = {"name": "cifar_micronet", "depth": 0.5, "width": 0.5, "num_classes": 10}

    def sgd(network):
        return torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)

    (network, _, losses), (replayed, _, of_replays) = both(images, amp, sgd, spec)
    assert of_replays == pytest.approx(losses, rel=1e-4)
    same(network, replayed)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"prune": True}, {"bits": 3}, {"bits": 6}], ids=str)
def test_ec2t(images, amp, options):
    def ec2t(network):
        names = dict.fromkeys(ternary_candidates(network, "resnet20"), options.get("bits", 2))
        layers = QuantizedLayers(network, names, 0.3, 0.1, prune=options.get("prune", False))
        layers.frozen = options.get("frozen", False)
        others = [p for name, p in network.named_parameters() if name not in names]
        return EC2TOptimizer(layers, others, 1e-4, 1e-5, 5e-6)

    def taught(teacher):
        return Objective(teacher.eval(), 0.5, 2.0, cutmix=0.5)

    spec = {"name": "resnet20", "num_classes": 10}
    (_, step, losses), (_, replayed, of_replays) = both(images, amp, ec2t, spec, taught)
    assert of_replays == pytest.approx(losses, rel=1e-3)
    assert (step.layers.assignment == replayed.layers.assignment).float().mean() > 0.999
    same_steps = torch.isclose(step.layers.centroids, replayed.layers.centroids, rtol=1e-3)
    assert same_steps.all()

"""What each of two processes does in `test_distributed.py`: started by `torchrun`, or alone for comparison.

    torchrun --nproc_per_node=2 tests/helpers/two_processes.py FOLDER

writes FOLDER/process_RANK_of_WORLD.pt: the state of EC2T after some steps, the indices of the images that this
process saw, and its evaluation.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from engine import distributed
from engine.device import choose_machine
from engine.evaluation import evaluate
from engine.images.augment import Augmentation, normalise
from engine.images.batches import ImagesInMemory
from engine.objective import Objective
from engine.program import processes
from engine.training import Epoch, train_epoch
from model import build
from model.selection import ternary_candidates
from model_quantization.budget import Probe
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import QuantizedLayers

STEPS, BATCH, IMAGES, CLASSES = 4, 16, 67, 10


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    machine = choose_machine(cuda=False)
    torch.manual_seed(0)
    network = machine.place(build({"name": "resnet20", "num_classes": CLASSES}))
    # the label of an image is its index: what a process saw can be told from the labels
    images = torch.randint(256, (IMAGES, 3, 8, 8), dtype=torch.uint8)
    numbered = images, torch.arange(IMAGES)
    data = ImagesInMemory("folder", [], numbered, numbered, Augmentation(), BATCH, BATCH)
    result = {
        "trained_on": torch.cat([labels for _, labels in data.train_batches(seed=1)]),
        "evaluated_on": torch.cat([labels for _, labels in data.val_batches()]),
    }

    layers = QuantizedLayers(network, ternary_candidates(network, "resnet20"), s=0.3, g=0.1)
    parameters = dict(network.named_parameters())
    others = [parameter for name, parameter in parameters.items() if name not in layers.names]
    optimizer = EC2TOptimizer(layers, others, lr=1e-3, lr2=1e-4, weight_decay=5e-6)
    runner = machine.runner(network)
    network.eval()  # BatchNorm computes with what it has seen: images do not depend on their batch
    with torch.no_grad():
        result["divergence"] = Probe(network, data).divergence("linear.weight", 2 * network.linear.weight)
    for step in range(STEPS):
        batch = distributed.shard(torch.arange(step * BATCH, (step + 1) * BATCH))
        optimizer.zero_grad()
        F.cross_entropy(runner(normalise(images[batch])), batch % CLASSES).backward()
        if step == 0:
            result["gradient"] = layers.gradient.clone()
        optimizer.step()
    result["layers"] = layers.state_dict()
    result["others"] = [parameter.detach().clone() for parameter in others]

    labelled = images, torch.arange(IMAGES) % CLASSES
    data = ImagesInMemory("folder", [], labelled, labelled, Augmentation(flip=True), BATCH, BATCH)
    evaluation = evaluate(network, data, machine)
    result["evaluation"] = (evaluation.loss, evaluation.correct, evaluation.images)
    result["epoch_loss"] = train_epoch(runner, optimizer, data, machine, Epoch(2, ""), Objective()).loss
    result["trained"] = network.state_dict()
    torch.save(result, folder / f"process_{processes.rank()}_of_{processes.world_size()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

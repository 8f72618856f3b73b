"""A training loop in the style of 2019, to compare with: written for the benchmarks, used by nothing else.

Each image is a PIL image that torchvision's transforms augment in worker processes; the arithmetic is 32 bit in
NCHW layout; the loss and the accuracy are read back after every step.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from engine.images.augment import CIFAR

WORKERS = 4


class CutoutOneImage:
    """Zero a square of one normalised image `[3, H, W]`."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        y, x = torch.randint(height, ()).item() - self.size // 2, torch.randint(width, ()).item() - self.size // 2
        image[:, max(y, 0) : max(y + self.size, 0), max(x, 0) : max(x + self.size, 0)] = 0
        return image


class OneByOne(Dataset):
    """Images `[N, 3, H, W]` uint8 as PIL images, each transformed on its own; with ColorJitter and Cutout if `rich`."""

    def __init__(self, images: Tensor, labels: Tensor, rich: bool):
        self.images = [Image.fromarray(image.movedim(0, 2).numpy()) for image in images]
        self.labels, size = labels.tolist(), images.shape[-1]
        steps = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(size, padding=size // 8)]
        steps += [transforms.ColorJitter(0.3, 0.3, 0.3, 0.075)] * rich
        steps += [transforms.ToTensor(), transforms.Normalize(*CIFAR)]
        steps += [CutoutOneImage(size // 2)] * rich
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def plain_loader(images: Tensor, labels: Tensor, batch_size: int, rich: bool) -> DataLoader:
    """Batches of augmented images, from worker processes."""
    dataset = OneByOne(images.cpu(), labels.cpu(), rich)
    pin = torch.cuda.is_available()
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=WORKERS, pin_memory=pin)


def plain_step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One step of SGD; the loss comes back to the host, and the accuracy with it."""
    optimizer.zero_grad()
    logits = network(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    (logits.argmax(1) == labels).sum().item()
    return loss.item()

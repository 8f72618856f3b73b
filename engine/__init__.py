"""What the three stages share: data, checkpoints, runs, training, evaluation, devices, reporting.

Importing this package does not import torch, so that command lines are parsed at once.
"""

DATASETS = ("CIFAR100", "CIFAR10", "MNIST", "FashionMNIST", "ImageNet", "digits", "folder")
MAX_IMAGE_SIZE = 2**16  # pixels


class UserError(Exception):
    """The user's input is wrong. The message is one line: what is wrong, where, and what to do."""

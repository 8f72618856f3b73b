"""The known data sets. Imports no torch."""

DATASETS = ("CIFAR100", "CIFAR10", "MNIST", "FashionMNIST", "ImageNet", "digits", "folder")
DATA_PATH = "../data"  # where images are unless the user says
MAX_IMAGE_SIZE = 2**16  # pixels

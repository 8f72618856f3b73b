"""Wrong command lines: each of the three programs ends with exit code 2 and one line that helps, within seconds."""

import time
import zipfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from engine.store.checkpoint import network_content, save
from helpers.images import random_image
from helpers.networks import TINY
from helpers.programs import run_apart, run_here
from model import build

pytestmark = pytest.mark.robustness


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with class folders and checkpoints, good and bad ones."""
    folder, image = tmp_path_factory.mktemp("files"), random_image()
    for name, classes in {"pets": "cat dog", "three": "ant bee cat", "unequal": "cat dog", "broken": "cat dog"}.items():
        for label in classes.split():
            for split in ("train", "test"):
                (folder / name / split / label).mkdir(parents=True)
                image.save(folder / name / split / label / "1.png")
    (folder / "unequal" / "test" / "dog").rename(folder / "unequal" / "test" / "cow")
    (folder / "broken" / "train" / "dog" / "1.png").write_bytes(b"no image")
    for empty in ("empty", "halves/train", "halves/test"):
        (folder / empty).mkdir(parents=True)
    torch.manual_seed(0)
    content = network_content(TINY, build(TINY), dataset="folder", image_size=8)
    save(content, folder / "tiny.pt")
    (folder / "truncated.pt").write_bytes((folder / "tiny.pt").read_bytes()[:20_000])
    for name in ("notes.pt", "notes.safetensors"):
        (folder / name).write_text("no checkpoint")
    compressed_file = zipfile.ZipFile(folder / "compressed.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(folder / "tiny.pt") as plain, compressed_file as compressed:
        for entry in plain.infolist():
            compressed.writestr(entry.filename, plain.read(entry))
    torch.save({"state_dict": Fraction(1, 3)}, folder / "object.pt")
    torch.save({"fc.weight": torch.zeros(2, 2)}, folder / "foreign.pt")
    tensors = content["state_dict"]
    save(content | {"state_dict": tensors | {"linear.bias": torch.full((2,), torch.nan)}}, folder / "nan.pt")
    signs = {name: tensor.sign() if ".conv" in name else tensor for name, tensor in tensors.items()}
    save(content | {"state_dict": signs}, folder / "ternary.pt")
    spec = {"name": "efficientnet-b1", "num_classes": 2}
    save(network_content(spec, build(spec)), folder / "efficientnet.pt")
    return folder


SCALING = "run_compound_scaling.py --no-cuda --save-dir {0}/runs --dataset folder --data-path {0}/pets "
QUANTIZATION = "run_quantization.py --no-cuda --save-dir {0}/runs --data-path {0}/pets --model-dict {0}/tiny.pt "
SCORING = "run_scoring.py --no-cuda --t-model {0}/tiny.pt "
TINY_FLAGS = "holds --model cifar_micronet --dw-multps 0.1 0.5 --phi 1, but the flags ask for "

# A command and what its line must say; {0} is the folder of the fixture `files`.
BAD_COMMANDS = [
    (SCALING + "--grid 1 1 14 12", "a depth multiplier of 14^3.5"),
    # numbers
    (SCALING + "--grid 1.4 1.2 1.5", "argument --grid: 3 numbers are no pairs of depth and width"),
    (SCALING + "--grid", "argument --grid: expected at least one argument"),
    (SCALING + "--grid 1.4 0", "argument --grid: '0' is not a number above 0"),
    (SCALING + "--grid -1 1", "argument --grid: '-1' is not a number above 0"),
    (SCALING + "--grid nan 1", "argument --grid: 'nan' is not"),
    (SCALING + "--grid 1,4 1,2", "argument --grid: '1,4' is not"),
    (SCALING + "--phi -1", "argument --phi: '-1' is not a number of 0 or more"),
    (SCALING + "--batch-size 0", "argument --batch-size: '0' is not a whole number above 0"),
    (SCALING + "--batch-size 1.5", "argument --batch-size: '1.5' is not a whole number"),
    (SCALING + "--val-batch-size -1", "argument --val-batch-size: '-1' is not a whole number above 0"),
    (SCALING + "--epochs 0", "argument --epochs: '0' is not"),
    (SCALING + "--epochs 1" + 400 * "0", "argument --epochs: '1000"),
    (SCALING + "--epochs 5 --start-epoch 5", "--start-epoch 5 leaves nothing of --epochs 5"),
    (SCALING + "--image-size 0", "argument --image-size: '0' is not"),
    (SCALING + "--lr inf", "argument --lr: 'inf' is not a number above 0"),
    (SCALING + "--seed -1", "argument --seed: '-1' is not a whole number of 0 or more"),
    (SCALING + "--workers -1", "argument --workers: '-1' is not"),
    (QUANTIZATION + "--batch-size 0", "argument --batch-size: '0' is not"),
    (QUANTIZATION + "--ini-c-divrs 0", "argument --ini-c-divrs: '0' is not"),
    (QUANTIZATION + "--lambda-max-divrs 1", "argument --lambda-max-divrs: '1' is not"),
    (QUANTIZATION + "--shard 3/2", "argument --shard: '3/2' is not"),
    (SCORING + "--mul-bits 0", "argument --mul-bits: '0' is not"),
    (SCORING + "--dw-multps 0 1", "argument --dw-multps: '0' is not a number above 0"),
    (SCORING + "--dw-multps 1", "argument --dw-multps: expected 2 arguments"),
    (SCORING + "--prune-threshold 1.1", "argument --prune-threshold: '1.1' is not"),
    # names
    (SCALING + "--dataset cifar100", "argument --dataset: invalid choice: 'cifar100' (choose from"),
    (SCALING + "--grids 1 1", "unrecognized arguments: --grids 1 1"),
    (SCALING + "--epoch 1", "unrecognized arguments: --epoch 1"),
    (SCALING + "--resume x --no-resume", "argument --no-resume: not allowed with argument --resume"),
    ("run_quantization.py --plot-ternarization yes", "argument --plot-ternarization: 'yes' is not True or False"),
    ("run_quantization.py --prune", "unrecognized arguments: --prune"),
    ("run_quantization.py --pretrained --dataset digits", "are published, not of no --model; pass one of these as --m"),
    ("run_quantization.py --pretrained --model resnet20", "--pretrained: weights of efficientnet-b1, "),
    (QUANTIZATION + "--pretrained", "argument --pretrained: not allowed with argument --model-dict"),
    (QUANTIZATION + "--model resnet50", "argument --model: unknown model 'resnet50' (choose"),
    (SCORING + "--model resnet50", "argument --model: unknown model 'resnet50' (choose"),
    (SCORING + "--accounting mine", "argument --accounting: invalid choice: 'mine'"),
    # images
    (SCALING + "--data-path {0}/nowhere", "{0}/nowhere: no such folder for --dataset folder"),
    (SCALING + "--data-path {0}/empty", "{0}/empty: no class folders for --dataset folder"),
    (SCALING + "--data-path {0}/empty --dataset ImageNet", "{0}/empty: no class folders for --dataset ImageNet"),
    (SCALING + "--data-path {0}/tiny.pt --dataset MNIST", "{0}/tiny.pt: MNIST can't be read there"),
    (SCALING + "--data-path {0}/halves", "{0}/halves/train: holds no class folders"),
    (SCALING + "--data-path {0}/unequal", "cow is missing in {0}/unequal/train"),
    (SCALING + "--data-path {0}/broken", "{0}/broken/train/dog/1.png: does not decode as an image"),
    (QUANTIZATION + "--data-path {0}/unequal", "cow is missing in {0}/unequal/train"),
    (SCORING + "--eval --data-path {0}/three", "has 2 classes, but folder in "),
    # checkpoints
    (QUANTIZATION + "--model-dict nowhere.th", "no file 'nowhere.th', neither as a path nor in model_quantization/"),
    (QUANTIZATION + "--model-dict {0}/pets", "'{0}/pets' is a folder; pass a file in it ({0}/pets holds test/, "),
    ("run_quantization.py --dataset digits", "no file 'MicroNet_d14_w12_phi35_acc8146_params8_06m.th', neither as "),
    (
        "run_scoring.py",
        "no file 'best_ternary_cifar_micronet.pt', neither as a path nor in model_scoring/trained_t_mod",
    ),
    (SCORING + "--t-model {0}/nowhere.pt", "no file '{0}/nowhere.pt' ({0} holds compressed.pt, efficientnet.pt, "),
    (SCORING + "--t-model {0}/truncated.pt", "{0}/truncated.pt: is truncated or damaged; pass another file ({0} "),
    (SCORING + "--t-model {0}/notes.pt", "{0}/notes.pt: is not a PyTorch checkpoint; pass another file ({0} holds "),
    (SCORING + "--t-model {0}/foreign.pt", "{0}/foreign.pt: the tensors fit none of the known networks (cifar_"),
    (SCORING + "--model resnet20", TINY_FLAGS + "--model resnet20"),
    (QUANTIZATION + "--dw-multps 0.1 2 --phi 1", TINY_FLAGS + "--model cifar_micronet --dw-"),
    (SCORING + "--dw-multps 14 12", "a depth multiplier of 14^3.5 = 1.03e+04 makes no usable"),
    # where results go
    (SCALING + "--epochs 1 --grid 1 1 --phi 1 --save-dir {0}/tiny.pt", "can't be written (Not a directory)"),
    (SCALING + "--resume {0}/nowhere/last.pt", "{0}/nowhere/last.pt: can't be read (No such file or directory)"),
    (SCALING + "--resume {0}/tiny.pt", "{0}/tiny.pt: holds no run's state; pass the last.pt in a run's folder"),
    # more numbers
    (SCALING + "--grid inf 1", "argument --grid: 'inf' is not a number above 0"),
    (SCALING + "--grid one two", "argument --grid: 'one' is not a number above 0"),
    (SCALING + "--phi nan", "argument --phi: 'nan' is not a number of 0 or more"),
    (SCALING + "--phi 1 2", "unrecognized arguments: 2"),
    (SCALING + "--phi", "argument --phi: expected one argument"),
    (SCALING + "--grid 1.4 1.2 --phi 1000", "a depth multiplier of 1.4^1000"),
    (SCALING + "--grid 1 0.5 --phi 10000", "a width multiplier of 0.5^10000 = 0 makes no usable network"),
    (SCALING + "--epochs", "argument --epochs: expected one argument"),
    (SCALING + "--epochs ten", "argument --epochs: 'ten' is not a whole number"),
    (SCALING + "--epochs 1e3", "argument --epochs: '1e3' is not a whole number"),
    (SCALING + "--epochs 0x10", "argument --epochs: '0x10' is not a whole number"),
    (SCALING + "--epochs ''", "argument --epochs: '' is not a whole number"),
    (SCALING + "--epochs 3000000000", "(and at most 2147483647)"),
    (SCALING + "--start-epoch -1", "argument --start-epoch: '-1' is not a whole number of 0 or more"),
    (SCALING + "--epochs 2 --start-epoch 3", "--start-epoch 3 leaves nothing of --epochs 2"),
    (SCALING + "--batch-size -5", "argument --batch-size: '-5' is not a whole number above 0"),
    (SCALING + "--batch-size 1000000000000000000000", "argument --batch-size: '1000000000000000000000' is not"),
    (SCALING + "--val-batch-size 0", "argument --val-batch-size: '0' is not a whole number above 0"),
    (SCALING + "--image-size 32.0", "argument --image-size: '32.0' is not a whole number above 0"),
    (SCALING + "--image-size 65537", "argument --image-size: '65537' is not a whole number above 0 (and at "),
    (SCALING + "--image-size -32", "argument --image-size: '-32' is not"),
    (SCALING + "--image-size 32 32", "unrecognized arguments: 32"),
    (SCALING + "--lr 0", "argument --lr: '0' is not a number above 0"),
    (SCALING + "--lr -0.1", "argument --lr: '-0.1' is not a number above 0"),
    (SCALING + "--lr 0,1", "argument --lr: '0,1' is not a number above 0"),
    (SCALING + "--momentum -0.9", "argument --momentum: '-0.9' is not a number of 0 or more"),
    (SCALING + "--momentum nan", "argument --momentum: 'nan' is not"),
    (SCALING + "--weight-decay -1", "argument --weight-decay: '-1' is not a number of 0 or more"),
    (SCALING + "--weight-decay inf", "argument --weight-decay: 'inf' is not"),
    (SCALING + "--seed 0.5", "argument --seed: '0.5' is not a whole number"),
    (SCALING + "--seed 4294967296", "argument --seed: '4294967296' is not a whole number of 0 or more"),
    (SCALING + "--workers 2000", "argument --workers: '2000' is not a whole number of 0 or more (and at most 1024)"),
    (SCALING + "--workers all", "argument --workers: 'all' is not"),
    (QUANTIZATION + "--epochs -1", "argument --epochs: '-1' is not a whole number of 0 or more"),
    (QUANTIZATION + "--retrain-epochs -1", "argument --retrain-epochs: '-1' is not a whole number of 0 or more"),
    (QUANTIZATION + "--retrain-epochs 1.5", "argument --retrain-epochs: '1.5' is not"),
    (QUANTIZATION + "--ini-c-divrs 1.1", "argument --ini-c-divrs: '1.1' is not a number above 0, and at most 1"),
    (QUANTIZATION + "--ini-c-divrs 0.3 -0.5", "argument --ini-c-divrs: '-0.5' is not"),
    (QUANTIZATION + "--ini-c-divrs", "argument --ini-c-divrs: expected at least one argument"),
    (QUANTIZATION + "--lambda-max-divrs -0.1", "argument --lambda-max-divrs: '-0.1' is not a number from 0"),
    (QUANTIZATION + "--lambda-max-divrs nan", "argument --lambda-max-divrs: 'nan' is not"),
    (QUANTIZATION + "--lambda-max-divrs", "argument --lambda-max-divrs: expected at least one argument"),
    (QUANTIZATION + "--lambda-sustain -1", "argument --lambda-sustain: '-1' is not a number of 0 or more"),
    (QUANTIZATION + "--lr 0", "argument --lr: '0' is not a number above 0"),
    (QUANTIZATION + "--lr2 0", "argument --lr2: '0' is not a number above 0"),
    (QUANTIZATION + "--lr2 nan", "argument --lr2: 'nan' is not a number above 0"),
    (QUANTIZATION + "--weight-decay nan", "argument --weight-decay: 'nan' is not"),
    (QUANTIZATION + "--val-batch-size 0", "argument --val-batch-size: '0' is not"),
    (QUANTIZATION + "--image-size 0", "argument --image-size: '0' is not"),
    (QUANTIZATION + "--shard 0/2", "argument --shard: '0/2' is not I/N with I from 1 to N"),
    (QUANTIZATION + "--shard 2", "argument --shard: '2' is not I/N with I from 1 to N"),
    (QUANTIZATION + "--shard 1/", "argument --shard: '1/' is not I/N"),
    (QUANTIZATION + "--shard 1/0", "argument --shard: '1/0' is not I/N"),
    (QUANTIZATION + "--seed x", "argument --seed: 'x' is not"),
    (QUANTIZATION + "--phi -1", "argument --phi: '-1' is not a number of 0 or more"),
    (QUANTIZATION + "--dw-multps 1.4", "argument --dw-multps: expected 2 arguments"),
    (QUANTIZATION + "--dw-multps -1 1", "argument --dw-multps: '-1' is not a number above 0"),
    (SCORING + "--mul-bits 1.5", "argument --mul-bits: '1.5' is not"),
    (SCORING + "--add-bits 0", "argument --add-bits: '0' is not a whole number above 0"),
    (SCORING + "--add-bits sixteen", "argument --add-bits: 'sixteen' is not"),
    (SCORING + "--prune-threshold 0", "argument --prune-threshold: '0' is not a number above 0"),
    (SCORING + "--prune-threshold -0.1", "argument --prune-threshold: '-0.1' is not"),
    (SCORING + "--image-size 100000", "argument --image-size: '100000' is not"),
    (SCORING + "--val-batch-size 0", "argument --val-batch-size: '0' is not"),
    (SCORING + "--phi x", "argument --phi: 'x' is not a number of 0 or more"),
    # more names
    (SCALING + "--dataset", "argument --dataset: expected one argument"),
    (SCALING + "--amp fp8", "argument --amp: invalid choice: 'fp8' (choose from"),
    (SCALING + "--no-cuda 1", "unrecognized arguments: 1"),
    (SCALING + "--model resnet50", "argument --model: unknown model 'resnet50' (choose from "),
    (SCALING + "--Epochs 3", "unrecognized arguments: --Epochs 3"),
    (SCALING + "--resume", "argument --resume: expected one argument"),
    (SCALING + "images", "unrecognized arguments: images"),
    (QUANTIZATION + "--dataset imagenet", "argument --dataset: invalid choice: 'imagenet'"),
    (QUANTIZATION + "--select size", "argument --select: invalid choice: 'size' (choose from"),
    (QUANTIZATION + "--schedule linear", "argument --schedule: invalid choice: 'linear'"),
    (QUANTIZATION + "--do-prune yes", "unrecognized arguments: yes"),
    (QUANTIZATION + "--model module:function", "--model module:function: No module named 'module'; it must name"),
    (QUANTIZATION + "--no-resume --resume x", "argument --resume: not allowed with argument --no-resume"),
    (QUANTIZATION + "--grid 1 1", "unrecognized arguments: --grid 1 1"),
    (SCORING + "--dataset Cifar", "argument --dataset: invalid choice: 'Cifar'"),
    (SCORING + "--accounting", "argument --accounting: expected one argument"),
    (SCORING + "--epochs 3", "unrecognized arguments: --epochs 3"),
    (SCORING + "--no-resume", "unrecognized arguments: --no-resume"),
    (SCORING + "--model no_such_module:build", "no_such_module:build: No module named 'no_such_module'; it must"),
    (SCORING + "--model math:nothing", "math:nothing: module 'math' has no attribute 'nothing'; it must"),
    (SCORING + "--model math:pi", "--model math:pi: 'float' object is not callable; it must name a function"),
    (SCORING + "--model random:random", "--model random:random built a float, not a torch.nn.Module"),
    # more files
    (SCALING + "--data-path {0}/tiny.pt", "{0}/tiny.pt: no such folder for --dataset folder"),
    (SCALING + "--data-path ''", "no class folders for --dataset folder"),
    (SCALING + "--dataset digits", "--data-path {0}/pets: --dataset digits comes with scikit-learn"),
    (
        SCALING + "--dataset digits --data-path ../data --image-size 4 --batch-size 1 --epochs 1 --grid 0.1 0.5",
        "larger --image-size",
    ),
    (SCALING + "--epochs 1 --grid 1 1 --phi 1 --save-dir /proc/nowhere", "can't be written (No such file or "),
    (SCALING + "--resume {0}/pets", "{0}/pets: can't be read (Is a directory)"),
    (SCALING + "--resume {0}/notes.pt", "{0}/notes.pt: is not a PyTorch checkpoint"),
    (SCALING + "--resume {0}/truncated.pt", "{0}/truncated.pt: is truncated or damaged"),
    (QUANTIZATION + "--model-dict {0}/compressed.pt", "{0}/compressed.pt: holds compressed entries"),
    (QUANTIZATION + "--model-dict {0}/object.pt", "{0}/object.pt: holds Python objects ("),
    (QUANTIZATION + "--model-dict {0}/notes.pt", "{0}/notes.pt: is not a PyTorch checkpoint"),
    (QUANTIZATION + "--model-dict {0}/nan.pt", "{0}/nan.pt: linear.bias holds NaN or infinite values"),
    (QUANTIZATION + "--model-dict ''", "no file '', neither as a path nor in model_quantization/"),
    (QUANTIZATION + "--data-path {0}/nowhere --dataset folder", "{0}/nowhere: no such folder for --dataset folder"),
    (QUANTIZATION + "--resume {0}/tiny.pt", "{0}/tiny.pt: holds no run's state"),
    (QUANTIZATION + "--do-prune --model-dict {0}/ternary.pt", "all layers that --do-prune prunes are ternary"),
    (SCORING + "--before {0}/nowhere.pt", "no file '{0}/nowhere.pt'"),
    (SCORING + "--before {0}/notes.pt", "{0}/notes.pt: is not a PyTorch checkpoint"),
    (SCORING + "--json {0}/notes.pt/x.json", "{0}/notes.pt/x.json: can't be written (File exists)"),
    (SCORING + "--pack {0}/notes.pt/x.safetensors", "{0}/notes.pt/x.safetensors: can't be written (File exists)"),
    (SCORING + "--unpack {0}/pets", "{0}/pets is a folder; pass the name of a file to write"),
    (SCORING + "--onnx {0}/pets", "{0}/pets is a folder; pass the name of a file to write"),
    (SCORING + "--t-model {0}/notes.safetensors", "{0}/notes.safetensors: is not a PyTorch checkpoint"),
    (SCORING + "--eval --dataset folder --data-path {0}/nowhere", "{0}/nowhere: no such folder for --dataset folder"),
]


@pytest.mark.parametrize("command, said", BAD_COMMANDS, ids=lambda text: text.replace(" --no-cuda", "")[:90])
def test_bad_command_lines_end_with_one_line(command, said, files, monkeypatch, capsys):
    began = time.process_time()
    assert run_here(command.format(files), monkeypatch) == 2
    assert time.process_time() - began < 5
    output, error = capsys.readouterr()
    assert error.startswith(f"{command.split()[0]}: error: ") and error.count("\n") == 1
    assert said.format(files) in error
    assert "accuracy" not in output, "something was trained"
    assert not list(files.glob("runs/*/*.pt"))


SAMPLE = [
    (SCALING + "--grid 1.4", "1 numbers are no pairs"),
    (QUANTIZATION + "--data-path {0}/unequal", "cow is missing in {0}/unequal/train"),
    (SCORING + "--t-model {0}/truncated.pt", "{0}/truncated.pt: is truncated or damaged"),
]


@pytest.mark.parametrize("command, said", SAMPLE, ids=["scaling", "quantization", "scoring"])
def test_a_program_of_its_own_process_ends_the_same(command, said, files):
    code, _, error = run_apart(command.format(files))
    assert code == 2 and error.startswith(f"{command.split()[0]}: error: ") and error.count("\n") == 1
    assert said.format(files) in error

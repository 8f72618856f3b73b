"""Folders as people bring them: names of any bytes, links, what is hidden, damaged, made again, or too little."""

import os
import pickle
import shutil
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model_compound_scaling.search
import model_quantization.grid
import model_scoring.scoring
from engine import distributed
from engine.images import survey
from engine.images.batches import Data
from engine.images.decoding import BadImages, Fault
from engine.program.errors import printable
from engine.store.checkpoint import Checkpoint, read_network
from helpers import images
from helpers.images import PHOTO, random_image, refusal, write_grey
from model_compound_scaling.arguments import parser as scaling_parser
from model_quantization.arguments import parser as quantization_parser
from model_scoring.arguments import parser as scoring_parser

KINDS = pytest.mark.parametrize("size, suffix", [((8, 8), "png"), (PHOTO, "jpg")], ids=["small", "photographs"])
LATIN_1 = os.fsdecode(b"caf\xe9")
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))

load = partial(images.load, image_size=8)


def labels(data: Data) -> list[int]:
    return torch.cat([labels for _, labels in data.val_batches()]).tolist()


# ------------------------------------------------------------------------------------- names


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_names_are_any_bytes(size, suffix, workers, make_folders, capsys):
    path = make_folders(classes=(LATIN_1, "a\nb"), size=size, suffix=suffix)
    for split in ("train", "test"):
        (path / split / LATIN_1 / f"0.{suffix}").rename(path / split / LATIN_1 / f"{LATIN_1}\n.{suffix}")
    data = load(path, workers=workers)
    assert data.classes == ["a\nb", LATIN_1] and labels(data) == [0, 0, 1, 1]
    assert load(path).digest == data.digest
    (path / "train" / LATIN_1 / f"1.{suffix}").write_bytes(b"")
    assert refusal(path).startswith(f"{path}/train/caf\\xe9/1.{suffix}: does not decode")


def test_what_is_printed_is_one_line_of_text():
    assert printable("Ä b\u3000c") == "Ä b\u3000c"
    assert printable(f"{LATIN_1}\n\x1b[2J") == r"caf\xe9\n\x1b[2J"


def test_a_folder_of_any_name_is_said(make_folders, capsys):
    path = make_folders(LATIN_1)
    load(path)
    assert f"folder in {path.parent}/caf\\xe9: 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("listed, stored", [(COMPOSED, COMPOSED), (COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_tiny_imagenets_list_may_name_any_files(encoding, listed, stored, make_folders):
    path = make_folders(splits=("train",))
    (path / "val" / "images").mkdir(parents=True)
    name = stored if encoding != "latin-1" else LATIN_1
    random_image().save(path / "val" / "images" / f"{name}.png")
    text = f"{COMPOSED if encoding == 'latin-1' else listed}.png\tdog\t0\n"
    (path / "val" / "val_annotations.txt").write_bytes(text.encode(encoding))
    shutil.rmtree(path / "train" / "cat")
    assert load(path).val[1].tolist() == [0]


@KINDS
def test_classes_composed_and_decomposed_are_the_same(size, suffix, make_folders):
    path = make_folders(classes=("cafz", DECOMPOSED), size=size, suffix=suffix)
    (path / "train" / DECOMPOSED).rename(path / "train" / COMPOSED)
    data = load(path)
    assert data.classes == ["cafz", COMPOSED] and labels(data) == [0, 0, 1, 1]
    assert load(path, train=False).classes == data.classes


def test_a_class_twice_in_two_unicode_forms_is_named(make_folders):
    path = make_folders(classes=(COMPOSED, DECOMPOSED))
    assert f"{path}/train: holds the class café twice, under names that differ in their Unicode form" in refusal(path)


@pytest.mark.parametrize("other", [b"caf\xe9", b"caf\x82"])  # Latin-1, and what DOS wrote into zip files
@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_in_different_encodings_are_said_to_be_that(other, split, make_folders):
    path = make_folders(classes=("ant", COMPOSED))
    (path / split / COMPOSED).rename(path / split / os.fsdecode(other))
    assert f"hold the same classes in different encodings ({COMPOSED} in {path}/" in refusal(path)


def test_arrays_whose_classes_are_spelled_differently(tmp_path):
    content = {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0, 1])}
    spellings = (np.array(["ant", COMPOSED]), np.array(["ant", DECOMPOSED]), np.array([b"ant", COMPOSED.encode()]))
    for classes in spellings:
        np.savez(tmp_path / "train.npz", **content, classes=spellings[0])
        np.savez(tmp_path / "val.npz", **content, classes=classes)
        assert load(tmp_path).classes == ["ant", COMPOSED]
    np.savez(tmp_path / "val.npz", **content, classes=np.array([["ant"], [COMPOSED]]))
    assert "val.npz: holds no arrays of images, labels and classes" in refusal(tmp_path)


# ------------------------------------------------------------------------------------- hidden and linked folders


@KINDS
def test_what_is_hidden_or_of_the_system_does_not_count(size, suffix, make_folders, capsys):
    path = make_folders(size=size, suffix=suffix)
    for folder in ("train/cat/.ipynb_checkpoints", "train/cat/more/.Trash-1000", "train/__MACOSX", "test/dog/@eaDir"):
        (path / folder).mkdir(parents=True)
        random_image(size).save(path / folder / f"9.{suffix}")
    (path / "test" / "dog" / f"._0.{suffix}").write_bytes(b"of another system")
    (path / "test" / "dog" / ".DS_Store").write_bytes(b"of another system")
    data = load(path)
    assert data.classes == ["cat", "dog"] and data.num_train_images == data.num_val_images == 4
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert lines == [
        f"{path}/train: hidden folders left out: 3 (.Trash-1000, .ipynb_checkpoints, __MACOSX)",
        f"{path}/test: hidden folders left out: 1 (@eaDir)",
        f"{path}/test: hidden image files left out: 1 (._0.{suffix})",
    ]


def test_links_are_followed_but_not_twice(make_folders, capsys):
    path = make_folders()
    other = path.parent / "other"
    (other / "deep").mkdir(parents=True)
    random_image().save(other / "deep" / "9.png")
    cat = path / "train" / "cat"
    (cat / "linked").symlink_to(other)
    for name, target in {"again": other / "deep", "up": path / "train", "self": "self", "back": "."}.items():
        (cat / name).symlink_to(target)
    (other / "deep" / "loop").symlink_to(other)
    (cat / "2.png").symlink_to(cat / "0.png")
    (path / "train" / "all").symlink_to(path)
    (path / "train" / "lost").symlink_to(path / "nothing")
    shutil.move(path / "train" / "dog", path.parent / "elsewhere")
    (path / "train" / "dog").symlink_to(path.parent / "elsewhere")
    data = load(path)
    assert data.classes == ["cat", "dog"] and data.train[1].tolist() == [0, 0, 0, 0, 1, 1]
    said = capsys.readouterr().out
    assert "linked folders followed: " in said
    assert "links to folders that are read already, left out: " in said
    assert f"{path}/train: links that lead nowhere, left out: 1 (lost)\n" in said


@KINDS
def test_what_is_no_file_is_left_out_and_a_dead_link_is_named(size, suffix, make_folders, capsys):
    path = make_folders(size=size, suffix=suffix)
    os.mkfifo(path / "test" / "dog" / f"pipe.{suffix}")
    assert load(path).num_val_images == 4
    assert f"{path}/test: pipes, devices and the like left out: 1 (pipe.{suffix})\n" in capsys.readouterr().out
    (path / "test" / "dog" / f"2.{suffix}").symlink_to(path / "nothing")
    assert refusal(path) == f"{path}/test/dog/2.{suffix}: is gone; restore it, or begin a run without it"


# ------------------------------------------------------------------------------------- damage


@KINDS
@pytest.mark.parametrize("thorough", [True, False])
def test_all_damaged_images_are_named_before_training(thorough, size, suffix, make_folders, monkeypatch):
    if not thorough:
        monkeypatch.setattr(survey, "THOROUGH", 0)
    path = make_folders(number=8, size=size, suffix=suffix)
    damaged = [
        path / split / label / f"{i}.{suffix}"
        for split in ("train", "test")
        for label in ("cat", "dog")
        for i in (1, 4, 7)
    ]
    for i, file in enumerate(damaged):
        content = file.read_bytes()
        file.write_bytes((b"", b"404 not found", content[:60], content[: len(content) // 2])[i % 4])
    said = refusal(path, workers=2)
    names = ", ".join(str(file.relative_to(path)) for file in damaged[:10])
    assert said.startswith(
        f"{path}: 12 images can't be used: {names} and 2 more (the first does not decode as an image ("
    )
    assert said.endswith("; mend or remove them")
    for file in damaged[1:]:
        file.unlink()
    assert refusal(path).startswith(f"{damaged[0]}: does not decode as an image (")


def test_files_of_a_large_set_are_not_decoded_if_they_end_as_they_should(make_folders, monkeypatch):
    path = make_folders(size=PHOTO, suffix="jpg")
    for suffix in ("png", "webp", "bmp"):
        random_image(PHOTO).save(path / "train" / "dog" / f"x.{suffix}")
    write_grey(path / "train" / "dog" / "deep.png", [[4095]], "uint16")
    monkeypatch.setattr(survey, "THOROUGH", 0)
    decoded = []
    original = survey.deep_range
    monkeypatch.setattr(survey, "deep_range", lambda path: decoded.append(os.path.basename(path)) or original(path))
    assert load(path).val.white.bits == 12 and sorted(decoded) == ["deep.png", "x.bmp"]
    decoded.clear()
    assert load(path).val.white.bits == 12 and not decoded, "what was found must be remembered"


def test_several_damaged_photographs_of_a_batch_are_named(make_folders):
    path = make_folders(size=PHOTO, suffix="jpg")
    for workers in (0, 1):
        data = load(path, workers=workers)
        files = [path / "test" / label / "0.jpg" for label in ("cat", "dog")]
        kept = [file.read_bytes() for file in files]
        for file in files:
            file.write_bytes(b"")
        with pytest.raises(BadImages) as caught:
            list(data.val_batches())
        assert str(caught.value).startswith(f"{path}/test: 2 images can't be used: cat/0.jpg, dog/0.jpg (the first ")
        for file, content in zip(files, kept, strict=True):
            file.write_bytes(content)


def test_an_error_is_the_same_in_another_process():
    error = BadImages([Fault(f"/{LATIN_1}", "is gone", "restore it"), Fault("/b", "is gone", "restore it")])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# ------------------------------------------------------------------------------------- other data of the same names


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("suffix", ["bmp", "png"])
def test_photographs_that_were_made_again_are_other_data(thorough, suffix, make_folders, monkeypatch):
    if not thorough:
        monkeypatch.setattr(survey, "THOROUGH", 0)
    path = make_folders(size=PHOTO, suffix=suffix)
    first = load(path).digest
    changed = path / "train" / "dog" / f"1.{suffix}"
    size, times = changed.stat().st_size, changed.stat()
    pixels = np.array(Image.open(changed))
    pixels[30:40] = 255 - pixels[30:40]
    Image.fromarray(pixels).save(changed)
    changed.write_bytes(changed.read_bytes()[:size].ljust(size, b"\0"))
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load(path).digest != first


def test_photographs_that_were_copied_are_the_same_data(make_folders):
    path = make_folders(size=PHOTO, suffix="jpg")
    copy = shutil.copytree(path, path.parent / "copy", copy_function=shutil.copyfile)
    assert load(path).digest == load(copy).digest
    (path / "train" / "dog" / "0.jpg").touch()
    assert load(path).digest == load(copy).digest


# ------------------------------------------------------------------------------------- too few images, odd sizes


def warnings_of(path: Path, capsys, **options) -> list[str]:
    capsys.readouterr()
    load(path, **options)
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("WARNING: ") for line in lines if line.startswith("WARNING: ")]


@KINDS
def test_too_little_is_warned_of(size, suffix, make_folders, capsys):
    path = make_folders(size=size, suffix=suffix)
    assert warnings_of(path, capsys) == []
    assert warnings_of(path, capsys, batch_size=5) == [
        "training images: 4, fewer than --batch-size 5; each epoch will be a single step"
    ]
    one = make_folders("one", classes=("cat",), number=1, size=size, suffix=suffix)
    said = warnings_of(one, capsys)
    assert [line.split(":")[0] for line in said] == [
        "one class",
        "training images",
        "one validation image",
    ]
    assert "accuracy will be 100%" in said[0]


@pytest.mark.parametrize(
    "first, others, options, said",
    [
        (
            16,
            300,
            {"image_size": None},
            "16 px, and most are of 300 px or more: the first decides, and all will be squeezed",
        ),
        (
            16,
            300,
            {"image_size": 32},
            "squares of 32 px; remove it, pass --dataset ImageNet if they are photographs, or",
        ),
        (8, 32, {"image_size": None}, "squares of 8 px; remove it, or pass --image-size"),
        (8, 32, {"image_size": 32}, None),
        (
            300,
            32,
            {"image_size": None},
            "300 px, and most are of 32 px or less: the first decides, and all will be treated as",
        ),
        (70, 300, {"image_size": None}, None),
        (16, 300, {"image_size": 32, "name": "CIFAR10"}, None),
        (16, 300, {"image_size": 32, "name": "ImageNet"}, None),
    ],
)
def test_a_first_image_of_another_size_is_warned_of(first, others, options, said, make_folders, capsys):
    path = make_folders(number=4, size=(others, others), suffix="jpg")
    random_image((first, first)).save(path / "test" / "cat" / "0.jpg")
    lines = warnings_of(path, capsys, **options)
    assert len(lines) == (said is not None)
    if said:
        assert lines[0].startswith(f"the first image, {path}/test/cat/0.jpg, is of ") and said in lines[0]


# ------------------------------------------------------------------------------------- through all stages


@KINDS
def test_names_of_any_bytes_walk_through_all_stages_and_other_images_are_another_run(
    size, suffix, make_folders, tmp_path, capsys
):
    path = make_folders(classes=(LATIN_1, "dog"), size=size, suffix=suffix)
    folder = f"--dataset folder --data-path {path} --no-cuda --workers 0 --val-batch-size 4".split()
    training = [*folder, *f"--image-size 16 --epochs 1 --batch-size 2 --amp off --save-dir {tmp_path}/runs".split()]

    def scale() -> str:
        command = [*training, "--grid", "0.1", "0.4", "--phi", "1"]
        assert model_compound_scaling.search.run(scaling_parser().parse_args(command)) == 0
        return capsys.readouterr().out

    assert "finished before" not in scale() and "finished before" in scale()
    command = [*training, "--model-dict", f"{tmp_path}/runs/best_model.pt", "--retrain-epochs", "0"]
    command += ["--ini-c-divrs", "0.2", "--lambda-max-divrs", "0.15"]
    assert model_quantization.grid.run(quantization_parser().parse_args(command)) == 0
    best, report = tmp_path / "runs" / "Ternary_best_acc.pt", tmp_path / "report.json"
    command = [*folder, "--t-model", str(best), "--eval", "--json", str(report)]
    assert model_scoring.scoring.run(scoring_parser().parse_args(command)) == 0
    assert read_network(best).extra["classes"] == sorted(["dog", LATIN_1]) and report.is_file()
    assert "OTHER CLASSES" not in capsys.readouterr().out

    changed = path / "train" / "dog" / f"1.{suffix}"
    random_image(size, seed=99).save(changed)
    assert "finished before" not in scale()


def test_a_checkpoints_classes_may_be_spelled_in_another_unicode_form(capsys):
    checkpoint = Checkpoint(Path("x.pt"), {"name": "resnet20", "num_classes": 1}, {}, {"classes": [DECOMPOSED]})
    checkpoint.check_classes([COMPOSED], "folder", "there")
    assert not capsys.readouterr().out


def test_folders_are_read_from_where_one_stands(make_folders, monkeypatch):
    path = make_folders()
    digest = load(path).digest
    monkeypatch.chdir(path)
    assert load(Path(".")).digest == digest


def test_more_processes_than_images_are_refused(make_folders, monkeypatch):
    place = {"WORLD_SIZE": "6", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    assert "4 training images can't be shared by 6 processes; start fewer" in refusal(make_folders(), batch_size=6)

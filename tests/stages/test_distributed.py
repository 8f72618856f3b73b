"""Two processes under `torchrun` train what one trains, and only one of them speaks and writes."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from engine import distributed
from engine.images.batches import ImageRequest, load_data
from engine.images.datasets import DATA_PATH
from engine.program.errors import UserError
from engine.store.checkpoint import network_content, read, save
from helpers import ROOT, two_processes
from model import build

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def torchrun(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone_and_two(tmp_path_factory) -> list[dict]:
    """What one process got on whole batches, then what each of two got on its halves."""
    folder = tmp_path_factory.mktemp("processes")
    two_processes.main(folder)
    done = torchrun("tests/helpers/two_processes.py", str(folder))
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"process_{name}.pt") for name in ("0_of_1", "0_of_2", "1_of_2")]


@pytest.mark.robustness
def test_processes_hold_bit_identical_networks(alone_and_two):
    _, first, second = alone_and_two
    assert torch.equal(first["gradient"], second["gradient"])
    for part in ("layers", "trained"):
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])
    assert all(map(torch.equal, first["others"], second["others"]))
    for part in ("epoch_loss", "evaluation", "divergence"):
        assert first[part] == second[part]


@pytest.mark.robustness
def test_halves_of_a_batch_are_a_step_of_the_whole_batch(alone_and_two):
    """Gradients are averaged before EC2T scales them: every weight, centroid and assignment is as in one process."""
    alone, first, _ = alone_and_two
    torch.testing.assert_close(first["gradient"], alone["gradient"], rtol=1e-4, atol=1e-6)
    for name in ("weights", "centroids"):
        torch.testing.assert_close(first["layers"][name], alone["layers"][name], rtol=1e-4, atol=1e-5)
    differing = first["layers"]["assignment"] != alone["layers"]["assignment"]
    assert differing.float().mean() < 1e-4  # a weight on a threshold may fall on either side
    for ours, theirs in zip(first["others"], alone["others"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.robustness
def test_processes_share_every_image_once(alone_and_two):
    alone, first, second = alone_and_two
    for part, images in (("evaluated_on", 67), ("trained_on", 64)):  # 64: the incomplete last batch is left out
        seen = torch.cat([first[part], second[part]])
        assert len(seen) == images and sorted(seen.tolist()) == sorted(alone[part].tolist())
    assert alone["evaluation"][1:] == first["evaluation"][1:]
    assert alone["evaluation"][0] == pytest.approx(first["evaluation"][0], rel=1e-5)
    assert 0 < alone["divergence"] == pytest.approx(first["divergence"], rel=1e-4)


@pytest.mark.robustness
def test_stages_run_under_torchrun_and_one_process_speaks(tmp_path):
    torch.manual_seed(0)
    spec = {"name": "resnet20", "num_classes": 10}
    save(network_content(spec, build(spec), dataset="digits", image_size=8), tmp_path / "resnet.pt")
    done = torchrun(
        *("run_quantization.py", "--model-dict", str(tmp_path / "resnet.pt"), "--save-dir", str(tmp_path)),
        *"--batch-size 358 --epochs 1 --retrain-epochs 1 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split(),
        *"--no-cuda --amp off".split(),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("Running on the CPU" in line for line in lines) == sum("Best by accuracy" in line for line in lines) == 1
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
    history = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    epochs = [(record["phase"], record["epoch"]) for record in history]
    assert epochs == [("ternarize", 0), ("ternarize", 1), ("retrain", 1)]
    assert read(tmp_path / "Ternary_best_acc.pt")["accuracy"] == max(record["accuracy"] for record in history)


@pytest.mark.robustness
def test_scaling_walks_its_grid_under_torchrun(tmp_path):
    done = torchrun(
        *("run_compound_scaling.py", "--save-dir", str(tmp_path)),
        *"--dataset digits --image-size 8 --grid 0.14 0.5 0.14 0.4 --phi 1 --epochs 1 --batch-size 358".split(),
        *"--no-cuda --amp off".split(),
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(file.read_text())["accuracy"] for file in tmp_path.rglob("result.json")]
    assert len(results) == 2 and read(tmp_path / "best_model.pt")["accuracy"] == max(results)


def test_a_batch_that_processes_can_not_share_is_refused(monkeypatch):
    first_of_two(monkeypatch)
    with pytest.raises(UserError, match="--batch-size 15 can't be shared evenly by 2 processes"):
        load_data(ImageRequest("digits", DATA_PATH, batch_size=15), torch.device("cpu"))
    load_data(ImageRequest("digits", DATA_PATH, batch_size=15, train=False), torch.device("cpu"))


@pytest.fixture
def start(tmp_path):
    """A function that starts process `rank` of two which train on and on; they are gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, "-u", "run_compound_scaling.py", "--save-dir", str(tmp_path)]
    command += "--dataset digits --image-size 8 --grid 0.14 0.5 --phi 1 --epochs 5000 --batch-size 358".split()
    command += "--no-cuda --amp off".split()
    started = []

    def start(rank: int) -> subprocess.Popen:
        environment = os.environ | place | {"RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen, wanted: str) -> None:
    assert any(wanted in line for line in process.stdout), process.stderr.read()


@pytest.mark.robustness
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_waiting_for_a_process_that_never_comes_is_interrupted(start, number, code):
    process = start(0)
    read_until(process, "Waiting for 2 processes at 127.0.0.1:")
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code and len(said.splitlines()) == 1


@pytest.mark.robustness
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost_is_one_line_of_the_other(start, lost):
    processes = [start(0), start(1)]
    read_until(processes[0], "epoch   1/")
    processes[lost].kill()
    other = processes[1 - lost]
    _, said = other.communicate(timeout=60)
    assert other.returncode == 1 and len(said.splitlines()) == 1, said
    assert "another process is lost" in said and "the same command" in said


def first_of_two(monkeypatch) -> list[str]:
    """Let this be the first of two processes that never wait for each other; a list of when they would."""
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    waited: list[str] = []
    monkeypatch.setattr(distributed, "barrier", lambda: waited.append("waited"))
    return waited


def test_the_first_process_reads_first(monkeypatch):
    """What it downloads or decodes, the others find."""
    order = first_of_two(monkeypatch)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with distributed.first_process_first():
            order.append(rank)
    assert order == ["0", "waited", "waited", "1"]


def test_where_the_first_process_fails_it_does_not_wait(monkeypatch):
    waited = first_of_two(monkeypatch)
    with pytest.raises(UserError, match="no such folder"), distributed.first_process_first():
        raise UserError("no such folder")
    assert waited == []


WRONG_ENVIRONMENTS = [
    ({"MASTER_ADDR": ""}, "MASTER_ADDR is ''"),
    ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    ({"RANK": "2"}, "RANK is '2'"),
    ({"RANK": "-1"}, "RANK is '-1'"),
    ({"RANK": ""}, "RANK is ''"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    ({"LOCAL_RANK": "9"}, "LOCAL_RANK is '9'"),
]


@pytest.mark.parametrize("changed, said", WRONG_ENVIRONMENTS)
def test_wrong_environments_are_one_line(changed, said):
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"} | changed
    command = [sys.executable, "run_scoring.py", "--t-model", "x.pt"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert said in done.stderr and "start them with torchrun" in done.stderr


@pytest.mark.parametrize("environment, said", [({"RANK": "3"}, 1), ({"RANK": "3", "WORLD_SIZE": "4"}, 0)])
@pytest.mark.robustness
def test_a_wrong_command_line_is_said_once(environment, said):
    """What a cluster sets for other ends, a rank alone, silences nobody; half of an environment is said first."""
    command = [sys.executable, "run_scoring.py", "--nonsense"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("--nonsense") == said and len(done.stderr.splitlines()) == 1

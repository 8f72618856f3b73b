"""What happens to programs while they run: kills, full disks, second processes, memory, data that vanish."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision import datasets

import engine.program.launch
import model_compound_scaling.training
from engine.evaluation import Evaluation
from engine.images.batches import ImageRequest, load_data
from engine.program.arguments import Parser
from engine.program.errors import UserError
from engine.program.launch import launch
from engine.store.checkpoint import read
from engine.store.files import UNFINISHED, hold, write_whole
from helpers import ROOT
from helpers.disk import small_disk
from helpers.programs import run_apart, script
from helpers.stages import FILES, assert_same_runs, interrupt_after, runs, scale

pytestmark = pytest.mark.robustness

POINT = ["--grid", "0.14", "0.5", "--epochs", "3", "--lr", "0.05"]


def assert_one_line(ending: tuple[int, str, str], code: int, said: str) -> None:
    returned, _, error = ending
    assert (returned, error.count("\n")) == (code, 1), error
    assert re.search(said, error), error


# ------------------------------------------------------------------------------------- kills


def test_killed_anywhere_and_resumed_to_the_same_bytes():
    """Three kills; `python tests/robustness/kill.py --kills 200` is the long form."""
    code, output, error = run_apart("tests/robustness/kill.py --kills 3 --seed 3")
    assert code == 0, output + error
    assert "3 kills" in output
    assert re.search(r"all [1-9]\d* ended in the bytes of an uninterrupted run", output)  # starts depend on timing


@pytest.mark.parametrize("late", ["log.jsonl", "result.json"])
def test_killed_between_two_files_of_the_last_epoch(late, tmp_path, monkeypatch):
    """The log or the result lacks behind `last.pt`: the next start makes up for it."""
    scale(tmp_path / "whole", *POINT)
    original = engine.store.run_folder.write_text

    def write_text(path: Path, text: str) -> None:
        if path.name == late and text.count("\n") >= 3:
            raise KeyboardInterrupt
        original(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.store.run_folder, "write_text", write_text)
        scale(tmp_path / "parts", *POINT)
    scale(tmp_path / "parts", *POINT)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", (*FILES, "best.pt"))


def test_resuming_in_another_folder_takes_the_best_network_along(tmp_path, monkeypatch):
    equal = Evaluation(loss=1.0, correct=36, images=360)  # the first of equal epochs stays the best one
    monkeypatch.setattr(model_compound_scaling.training, "evaluate", lambda *_: equal)
    scale(tmp_path / "whole", *POINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 2)
        scale(tmp_path / "first", *POINT)
    (first,) = runs(tmp_path / "first")
    scale(tmp_path / "second", *POINT, "--resume", str(first / "last.pt"))
    assert_same_runs(tmp_path / "whole", tmp_path / "second", (*FILES, "best.pt"))
    (first / "best.pt").unlink()
    with pytest.raises(UserError, match=r"best\.pt beside it is missing"):
        scale(tmp_path / "first", *POINT)


def test_starting_afresh_leaves_no_network_of_the_run_before(tmp_path):
    scale(tmp_path, *POINT)
    (run,) = runs(tmp_path)
    run = engine.store.run_folder.Run(tmp_path, run.name.rpartition("-")[0], read(run / "last.pt")["arguments"])
    run.open(resume=False)
    assert sorted(path.name for path in run.folder.iterdir()) == ["arguments.json", "lock"]


# ------------------------------------------------------------------------------------- second processes


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the lock `tmp_path / "lock"` and writes a temporary file."""
    body = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from engine.store import files\n"
        f"folder = Path({str(tmp_path)!r}); lock = files.hold(folder / 'lock')\n"
        f"file = files._open_locked(folder / '{files_name()}'); print('ready', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def files_name() -> str:
    return f"{UNFINISHED}of-another-process"


def test_a_run_belongs_to_one_process_until_that_dies(holder, tmp_path):
    said = f"{tmp_path}: process {holder.pid} on .* is working on this run; wait for its end"
    with pytest.raises(UserError, match=said):
        hold(tmp_path / "lock")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    hold(tmp_path / "lock").close()


def test_a_second_process_at_the_same_point_is_refused(tmp_path):
    scale(tmp_path, *POINT)
    (run,) = runs(tmp_path)
    lock = str(run / "lock")
    body = f"from pathlib import Path; from engine.store.files import hold; f = hold(Path({lock!r})); input()"
    (run / "result.json").unlink()
    (run / "lock").write_text("")
    with subprocess.Popen([sys.executable, "-c", body], cwd=ROOT, stdin=subprocess.PIPE) as other:
        while not (run / "lock").read_text():
            assert other.poll() is None
        before = (run / "last.pt").read_bytes()
        for more in ([], ["--no-resume"]):
            with pytest.raises(UserError, match=f"process {other.pid} on"):
                scale(tmp_path, *POINT, *more)
        assert (run / "last.pt").read_bytes() == before
        other.kill()
    scale(tmp_path, *POINT)


def test_only_what_dead_processes_left_is_removed(holder, tmp_path):
    (tmp_path / f"{UNFINISHED}left").write_text("half a file")
    (tmp_path / ".hidden").touch()
    write_whole(b"x", tmp_path / "x.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt", "lock", ".hidden", files_name()}
    holder.kill()
    holder.wait()
    write_whole(b"y", tmp_path / "x.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt", "lock", ".hidden"}


# ------------------------------------------------------------------------------------- disks and folders


def test_a_disk_that_fills_up_while_training(tmp_path, monkeypatch):
    scale(tmp_path / "whole", *POINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        scale(tmp_path / "parts", *POINT)
    (run,) = runs(tmp_path / "parts")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with small_disk(5000), pytest.raises(UserError, match=r"\.pt: can't be written \(File too large\); make"):
        scale(tmp_path / "parts", *POINT)
    assert {path.name: path.read_bytes() for path in run.iterdir()}.items() >= before.items()
    scale(tmp_path / "parts", *POINT)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", (*FILES, "best.pt"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_console_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        ending = run_apart(script("print('x' * 9, flush=True)", tmp_path), stdout=full)
    assert_one_line(ending, 2, "No space left on device; mend that")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"can't be written \(Permission denied\)"):
        scale(tmp_path / "runs", *POINT)
    tmp_path.chmod(0o700)


def test_photographs_that_vanish_while_training(make_folders, tmp_path, monkeypatch, capsys):
    path = make_folders(number=2, size=(80, 70), suffix="jpg")
    gone = path / "train" / "dog" / "1.jpg"
    original = engine.store.run_folder.Run.save_epoch

    def save_epoch(run, *arguments) -> None:
        original(run, *arguments)
        gone.unlink(missing_ok=True)

    monkeypatch.setattr(engine.store.run_folder.Run, "save_epoch", save_epoch)
    with pytest.raises(UserError, match=f"^{gone}: is gone; restore it"):
        scale(tmp_path, *POINT, "--dataset", "folder", "--data-path", str(path), "--batch-size", "4", "--workers", "1")
    (run,) = (folder for folder in runs(tmp_path) if folder != path)
    assert len(read(run / "last.pt")["history"]) == 1


def test_a_failed_download_leaves_no_folder(tmp_path, monkeypatch):
    def download(path, **options):
        (path / "MNIST" / "raw").mkdir(parents=True)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "MNIST", download)
    for path in (tmp_path / "data", tmp_path):
        with pytest.raises(UserError, match="MNIST can't be read there, nor downloaded"):
            load_data(ImageRequest("MNIST", path), torch.device("cpu"))
        assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- memory and sizes


def test_a_machine_without_enough_memory(tmp_path):
    body = "import torch; torch.empty(2**50)"
    assert_one_line(run_apart(script(body, tmp_path)), 1, "error: out of memory .*allocate.*; take a smaller network")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 4 bytes"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def run(args):
        raise error

    program = type("Program", (), {"run": run})
    monkeypatch.setattr(engine.program.launch.importlib, "import_module", lambda name: program)
    monkeypatch.setattr(sys, "argv", ["x", "--batch-size", "9"])
    parser = Parser(prog="x")
    parser.add_argument("--batch-size")
    with pytest.raises(SystemExit) as caught:
        launch(parser, "program")
    said = capsys.readouterr().err
    assert caught.value.code == 1 and said.startswith("x: error: out of memory (") and said.count("\n") == 1
    assert said.endswith("; take a smaller --batch-size\n")

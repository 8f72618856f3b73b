#!/usr/bin/env python3
"""Kill the three programs anywhere, run the same command again, and compare with runs that nobody killed.

    python tests/robustness/kill.py --kills 200 [--seed 0] [--fresh]

Each start is killed by SIGKILL, SIGTERM or SIGINT, at a random time or just before its n-th access to a file of its
results (opening, renaming, removing). After each kill every network that is there must be readable; in the end all
files must be those of an uninterrupted run, byte by byte (what a run took of time and memory, and PDFs, aside), and no
others. Processes are forked from one that has imported everything; with --fresh each is a Python of its own.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
DIGITS = "--dataset digits --image-size 8 --no-cuda".split()
TRAINING = "--batch-size 479 --amp off".split()
CHAINS = {
    "run_compound_scaling.py": "--grid 0.14 0.5 0.14 0.6 --phi 1 --epochs 3 --lr 0.05 --save-dir results".split(),
    "run_quantization.py": (
        "--model-dict tiny.pt --epochs 2 --retrain-epochs 2 --lr 1e-3 --ini-c-divrs 0.3 0.5 --lambda-max-divrs 0.1 "
        "--save-dir results".split()
    ),
    "run_scoring.py": (
        "--t-model tiny.pt --eval --json results/score.json --pack results/packed.safetensors "
        "--unpack results/unpacked.pt --save".split()
    ),
}
RESULTS = ("results", "model_scoring")  # folders that the programs write to
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")
PATIENCE = 120  # seconds until a signal must have ended a program


def arguments(program: str) -> list[str]:
    return [*DIGITS, *(TRAINING if program != "run_scoring.py" else []), *CHAINS[program]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        become(**json.loads(args.child))
    with tempfile.TemporaryDirectory() as folder:
        return kill_all(Path(folder), args.kills, random.Random(args.seed), args.fresh)


def kill_all(folder: Path, kills: int, draw: random.Random, fresh: bool) -> int:
    """Kill `kills` starts, in turns of the three programs; return 1 if anything is not as it should be."""
    prepare(folder)
    whole, seconds, accesses = {}, {}, {}
    for program in CHAINS:
        work = folder / f"whole-{program}"
        began = time.monotonic()
        child = Child(program, work, folder / "tiny.pt", fresh=fresh)
        assert child.wait() == 0, child.log.read_text()
        whole[program], seconds[program] = snapshot(work), time.monotonic() - began
        accesses[program] = int((work / "accesses").read_text())
    done, signals, endings, chains, failures = 0, Counter(), Counter(), 0, []
    while not failures and done < kills:
        for program in CHAINS:
            work, finished = folder / f"killed-{program}", False
            shutil.rmtree(work, ignore_errors=True)
            while not finished and not failures:
                plan = {"signal": int(draw.choice(SIGNALS))}
                at_access = draw.random() < 0.5
                if at_access:
                    plan["access"] = draw.randint(1, accesses[program])
                if done >= kills:
                    plan, at_access = {}, True  # the last start of each chain is left alone
                child = Child(program, work, folder / "tiny.pt", fresh=fresh, **plan)
                if not at_access:
                    child.send(plan["signal"], draw.uniform(0, seconds[program]))
                code = child.wait()
                finished = code == 0
                endings[code] += 1
                failures += [f"{program}: {what}" for what in flaws(work, child, plan, code)]
                if not finished:
                    done += 1
                    signals[signal.Signals(plan["signal"]).name] += 1
            if finished:
                chains += 1
                failures += [f"{program}: {what}" for what in differences(whole[program], snapshot(work))]
    kinds = ", ".join(f"{n} {name}" for name, n in sorted(signals.items()))
    print(f"{done} kills ({kinds}), {chains} chains of starts")
    print(f"exit codes: {', '.join(f'{code}: {n}' for code, n in sorted(endings.items()))}")
    print("\n".join(failures) or f"all {chains} ended in the bytes of an uninterrupted run; every network was readable")
    return bool(failures)


class Child:
    """A start of a program in the folder `work`, which kills itself before its `access`-th access to its results."""

    def __init__(self, program: str, work: Path, network: Path, fresh: bool, signal: int = 0, access: int = 0):
        work.mkdir(exist_ok=True)
        shutil.copy(network, work / "tiny.pt")
        self.log, self.began = work / "stderr", work / "stdout"
        for old in (self.log, self.began):
            old.unlink(missing_ok=True)
        plan = {"program": program, "work": str(work), "number": int(signal), "access": access}
        if fresh:
            self.pid = subprocess.Popen([sys.executable, __file__, "--child", json.dumps(plan)]).pid
        elif not (pid := os.fork()):
            become(**plan)
        else:
            self.pid = pid

    def send(self, number: int, seconds: float) -> None:
        """Send a signal some time after the program began."""
        while not self.began.exists():
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return 1


def become(program: str, work: str, number: int, access: int) -> None:
    """Turn this process into the program; never returns."""
    os.chdir(work)
    # a shell ignores it for what runs in the background, and Python shows tracebacks until the program listens
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    errors = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    output = os.open("stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(errors, 2)
    count = 0

    def watch(event: str, details: tuple) -> None:
        nonlocal count
        named = event in EVENTS and isinstance(details[0], str | os.PathLike)
        if named and os.fspath(details[0]).startswith(RESULTS):
            count += 1
            if count == access:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)
    sys.argv = [program, *arguments(program)]
    code = 1
    try:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        Path("accesses").write_text(str(count))
        os._exit(code)


def flaws(work: Path, child: Child, plan: dict, code: int) -> list[str]:
    """What is wrong after a kill: an exit code or a message that is not the signal's, a network that can't be read."""
    from engine.program.errors import UserError
    from engine.store.checkpoint import read

    said = child.log.read_text()
    number = plan.get("signal", 0)
    # before the program listens to signals they end it without a line
    found = [] if code in (0, -number, 128 + number) else [f"exit code {code} after signal {number}: {said[-2000:]}"]
    if code == 128 + number and number and (said.count("\n") != 1 or "Traceback" in said):
        found.append(f"says after signal {number}: {said}")
    for path in work.rglob("*.pt"):
        if not path.name.startswith("."):
            try:
                read(path)
            except UserError as error:
                found.append(f"after signal {number}: {error}")
    return found


def snapshot(work: Path) -> dict[str, bytes]:
    """All files that the program wrote, by path, without what a run took of time and memory, and without locks."""
    files = {}
    for folder in RESULTS:
        for path in sorted((work / folder).rglob("*")):
            if path.is_file() and path.name not in ("lock", "seconds") and path.suffix != ".lock":
                files[str(path.relative_to(work))] = timeless(path)
    return files


def timeless(path: Path) -> bytes:
    if path.suffix == ".pdf":
        return b""  # its layout differs in the tenth digit from one process to another
    if path.suffix != ".json":
        return path.read_bytes()
    content = json.loads(path.read_text())
    for record in content if isinstance(content, list) else [content]:
        for cost in ("seconds", "peak_memory"):
            record.pop(cost, None)
    return json.dumps(content).encode()


def differences(whole: dict[str, bytes], killed: dict[str, bytes]) -> list[str]:
    names = sorted(whole.keys() | killed.keys())
    return [f"{name} is not that of an uninterrupted run" for name in names if whole.get(name) != killed.get(name)]


def prepare(folder: Path) -> None:
    """Import what the programs need, and make the network that two of them start from."""
    import torch

    import model_compound_scaling.search  # noqa: F401
    import model_quantization.grid
    import model_quantization.plots  # noqa: F401
    import model_scoring.scoring  # noqa: F401
    from engine.images.batches import ImageRequest, load_data
    from engine.images.datasets import DATA_PATH
    from engine.store.checkpoint import network_content, read_network, save
    from model import build

    torch.set_num_threads(1)
    torch.manual_seed(0)
    load_data(ImageRequest("digits", DATA_PATH, image_size=8), torch.device("cpu"))  # imports scikit-learn
    spec = {"name": "cifar_micronet", "depth": 0.14, "width": 0.5, "num_classes": 10}
    save(network_content(spec, build(spec), dataset="digits", image_size=8), folder / "tiny.pt")
    read_network(folder / "tiny.pt")  # imports torch's compiler


if __name__ == "__main__":
    sys.exit(main())

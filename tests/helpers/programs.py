"""The three programs, run in this process or in one of their own, and programs with a body of a test's own."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engine.program.launch import launch
from helpers import ROOT
from model_compound_scaling.arguments import parser as scaling_parser
from model_quantization.arguments import parser as quantization_parser
from model_scoring.arguments import parser as scoring_parser

PROGRAMS = {
    "run_compound_scaling.py": (scaling_parser, "model_compound_scaling.search"),
    "run_quantization.py": (quantization_parser, "model_quantization.grid"),
    "run_scoring.py": (scoring_parser, "model_scoring.scoring"),
}


def run_here(command: str, monkeypatch) -> int | str | None:
    """Run a program in this process, as its file does, and return its exit code."""
    program, *arguments = shlex.split(command)
    make_parser, module = PROGRAMS[program]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as caught:
        launch(make_parser(), module)
    return caught.value.code


def start(command: str, **options) -> subprocess.Popen:
    """Run a program in a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, **options)


def run_apart(command: str, **options) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a program in a process of its own."""
    process = start(command, **options)
    output, error = process.communicate()
    return process.returncode, output, error


def script(body: str, folder: Path, resumable: bool = False) -> str:
    """The path of a program whose `run(args)` has this body."""
    (folder / "program.py").write_text(f"from engine.program.errors import UserError\n\ndef run(args):\n    {body}\n")
    (folder / "x.py").write_text(
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        f"from engine.program.arguments import Parser, add_run_arguments\nfrom engine.program.launch import launch\n"
        f"parser = Parser(prog='x')\n"
        f"{resumable} and add_run_arguments(parser, 'runs')\n"
        f"launch(parser, 'program')\n"
    )
    return str(folder / "x.py")

"""The three command lines: help, defaults, exit codes, interruptions."""

import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.program import arguments
from engine.program.arguments import Parser
from engine.program.launch import EXIT_NOBODY_READS
from engine.store.checkpoint import network_content, save
from helpers.networks import TINY
from helpers.programs import PROGRAMS, run_apart, run_here, script, start
from model import build
from model_compound_scaling.arguments import parser as scaling_parser
from model_quantization.arguments import FP_MODEL
from model_quantization.arguments import parser as quantization_parser
from model_scoring.arguments import T_MODEL
from model_scoring.arguments import parser as scoring_parser

# ------------------------------------------------------------------------------------- good command lines


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_defaults_and_ends_with_an_example_that_works(program):
    code, text, error = run_apart(f"{program} --help")
    assert (code, error) == (0, "")
    for name in ("--dataset", "--data-path", "--image-size", "--workers", "--val-batch-size"):
        described = re.search(rf"^  {name} .*?(?=^  -|\Z)", text, re.MULTILINE | re.DOTALL)
        assert re.search(r"\(default:\s[^)]+\)", described[0]), f"{name} without its default"
    for name in ("--amp", "--compile"):  # accuracy is always computed in 32 bit, one pass is not worth compiling
        assert (name in text) == (program != "run_scoring.py")
    example = text[text.rindex("\nexample: ") :].replace("\\\n", " ")
    (command,) = (line for line in example.splitlines() if line.startswith("  python "))
    assert command.split()[1] == program and example.rstrip().endswith(command.rstrip())
    make_parser, _ = PROGRAMS[program]
    make_parser().parse_args(shlex.split(command)[2:])


def test_a_command_line_is_parsed_without_loading_torch():
    packages = ("model_compound_scaling", "model_quantization", "model_scoring")
    parsers = "; ".join(f"import {package}.arguments as arguments; arguments.parser()" for package in packages)
    program = f"import sys; {parsers}; print({{'torch', 'numpy'}} & set(sys.modules))"
    assert run_apart(f"-c {shlex.quote(program)}") == (0, "set()\n", "")


IMAGENET = "--dataset ImageNet --data-path x --val-batch-size 256"
OF_IMAGENET = {"dataset": "ImageNet", "data_path": "x", "val_batch_size": 256}
COMMANDS_OF_2019 = [
    (
        "run_compound_scaling.py --epochs 250 --batch-size 128 --grid 1.4 1.2 --phi 3.5 --dataset CIFAR100 "
        "--image-size 32",
        {"epochs": 250, "batch_size": 128, "grid": [1.4, 1.2], "phi": 3.5, "dataset": "CIFAR100", "image_size": 32},
    ),
    (
        "run_quantization.py --model-dict MicroNet.th --batch-size 128 --epochs 20 --retrain-epochs 20 "
        "--ini-c-divrs 0.45 --lambda-max-divrs 0.15 --model cifar_micronet --dw-multps 1.4 1.2 --phi 3.5",
        {"model_dict": "MicroNet.th", "batch_size": 128, "epochs": 20, "retrain_epochs": 20, "ini_c_divrs": [0.45]}
        | {"lambda_max_divrs": [0.15], "model": "cifar_micronet", "dw_multps": [1.4, 1.2], "phi": 3.5},
    ),
    (
        "run_scoring.py --t-model best.pt --model cifar_micronet --dataset CIFAR100 --eval --halfprecision "
        "--add-bits 16",
        {"t_model": "best.pt", "model": "cifar_micronet", "dataset": "CIFAR100", "eval": True, "halfprecision": True}
        | {"add_bits": 16},
    ),
    (
        f"run_quantization.py --batch-size 128 {IMAGENET} --ini-c-divrs 0.25 --lambda-max-divrs 0.15 --epochs 10 "
        "--model efficientnet-b1 --model-dict b1.pt --image-size 224 --retrain-epochs 0 --do-prune --no-resume",
        {**OF_IMAGENET, "batch_size": 128, "ini_c_divrs": [0.25], "lambda_max_divrs": [0.15], "epochs": 10}
        | {"model": "efficientnet-b1", "model_dict": "b1.pt", "image_size": 224, "retrain_epochs": 0}
        | {"do_prune": True, "no_resume": True},
    ),
    (
        f"run_scoring.py {IMAGENET} --image-size 256 --model efficientnet-b1 --t-model best.pt "
        "--prune-threshold 0.01 --eval --halfprecision --add-bits 16",
        {**OF_IMAGENET, "image_size": 256, "model": "efficientnet-b1", "t_model": "best.pt", "prune_threshold": 0.01}
        | {"eval": True, "halfprecision": True, "add_bits": 16},
    ),
    (
        "run_scoring.py --no-halfprecision --t-model best_ternary_imagenet_micronet.pt --image-size 200 --no-cuda",
        {"halfprecision": False, "t_model": "best_ternary_imagenet_micronet.pt", "image_size": 200, "cuda": False},
    ),
    ("run_scoring.py --no-save --no-pt-sparse --no-eval --cuda", {"save": False, "pt_sparse": False, "eval": False}),
    ("run_scoring.py --save --pt-sparse", {"save": True, "pt_sparse": True}),
    ("run_quantization.py --plot-ternarization True", {"plot_ternarization": True, "do_prune": False}),
    ("run_quantization.py --plot-ternarization False --no-eval", {"plot_ternarization": False, "eval": False}),
    ("run_quantization.py --plot-ternarization --do-prune", {"plot_ternarization": True, "do_prune": True}),
]


@pytest.mark.parametrize("command, meant", COMMANDS_OF_2019)
def test_commands_of_2019_are_understood(command, meant):
    program, *arguments = shlex.split(command)
    make_parser, _ = PROGRAMS[program]
    given = vars(make_parser().parse_args(arguments))
    assert {name: given[name] for name in meant} == meant


def test_defaults_of_2019():
    scaling = scaling_parser().parse_args([])
    assert (scaling.grid, scaling.phi, scaling.epochs, scaling.batch_size) == ([1.4, 1.2], 3.5, 200, 256)
    assert (scaling.lr, scaling.momentum, scaling.weight_decay, scaling.data_path) == (0.1, 0.9, 5e-4, "../data")
    quantization = quantization_parser().parse_args([])
    assert quantization.model_dict is None and FP_MODEL == "MicroNet_d14_w12_phi35_acc8146_params8_06m.th"
    assert quantization.ini_c_divrs == [0.15, 0.3, 0.5] and quantization.lambda_max_divrs == [0.125, 0.15, 0.175]
    assert (quantization.epochs, quantization.retrain_epochs) == (20, 15)
    assert (quantization.lr, quantization.lr2, quantization.weight_decay) == (1e-4, 1e-5, 5e-6)
    scoring = scoring_parser().parse_args([])
    assert scoring.t_model is None and T_MODEL == "best_ternary_cifar_micronet.pt"
    assert (scoring.halfprecision, scoring.mul_bits, scoring.prune_threshold) == (True, 16, 1.0)
    assert scoring.cuda and not scoring.eval


def test_without_a_gpu_the_cpu_is_taken_and_named(make_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save(network_content(TINY, build(TINY), dataset="folder", image_size=8), tmp_path / "tiny.pt")
    command = f"run_scoring.py --cuda --eval --data-path {make_folders()} --t-model {tmp_path}/tiny.pt"
    assert run_here(command, monkeypatch) == 0
    assert "Running on the CPU (no GPU found), 32 bit\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- how programs end


def ending(body: str, tmp_path: Path, resumable: bool = False) -> tuple[int, str, str]:
    """How a program ends whose `run(args)` has this body."""
    return run_apart(script(body, tmp_path, resumable))


def test_done(tmp_path):
    assert ending("return 0", tmp_path) == (0, "", "")


def test_quiet_programs_print_results_alone(tmp_path):
    path = script("from engine.program.report import narrate, say; narrate('on the way'); say('result')", tmp_path)
    assert run_apart(path)[1] == "on the way\nresult\n" and run_apart(f"{path} --quiet")[1] == "result\n"


def test_wrong_input_is_one_line_whatever_it_holds(tmp_path):
    assert ending(r"raise UserError('a\nb: what\r\nto do')", tmp_path) == (2, "", "x: error: a b: what to do\n")


def test_a_file_that_the_system_refuses_is_one_line(tmp_path):
    code, _, error = ending("open('/nowhere/x')", tmp_path)
    assert code == 2 and error == "x: error: /nowhere/x: No such file or directory; mend that, or pass another path\n"


@pytest.mark.parametrize("mistake", ["1 / 0", "raise OSError('no file')", "raise KeyError('x')"])
def test_a_bug_shows_its_traceback(mistake, tmp_path):
    code, _, error = ending(mistake, tmp_path)
    assert code == 1 and "Traceback" in error


@pytest.mark.parametrize("resumable", [True, False])
def test_ctrl_c_says_how_to_go_on_where_that_is_possible(resumable, tmp_path):
    code, _, error = ending("raise KeyboardInterrupt", tmp_path, resumable)
    assert code == 130 and error.startswith("x: interrupted") and error.count("\n") == 1
    assert ("the same command, without --no-resume, continues" in error) is resumable


def test_nobody_reads_any_more(tmp_path):
    assert ending("print('x' * 9); raise BrokenPipeError", tmp_path)[::2] == (EXIT_NOBODY_READS, "")


@pytest.mark.parametrize(
    ("data", "sent", "said"),
    [
        ("small", signal.SIGINT, "interrupted"),
        ("small", signal.SIGTERM, "terminated"),
        ("photographs", signal.SIGINT, "interrupted"),
    ],
)
@pytest.mark.robustness
def test_an_interruption_of_training_leaves_a_resumable_run(data, sent, said, make_folders, tmp_path):
    size, suffix = ((8, 8), "png") if data == "small" else ((80, 70), "jpg")
    path = make_folders(number=4, size=size, suffix=suffix)
    command = (
        f"run_compound_scaling.py --no-cuda --amp off --dataset folder --data-path {path} --image-size 8 "
        f"--grid 0.1 0.3 --phi 1 --epochs 5000 --batch-size 4 --workers 2 --save-dir {tmp_path}/runs"
    )

    def heed_ctrl_c() -> None:  # a shell ignores it for what runs in the background, these tests perhaps
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = start(command, start_new_session=True, preexec_fn=heed_ctrl_c)  # signals reach the group, workers too
    try:
        for line in process.stdout:
            if "epoch   2/" in line:
                break
        os.killpg(process.pid, sent)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + sent
    assert error == (
        f"run_compound_scaling.py: {said}; the same command, without --no-resume, "
        "continues after the last whole epoch\n"
    )
    (last,) = tmp_path.glob("runs/*/last.pt")
    assert torch.load(last, weights_only=True)["history"][-1]["epoch"] >= 2
    assert not list(tmp_path.glob("runs/*/.*")), "temporary files are left"


# ------------------------------------------------------------------------------------- numbers on the command line

NUMBERS: list[tuple[Callable, str, object]] = [
    (arguments.positive_int, "3", 3),
    (arguments.positive_int, "1_000", 1000),
    (arguments.nonnegative_int, "0", 0),
    (arguments.positive_float, "1e-3", 1e-3),
    (arguments.nonnegative_float, "0", 0.0),
    (arguments.fraction, "0", 0.0),
    (arguments.fraction, "0.999", 0.999),
    (arguments.share, "0", 0.0),
    (arguments.share, "1", 1.0),
    (arguments.positive_share, "1", 1.0),
]


@pytest.mark.parametrize("parse, text, value", NUMBERS)
def test_numbers(parse, text, value):
    assert parse(text) == value


def test_flags_are_not_guessed_from_their_beginning():
    parser = Parser(prog="x")
    parser.add_argument("--epochs", type=arguments.positive_int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--epo", "3"])


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("--dataset cifar10", "CIFAR10"), ("--dataset imagefolder", "folder"), ("--dataset imagenet", "ImageNet"),
     ("--dataset zzz", ""), ("--model resnet-20", "resnet20"), ("--amp b16", "bf16")],
)  # fmt: skip
def test_a_name_written_wrong_is_answered_with_the_right_one(wrong, meant, capsys):
    with pytest.raises(SystemExit):
        quantization_parser().parse_args(wrong.split())
    error = capsys.readouterr().err
    assert f"did you mean {meant}?" in error if meant else "did you mean" not in error


def test_arguments_come_from_a_file_too(tmp_path):
    (tmp_path / "run.txt").write_text("--epochs 3  # short\n--s 0.3 0.5 --g 0.1\n\n--data-path 'my images'\n")
    args = quantization_parser().parse_args([f"@{tmp_path}/run.txt", "--epochs", "4"])
    assert (args.epochs, args.ini_c_divrs, args.lambda_max_divrs) == (4, [0.3, 0.5], [0.1])
    assert args.data_path == "my images"


def test_the_version_is_said(capsys):
    with pytest.raises(SystemExit) as ended:
        quantization_parser().parse_args(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"EC2T \d+\.\d+\.\d+\n", capsys.readouterr().out)

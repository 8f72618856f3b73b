"""Which device and which arithmetic a program takes, on machines that this one may not be."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from engine import device
from engine.program.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """A function that pretends that there are so many GPUs."""

    def pretend(number: int, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8 if bf16 else 7, 0))

    return pretend


def test_gpus_are_taken_and_named_unless_unwanted(gpus, capsys):
    gpus(2)
    assert device.choose_machine(cuda=True).device.type == "cuda"
    assert device.choose_machine(cuda=False).device.type == "cpu"
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("Running")] == [
        "Running on 2 GPUs: GPU 0, GPU 1, 32 bit",
        "Running on the CPU (--no-cuda), 32 bit",
    ]
    assert "one process a GPU is faster" in lines[1]


@pytest.mark.parametrize("bf16, amp", [(True, "bf16"), (False, "fp16")])
def test_auto_is_what_the_gpu_is_fast_in(gpus, bf16, amp):
    gpus(1, bf16)
    assert device.choose_machine(cuda=True, amp="auto").amp == amp
    assert device.choose_machine(cuda=True, amp="off").amp == "off"


@pytest.mark.parametrize("capability, amp", [("avx512_bf16", "off"), ("amx_bf16", "bf16"), ("avx2", "off")])
def test_auto_is_what_the_cpu_is_fast_in(monkeypatch, capability, amp):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True, "l2_cache_size": 1}, raising=False)
    assert device.choose_machine(cuda=False, amp="auto").amp == amp


def test_compiling_for_several_gpus_needs_torchrun(gpus):
    gpus(2)
    with pytest.raises(UserError, match="torchrun --nproc_per_node=2, or let CUDA_VISIBLE_DEVICES name one GPU"):
        device.choose_machine(cuda=True, compile=True)
    gpus(1)
    assert device.choose_machine(cuda=True, compile=True).compile


def test_compiling_on_a_cpu_is_said_to_be_slow(gpus, capsys):
    gpus(1)
    for cuda, compile, warned in ((True, True, False), (False, False, False), (False, True, True)):
        assert device.choose_machine(cuda=cuda, compile=compile).compile == compile
        assert ("train slower" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("count, line", [(0, "there is no GPU here"), (2, "one process on one GPU")])
def test_cuda_graphs_need_one_gpu(gpus, count, line):
    gpus(1)
    assert device.choose_machine(cuda=True, graphs=True).graphs
    gpus(count)
    with pytest.raises(UserError, match=f"--cuda-graphs: {line}"):
        device.choose_machine(cuda=True, graphs=True)


AMONG_TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    gpus(1)
    for name, value in {**AMONG_TWO, "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"2 or more processes on a machine with 1 GPU\(s\)"):
        device.choose_machine(cuda=True)


def test_only_float16_scales_its_gradients():
    cpu = torch.device("cpu")
    assert [device.Machine(cpu, amp).gradient_scaler().is_enabled() for amp in ("off", "bf16", "fp16")] == [0, 0, 1]


def test_replicas_in_threads_of_their_own_compute_in_the_same_arithmetic():
    """What DataParallel calls: a new thread knows nothing of the autocast type that this one set."""
    network = device.Autocast(nn.Linear(2, 2), device.Machine(torch.device("cpu"), "bf16"))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(network, torch.ones(1, 2)).result().dtype == torch.bfloat16


def test_several_gpus_in_one_process_share_a_batch(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setattr(nn, "DataParallel", lambda network: ("shared", network))
    shared, replica = device.Machine(torch.device("cuda"), "bf16").runner(nn.Linear(2, 2))
    assert shared == "shared" and isinstance(replica, device.Autocast)


@pytest.mark.parametrize("amp, warned", [("bf16", True), ("off", False), ("auto", False)])
def test_emulated_arithmetic_is_said_to_be_slow(monkeypatch, capsys, amp, warned):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    device.choose_machine(cuda=False, amp=amp)
    assert ("times slower than --amp auto" in capsys.readouterr().out) == warned

"""A run's folder: found again by its arguments, resumed from its state, readable by people."""

import json
from collections.abc import Callable

import pytest
import torch

from engine.program.errors import UserError
from engine.store.run_folder import Run, resume_from
from engine.training import derived_seed


def refusal(call: Callable, *arguments) -> str:
    """The message of the UserError that `call` ends with, checked to be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def run(tmp_path) -> Run:
    """A run after one epoch."""
    run = Run(tmp_path, "digits", {"lr": 0.1, "seed": 0})
    run.open(resume=True)
    run.save_epoch({"epoch": 1}, {"weights": torch.ones(3)})
    return run


def again(run: Run, **changes) -> Run:
    return Run(run.folder.parent, "digits", {**run.arguments, **changes})


def test_a_run_is_found_again_by_its_arguments(run):
    same, other = again(run), again(run, seed=1)
    for each in (same, other):
        each.open(resume=True)
    assert same.history == [{"epoch": 1}] and torch.equal(same.state["weights"], torch.ones(3))
    assert other.folder != run.folder and other.state is None


def test_a_run_started_afresh_forgets_the_old_state(run):
    again(run).open(resume=False)  # and is interrupted in its first epoch
    resumed = again(run)
    resumed.open(resume=True)
    assert resumed.state is None and resumed.history == []


@pytest.mark.parametrize("content", [b"", b"text", b"PK"])
def test_a_damaged_state_names_the_way_out(content, run):
    run.last.write_bytes(content)
    message = refusal(again(run).open, True)
    assert str(run.last) in message and message.endswith("--no-resume starts this run afresh")


def test_a_damaged_result_counts_as_unfinished(run):
    run.finish({"accuracy": 93.5})
    assert again(run).result == {"accuracy": 93.5}
    (run.folder / "result.json").write_text('{"accuracy": 9')
    assert again(run).result is None


def test_resuming_from_a_file_of_another_run_names_the_difference(run):
    message = refusal(resume_from, run.last, [again(run, lr=0.2)])
    assert f"--resume {run.last}: that run had other arguments (lr was 0.1 and is 0.2); " in message


def test_resuming_from_what_is_no_state(run, tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "best.pt")
    assert "best.pt: holds no run's state; pass the last.pt" in refusal(resume_from, tmp_path / "best.pt", [run])
    assert "missing.pt: can't be read (No such file" in refusal(resume_from, tmp_path / "missing.pt", [run])


def test_the_folder_can_be_read_by_people(run):
    assert json.loads((run.folder / "arguments.json").read_text()) == {"lr": 0.1, "seed": 0}
    assert (run.folder / "log.jsonl").read_text() == '{"epoch": 1}\n'


def test_every_position_of_a_run_has_a_seed_of_its_own():
    """Also positions that are others' beginnings, or end in zeros."""
    positions = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (2, 0)]
    seeds = [derived_seed(seed, *position) for seed in (0, 1, 5) for position in positions]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)

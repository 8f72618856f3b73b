"""Bits a layer for a budget of bytes or of a score."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rulers
from engine.store.checkpoint import read, read_network
from helpers.refusals import refusal
from helpers.stages import quantize, runs
from model_quantization.arguments import parser
from model_quantization.budget import Option, choose
from model_scoring import pack
from rulers.tally import TASKS

UNTRAINED = "--epochs 0 --retrain-epochs 0 --ini-c-divrs auto --lambda-max-divrs 0".split()


@st.composite
def layers(draw) -> dict[str, list[Option]]:
    """Some layers, each with options that become cheaper; what divergence they lead to is any."""
    number = draw(st.integers(1, 5))
    costs = st.lists(st.integers(1, 100), min_size=2, max_size=5, unique=True)
    found = {}
    for i in range(number):
        of_layer = sorted(draw(costs), reverse=True)
        found[str(i)] = [Option(8 - j, cost, draw(st.floats(0, 9))) for j, cost in enumerate(of_layer)]
    return found


@given(layers(), st.floats(0, 1))
def test_what_is_chosen_holds_the_budget_wherever_that_can_be(options, share):
    least, most = (sum(of_layer[i].cost for of_layer in options.values()) for i in (-1, 0))
    amount = least + share * (most - least)
    chosen = choose(options, amount)
    assert chosen is not None and chosen.keys() == options.keys()
    assert sum(option.cost for option in chosen.values()) <= amount
    assert choose(options, least - 1) is None
    assert choose(options, most) == {name: of_layer[0] for name, of_layer in options.items()}


def test_the_layer_that_matters_least_is_narrowed_first():
    options = {"a": [Option(8, 10, 0.0), Option(4, 5, 1.0)], "b": [Option(8, 10, 0.0), Option(4, 5, 0.1)]}
    chosen = choose(options, 15)
    assert chosen is not None and {name: option.bits for name, option in chosen.items()} == {"a": 8, "b": 4}


@pytest.mark.parametrize("budget", ["150KB", "0.0018"])
@pytest.mark.robustness
def test_a_network_within_its_budget_and_the_flags_that_repeat_it(resnet, tmp_path, capsys, budget):
    quantize(resnet, tmp_path, *UNTRAINED, "--budget", budget)
    best = tmp_path / "Ternary_best_acc.pt"
    out = capsys.readouterr().out
    network = read_network(best).network().eval()
    if budget == "150KB":
        assert 120_000 < pack(network, tmp_path / "p.safetensors").file_bytes < 150_000 + 2_000  # names and the like
    else:
        size = read(best)["image_size"]
        assert 0.0015 < rulers.count(network, size)["challenge"].score(TASKS["CIFAR-100"]) <= 0.0018
    (flags,) = re.findall(r"--bits .*", out)
    before = {run.name for run in runs(tmp_path)}
    quantize(resnet, tmp_path, *UNTRAINED, *flags.split())
    assert "finished before" in capsys.readouterr().out  # it is the same run
    assert {run.name for run in runs(tmp_path)} == before


def test_a_budget_that_cannot_be_held_is_refused(resnet, tmp_path):
    said = refusal(quantize, resnet, tmp_path, *UNTRAINED, "--budget", "10KB")
    assert re.search(r"two bits a layer take \d+,\d+ bytes, more than 10,000 bytes", said)
    assert "--budget chooses the bits" in refusal(quantize, resnet, tmp_path, "--budget", "1MB", "--bits", "4")


@pytest.mark.parametrize(
    ("text", "budget"), [("130KB", (130e3, "bytes")), ("4.3mb", (4.3e6, "bytes")), ("5000", (5000, "bytes")),
                         ("0.004", (0.004, "score")), ("4e-3", (0.004, "score"))],
)  # fmt: skip
def test_budgets_are_bytes_or_scores(text, budget):
    assert parser().parse_args(["--budget", text]).budget == budget

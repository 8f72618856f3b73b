"""Bits a layer for a budget of bytes or of a score."""

import json
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

UNTRAINED = "--epochs 0 --retrain-epochs 0 --ini-c-divrs auto".split()


@st.composite
def layers(draw) -> dict[str, list[Option]]:
    """Some layers, each with options that become cheaper; what divergence they lead to is any."""
    number = draw(st.integers(1, 5))
    costs = st.lists(st.integers(1, 100), min_size=2, max_size=5, unique=True)
    found = {}
    for i in range(number):
        of_layer = sorted(draw(costs), reverse=True)
        found[str(i)] = [Option(8 - j, 0.0, cost, draw(st.floats(0, 9))) for j, cost in enumerate(of_layer)]
    return found


@given(layers(), st.floats(0, 1))
def test_what_is_chosen_holds_the_budget_wherever_that_can_be(options, share):
    least, most = (sum(of_layer[i].cost for of_layer in options.values()) for i in (-1, 0))
    amount = least + share * (most - least)
    chosen = choose(options, amount)
    assert chosen is not None and chosen.keys() == options.keys()
    assert sum(option.cost for option in chosen.values()) <= amount
    assert choose(options, least - 1) is None
    left = amount - sum(option.cost for option in chosen.values())
    better = [
        o
        for n, now in chosen.items()
        for o in options[n]
        if o.divergence < now.divergence and o.cost - now.cost <= left
    ]
    assert better == []
    unbound = choose(options, most)
    assert unbound is not None
    assert all(unbound[n].divergence == min(o.divergence for o in of_layer) for n, of_layer in options.items())


def test_the_layer_that_matters_least_is_narrowed_first():
    options = {
        "a": [Option(8, 0.1, 10, 0.0), Option(4, 0.1, 5, 1.0)],
        "b": [Option(8, 0.0, 9, 0.0), Option(8, 0.1, 10, 0.0), Option(4, 0.1, 6, 0.2), Option(4, 0.0, 5, 0.1)],
    }
    chosen = choose(options, 15)
    assert chosen == {"a": options["a"][0], "b": options["b"][3]}


@pytest.mark.parametrize(("budget", "strengths"), [("150KB", {"0", "0.1"}), ("0.0018", {"0"})])
@pytest.mark.robustness
def test_a_network_within_its_budget_and_the_flags_that_repeat_it(resnet, tmp_path, capsys, budget, strengths):
    quantize(resnet, tmp_path, *UNTRAINED, "--budget", budget, "--g", *strengths)
    best = tmp_path / "Ternary_best_acc.pt"
    out = capsys.readouterr().out
    network = read_network(best).network().eval()
    if budget == "150KB":
        assert 120_000 < pack(network, tmp_path / "p.safetensors").file_bytes < 150_000 + 2_000  # names and the like
    else:
        size = read(best)["image_size"]
        assert 0.0015 < rulers.count(network, size)["challenge"].score(TASKS["CIFAR-100"]) <= 0.0018
    (flags,) = re.findall(r"--bits .*", out)
    assert set(re.findall(r"=(\S+)", flags.partition("--g")[2])) <= strengths
    before = {run.name for run in runs(tmp_path)}
    quantize(resnet, tmp_path, *UNTRAINED, *flags.split())
    assert "finished before" in capsys.readouterr().out  # it is the same run
    assert {run.name for run in runs(tmp_path)} == before


def test_layers_with_a_g_of_their_own(resnet, tmp_path, capsys):
    quantize(resnet, tmp_path, *UNTRAINED, "--g", "0.1", "layer3.*=0", "layer3.2.*=0.2", "0")
    both = [json.loads((run / "log.jsonl").read_text())["layers"] for run in runs(tmp_path)]
    assert [facts["layer1.0.conv1.weight"]["lambda"] > 0 for facts in both] == [False, True]  # g 0, g 0.1
    for facts in both:
        assert facts["layer3.0.conv1.weight"]["lambda"] == 0 < facts["layer3.2.conv1.weight"]["lambda"]
    assert re.search(r"layer3\.2\.conv1\.weight .* 0\.2\n", capsys.readouterr().out)
    assert "no chosen layer's name matches 'layer9'" in refusal(quantize, resnet, tmp_path, "--g", "layer9=0.1")


def test_a_budget_that_cannot_be_held_is_refused(resnet, tmp_path):
    said = refusal(quantize, resnet, tmp_path, *UNTRAINED, "--budget", "10KB")
    assert re.search(r"two bits a layer take \d+,\d+ bytes, more than 10,000 bytes", said)
    for flags in (["--bits", "4"], ["--g", "layer1.*=0.1"]):
        assert "--budget chooses bits and g" in refusal(quantize, resnet, tmp_path, "--budget", "1MB", *flags)


@pytest.mark.parametrize(
    ("text", "budget"), [("130KB", (130e3, "bytes")), ("4.3mb", (4.3e6, "bytes")), ("5000", (5000, "bytes")),
                         ("0.004", (0.004, "score")), ("4e-3", (0.004, "score"))],
)  # fmt: skip
def test_budgets_are_bytes_or_scores(text, budget):
    assert parser().parse_args(["--budget", text]).budget == budget

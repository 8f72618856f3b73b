"""No network fools the rulers: writes through views, shared and computed weights, state."""

import copy
import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rulers
from helpers.own_networks import FULL, ONE_BIT, PRODUCTS, Net, drawn, mults, values
from rulers.challenge import count
from rulers.improved import count as count_improved


def test_the_example_of_the_library_call():
    assert doctest.testmod(rulers) == (0, 7)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------ writes and views


def branches(write) -> Net:
    """Two convolutions write into one tensor, which a third one reads."""

    def forward(net, x):
        y = x.new_zeros(1, 16, 16, 16)
        write(y, net.a(x), net.b(x))
        return net.o(F.relu(net.c(y)).mean((2, 3)))

    same = {"padding": "same"}
    return Net(forward, a=nn.Conv2d(3, 8, 3, **same), b=nn.Conv2d(3, 8, 5, **same), c=nn.Conv2d(16, 32, 3, **same),
               o=nn.Linear(32, 10))  # fmt: skip


def sliced(y, a, b):
    y[:, :8] = a
    y[:, 8:] = b


def copied(y, a, b):
    y.narrow(1, 0, 8).copy_(a)
    y.select(0, 0)[8:].copy_(b[0])


def added(y, a, b):
    first, second = y.split(8, dim=1)
    first += a
    second.add_(b)


def put(y, a, b):
    torch.cat([a, b], dim=1, out=y)


def scattered(y, a, b):
    y[:, torch.arange(8)] = a
    y.index_copy_(1, torch.arange(8, 16), b)


@pytest.mark.parametrize("write", [sliced, copied, added, put])
def test_writes_through_views_are_seen(write):
    tally = count(branches(write), 16, FULL)
    assert mults(tally, *PRODUCTS) == 256 * (27 * 8 + 75 * 8 + 144 * 32) + 320 == 1_388_864
    assert values(tally) == 224 + 608 + 4640 + 330 == 5802
    assert tally.uncounted == []


def test_a_write_without_a_rule_is_listed_and_what_it_writes_is_counted():
    tally = count(branches(scattered), 16, FULL)
    assert values(tally) == 5802 and mults(tally, *PRODUCTS) == 1_388_864
    assert [entry.operation for entry in tally.uncounted] == ["index_copy"]


def half_dead(write) -> Net:
    """Two filters of `a` are zero, but a write may fill their channels before `b` reads them."""
    a, b, s = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 3, bias=False), nn.Conv2d(3, 4, 1, bias=False)
    a.weight.data[[1, 5]] = 0
    return Net(lambda net, x: net.b(write(net.a(x), net.s(x))), a=a, b=b, s=s)


def through_a_slice(y, s):
    y[:, :4] += s
    return y


def through_narrow(y, s):
    y.narrow(1, 0, 4).add_(s)
    return y


def through_an_earlier_view(y, s):
    view = y.view(1, 8, 64)[:, :4]
    _ = y + 1
    view.add_(s.flatten(2))
    return y


def through_out(y, s):
    torch.add(y[:, :4], s, out=y[:, :4])
    return y


def through_the_whole(y, s):
    before = y.detach()
    y.add_(torch.cat([s, s], dim=1))
    return before


@pytest.mark.parametrize(
    "write", [through_a_slice, through_narrow, through_an_earlier_view, through_out, through_the_whole]
)
def test_dead_channels_live_again_where_something_is_written_over_them(write):
    found = {line.name: line for group in count(half_dead(write), 8, ONE_BIT).groups for line in group.lines}
    assert found["b"].mults == 288 * 36
    assert [found[name].bits for name in "abs"] == [216, 288, 12]  # stored whole, dense at one bit a value


def test_dead_channels_go_where_nothing_is_written():
    found = {line.name: line for group in count(half_dead(lambda y, s: y), 8, ONE_BIT).groups for line in group.lines}
    assert found["b"].mults == 216 * 36 and [found[name].bits for name in "ab"] == [162, 216]


# ----------------------------------------------------------------------------------------- shared and computed


def test_one_module_under_two_names_counts_twice_and_is_stored_once():
    lin, prelu = nn.Linear(12, 12), nn.PReLU()
    tally = count(nn.Sequential(nn.Flatten(), lin, nn.ReLU(), lin), (3, 2, 2), FULL)
    assert (values(tally), mults(tally, *PRODUCTS), tally.numel, tally.params) == (156, 288, 156, 156)
    tally = count(nn.Sequential(prelu, nn.Sigmoid(), prelu), (3, 2, 2), FULL)
    assert (values(tally), mults(tally)) == (1, 12 + 24 + 12)


def test_tied_weights_are_stored_once_whatever_their_shape():
    net = Net(lambda net, x: net.decode(torch.relu(net.encode(x))), encode=nn.Linear(6, 4, bias=False),
              decode=nn.Linear(4, 6, bias=False))  # fmt: skip
    net.decode.weight = nn.Parameter(net.encode.weight.data.t())
    tally = count(net, (6,), FULL)
    assert (values(tally), mults(tally, *PRODUCTS)) == (24, 48)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_parameter_in_pieces(dim):
    def forward(net, x):
        a, b, c = net.w.chunk(3, dim)
        return F.conv2d(x, a), F.conv2d(x, b), F.conv2d(x, c)

    w = drawn(9, 4, 1, 1) if dim == 0 else drawn(3, 12, 1, 1)
    tally = count(Net(forward, w=w), (4, 5, 5), FULL)
    assert (values(tally), tally.numel, mults(tally)) == (36, 36, 36 * 25)


def test_overlapping_pieces_of_a_parameter_are_stored_once():
    net = Net(
        lambda net, x: F.conv2d(x, net.w[:4]) + F.conv2d(x, net.w[2:6]) + F.conv2d(x, net.w[1:5]), w=drawn(8, 3, 1, 1)
    )
    assert values(count(net, 4, FULL)) == 18


def test_parameters_that_share_one_flat_storage_are_all_stored():
    flat = torch.randn(36 + 4)
    conv = nn.Conv2d(1, 4, 3)
    conv.weight, conv.bias = nn.Parameter(flat[:36].view(4, 1, 3, 3)), nn.Parameter(flat[36:])
    assert values(count(nn.Sequential(conv, nn.BatchNorm2d(4)), (1, 5, 5), FULL)) == 40


FACTORS = {
    "an embedding of all positions": (
        lambda net, x: x + net.table(torch.arange(64)), {"table": nn.Embedding(64, 32)}, (64, 32), 2048),
    "ones": (lambda net, x: x * (net.w * torch.ones(4, 1)), {"w": drawn(4, 8)}, (4, 8), 32),
    "ones like the input": (lambda net, x: x * (net.w * torch.ones_like(x)), {"w": drawn(4, 8)}, (4, 8), 32),
    "a mask of the code": (
        lambda net, x: F.conv2d(x, net.w * torch.ones(3, 3).tril()),
        {"w": drawn(4, 3, 3, 3)}, (3, 5, 5), 72 + 108 / 32),
    "a mask of its own": (
        lambda net, x: F.conv2d(x, net.w * net.mask),
        {"w": drawn(4, 3, 3, 3), "mask": torch.ones(3, 3).tril()}, (3, 5, 5), 72 + 108 / 32),
    "an expanded view": (
        lambda net, x: net.c(x) * net.w.view(1, 4, 1, 1).expand_as(x),
        {"c": nn.Conv2d(4, 4, 1, bias=False), "w": drawn(4)}, (4, 8, 8), 20),
    "a repeated row": (lambda net, x: x + net.w.repeat(1, 8, 1), {"w": drawn(1, 6)}, (8, 6), 6),
    "rows of a table": (
        lambda net, x: x + net.table[net.index].permute(2, 0, 1),
        {"table": drawn(9, 16), "index": torch.arange(25).view(5, 5) % 9}, (16, 5, 5), 144 + 25 * 4 / 32),
    "rows that the code picks": (
        lambda net, x: x + net.table[torch.arange(25).view(5, 5) % 9].permute(2, 0, 1),
        {"table": drawn(9, 16)}, (16, 5, 5), 144),
    "few rows of a table": (lambda net, x: x + net.table[torch.arange(3)], {"table": drawn(100, 4)}, (3, 4), 12),
    "a code book": (  # 4 values, and 2 bits for each of 108 weights
        lambda net, x: F.conv2d(x, net.book[net.codes].view(4, 3, 3, 3)),
        {"book": drawn(4), "codes": torch.arange(108) % 4}, (3, 5, 5), 4 + 108 * 2 / 32),
    "whole numbers and a scale": (
        lambda net, x: F.conv2d(x, net.w.float() * net.scale),
        {"w": (torch.arange(108) % 15 - 7).to(torch.int8).view(4, 3, 3, 3), "scale": drawn(4, 1, 1, 1)},
        (3, 5, 5), 4 + 108 * 4 / 32),
    "a weight and its mirror image": (
        lambda net, x: F.conv2d(x, net.w) + F.conv2d(x, net.w.flip(3)), {"w": drawn(4, 3, 3, 3)}, (3, 5, 5), 108),
    "a buffer that is written": (
        lambda net, x: x * net.buffer.mul_(2), {"buffer": torch.randn(3, 1, 1)}, (3, 5, 5), 3),
    "a table made by writes": (
        lambda net, x: x + written_table(net.w), {"w": drawn(8)}, (4, 8), 8),
}  # fmt: skip


def written_table(w):
    table = torch.zeros(4, 8)
    table[:, 0::2] = w[:4].sin()
    table[:, 1::2] = w[4:].cos()
    return table


@pytest.mark.parametrize("case", FACTORS)
def test_factors_that_forward_makes_keep_their_stored_values(case):
    forward, members, shape, wanted = FACTORS[case]
    net = Net(forward, **copy.deepcopy(members))
    before = copy.deepcopy(net.state_dict())
    tally = count(net, shape, FULL)
    assert values(tally) == wanted
    assert tally.uncounted == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_computed_weight_used_twice_is_stored_once():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 8, 3, padding=1))
    stem = nn.Conv2d(3, 16, 3, padding=1)
    net = Net(lambda net, x: (net.conv(net.stem(x)), net.conv(F.avg_pool2d(net.stem(x), 2))), conv=conv, stem=stem)
    assert values(count(net, 8, FULL)) == 1152 + 8 + 432 + 16
    old = Net(lambda net, x: net.conv(x), conv=nn.utils.weight_norm(nn.Conv2d(3, 8, 3)))
    assert values(count(old, 8, FULL)) == 216 + 8


@pytest.mark.parametrize(
    ("forward", "shape", "wanted"),
    [
        (lambda net, x: net.lin(x.permute(0, 2, 3, 1)), (16, 8, 8), (24_576, 408)),
        (lambda net, x: net.lin.weight @ x, (16, 5), (16 * 24 * 5, 384)),
        (lambda net, x: torch.einsum("bchw,oc->bohw", x, net.lin.weight), (16, 8, 8), (24_576, 384)),
        (lambda net, x: torch.einsum("oc,bchw->bhwo", net.lin.weight, x), (16, 8, 8), (24_576, 384)),
        (lambda net, x: torch.baddbmm(net.lin.bias, x, net.lin.weight.t()[None]), (3, 16), (16 * 24 * 3, 408)),
        (lambda net, x: net.lin.weight @ x.flatten(), (16,), (384, 384)),
        (
            lambda net, x: torch.einsum("bgi,goi->bgo", x.view(1, 2, 8), net.lin.weight.view(2, 24, 8)),
            (16,),
            (384, 384),
        ),
        (lambda net, x: torch.matmul(x[:, None], net.lin.weight.t().expand(5, 16, 24)), (3, 16), (16 * 24 * 15, 384)),
    ],
)
def test_linear_layers_by_other_names(forward, shape, wanted):
    tally = count(Net(forward, lin=nn.Linear(16, 24)), shape, FULL)
    assert (mults(tally), values(tally)) == wanted
    assert tally.uncounted == []


def test_issue_of_linear_layers_after_a_convolution():
    net = Net(lambda net, x: net.lin(net.conv(x).permute(0, 2, 3, 1)), conv=nn.Conv2d(3, 16, 1), lin=nn.Linear(16, 24))
    tally = count(net, 8, FULL)
    assert (mults(tally), values(tally)) == (24_576 + 48 * 64, 408 + 64) and values(tally) == 472


def test_biases_of_a_shared_weight_are_each_stored():
    net = Net(
        lambda net, x: F.conv2d(F.conv2d(x, net.w, net.a), net.w, net.b), w=drawn(3, 3, 1, 1), a=drawn(3), b=drawn(3)
    )
    assert values(count(net, 5, FULL)) == 9 + 6


# ------------------------------------------------------------------------------------------------------ state


class Spiking(nn.Module):
    """Keeps its potential, a list and a counter from call to call."""

    def __init__(self):
        super().__init__()
        self.conv, self.v, self.past, self.calls, self.extra = nn.Conv2d(3, 4, 3), None, [], {"n": 0}, Net(None)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        x = self.conv(x)
        self.v = x if self.v is None else self.v * 0.5 + x
        self.past.append(self.v)
        self.calls["n"] += 1
        self.extra.seen = x
        self.mean.lerp_(x.mean((0, 2, 3)), 0.1)
        if self.calls["n"] > 1:
            raise RuntimeError("called twice")
        return self.v


def test_state_between_calls_is_as_it_was():
    net = Spiking().train()
    attributes = dict(vars(net))
    first, second = count(net, 5, FULL), count_improved(net, 5, FULL)
    assert first.groups == second.groups == count(net, 5, FULL).groups
    assert mults(first, "convolutions") == 27 * 36
    assert vars(net) == attributes and net.past == [] and net.calls == {"n": 0} and net.v is None
    assert net.training and not hasattr(net.extra, "seen") and torch.equal(net.mean, torch.zeros(4))


def test_a_failure_leaves_the_network_as_it_was():
    net = Spiking()
    net.calls["n"] = 1
    before = {name: (tensor, tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()}
    with pytest.raises(RuntimeError, match="called twice"):
        count(net, 5, FULL)
    assert net.v is None and net.past == [] and net.training and net.conv.weight.device.type == "cpu"
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1]) and tensor.dtype is torch.float32

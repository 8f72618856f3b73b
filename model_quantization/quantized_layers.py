"""The quantized state of a network: full-precision weights, centroids and assignments of its quantized layers.

All layers lie one behind the other in flat buffers, each padded with zeros to whole rows of ROW weights. A step is
then a few dozen tensor operations over long stretches of rows, however many layers there are, and needs no
copies between the optimizer's and the network's tensors: the network's parameters are views into `quantized`,
their gradients views into `gradient`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_quantization import ec2t
from model_quantization.ec2t import Extent

AUTO = "auto"  # steps of least squared error, in the place of s
MOST_COMPARED = 7  # levels a side up to which a weight is compared with each edge, which is faster than other ways
ROW = 256  # weights
MARGIN = 1e-3  # of a step, far more than a weight in steps is rounded by
TINY, FAR = 1e-300, 1e300  # stand for 0 and for infinity
CHUNK = 512  # rows that a CPU works on at a time: they stay in its cache; a GPU takes all in one launch


class QuantizedLayers:
    """All quantized layers of a network (or, with `prune`, all pruned ones), and the steps of EC2T on them.

    `layers` names their weights, ternary ones, or tells the bits of each, 2 to 8, by its name; `g` is that of all
    layers, or of each by its name.

    Attributes (R rows, L layers; float32 unless said otherwise):
        weights: `[R, ROW]` full-precision weights w, trained.
        assignment: int8 `[R, ROW]`, the level of each weight, from -n to n.
        quantized: `[R, ROW]`, what the network computes with; of the parameters' dtype.
        gradient: `[R, ROW]`, the loss's gradient at `quantized`, accumulated by backward.
        lam: float64 `[L]`, lambda of the last assignment.
        centroids: `[2, L]`, the steps w_p and w_n, which are the centroids of ternary layers; both positive.
        frozen: whether the assignment stays as it is.
        keep_zeros: whether weights that are zero, a pruned network's, stay zero.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str] | Mapping[str, int],
        s: float | str,
        g: float | Mapping[str, float],
        sustain: float = 0.0,
        prune: bool = False,
    ):
        parameters = dict(network.named_parameters(remove_duplicate=False))
        self.bits = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, 2)
        self.names = list(self.bits)
        self.parameters = [parameters[name] for name in self.names]
        self.prune, self.keep_zeros, self.frozen = prune, False, False
        device, dtype = self.parameters[0].device, self.parameters[0].dtype
        sizes = [p.numel() for p in self.parameters]
        rows = [-(-size // ROW) for size in sizes]
        levels = [ec2t.levels_of(bits) for bits in self.bits.values()]
        self.levels, self.most = torch.tensor(levels, dtype=torch.float64, device=device), max(levels)
        self.numel = torch.tensor(sizes, dtype=torch.float64, device=device)
        of_each = [g[name] for name in self.names] if isinstance(g, Mapping) else [g] * len(self.names)
        self.strength = torch.tensor(of_each, dtype=torch.float64, device=device)
        self.strength *= ec2t.layer_factor(self.numel, sustain)

        self.quantized = torch.zeros(sum(rows), ROW, dtype=dtype, device=device)
        self.gradient = torch.zeros_like(self.quantized)
        self.assignment = torch.zeros(sum(rows), ROW, dtype=torch.int8, device=device)
        self._rows = [slice(sum(rows[:i]), sum(rows[: i + 1])) for i in range(len(rows))]
        for i, parameter in enumerate(self.parameters):
            view = self.view(self.quantized, i)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.view(self.gradient, i)  # backward adds to it
        self._gradients = [parameter.grad for parameter in self.parameters]
        self.weights = nn.Parameter(self.quantized.float().clone())
        self.chunk = CHUNK if device.type == "cpu" else len(self.weights)
        self.weights.grad = self.gradient.float()  # the same memory for float32 parameters
        counts, total = torch.tensor(rows, device=device), sum(rows)
        self._layer_of_row = torch.arange(len(rows), device=device).repeat_interleave(counts, output_size=total)
        # rows of each layer, filled up with the index of a row of zeros behind the last
        column, first = torch.arange(max(rows), device=device), counts.cumsum(0) - counts
        self._rows_of_layer = torch.where(column < counts[:, None], first[:, None] + column, total)

        self._any_ternary, self._is_ternary = 1 in levels, self._per_row(self.levels == 1) == 1
        self._kept_extent: Extent | None = None
        self.lam = torch.zeros_like(self.numel)
        steps = self._least_squares_steps() if s == AUTO else ec2t.initial_steps(self.extent(), float(s), self.levels)
        self.centroids = nn.Parameter(steps.float())
        self.centroids.grad = torch.zeros_like(self.centroids)
        self.assign()

    def _least_squares_steps(self) -> Tensor:
        sides = [[side[side > 0] for side in (w, -w)] for w in (self.weights.detach()[rows] for rows in self._rows)]
        steps = [[ec2t.least_squares_step(m, int(n)) for m in two] for two, n in zip(sides, self.levels, strict=True)]
        return torch.stack([torch.stack(side) for side in zip(*steps, strict=True)])

    def compile(self) -> None:
        """Compile the two passes of a step: their operations fuse, and need no chunks to stay in the cache."""
        self.chunk = len(self.weights)
        for method in ("assign", "scale_gradients"):
            setattr(self, method, torch.compile(getattr(self, method)))

    def view(self, buffer: Tensor, i: int) -> Tensor:
        """Layer `i` of a flat buffer, in the shape and memory layout of its parameter."""
        shape = self.parameters[i].shape
        return buffer.view(-1).as_strided(shape, self.parameters[i].stride(), ROW * self._rows[i].start)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Take over gradients that are not in the buffer, as after `zero_grad` of torch's or with none at all."""
        for i, (parameter, kept) in enumerate(zip(self.parameters, self._gradients, strict=True)):
            if parameter.grad is not kept:
                view = self.view(self.gradient, i)
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                parameter.grad = kept

    @torch.no_grad()
    def assign(self) -> None:
        """Bound the steps, assign every weight again (unless frozen), rebuild `quantized`."""
        extent = self._kept_extent or self.extent()
        self._kept_extent = extent if self.frozen and not self.prune else None  # frozen weights do not move
        steps = ec2t.bounded_steps(self.centroids.double(), extent, self.levels)
        self.centroids.copy_(steps)
        steps = torch.where(self.centroids > 0, steps, 0.0)  # a step may be too small for float32: no levels there
        row_w_p, row_w_n = map(self._per_row, steps)
        if self.frozen:
            for rows in self._chunks():
                plus = self.assignment[rows].clamp(min=0).float()
                self._rebuild(rows, plus, plus - self.assignment[rows], row_w_p, row_w_n)
        else:
            sizes = self._sizes(steps)
            edges, self.lam = ec2t.thresholds(steps, sizes, extent, self.strength, self.levels)
            for rows, plus, minus in self._assigned(steps, edges):
                self.assignment[rows] = plus - minus
                self._rebuild(rows, plus, minus, row_w_p, row_w_n)

    def _rebuild(self, rows: slice, plus: Tensor, minus: Tensor, w_p: Tensor, w_n: Tensor) -> None:
        """Set `quantized` where the assignment is k > 0 (`plus` is k) and where it is -k < 0 (`minus` is k)."""
        if self.prune:
            self.quantized[rows] = self.weights[rows] * (plus + minus)
        else:
            torch.addcmul(plus * w_p[rows], minus, -w_n[rows], out=self.quantized[rows])

    @torch.no_grad()
    def scale_gradients(self) -> None:
        """Turn the gradient at q into the gradients of the centroids and of the full-precision weights.

        dL/dw_p is the sum of a * g_q over a > 0, dL/dw_n that over a < 0, as q = a * w_n there. Weights of ternary
        layers take g_q times w_p, w_n or 1; those of others, and pruned ones, take it as it is. Centroids of pruned
        layers get none.
        """
        assert self.weights.grad is not None and self.centroids.grad is not None
        if self.prune:
            self.weights.grad.copy_(self.gradient)
        else:
            self._scale_gradients()
        if self.keep_zeros:
            for rows in self._chunks():
                self.weights.grad[rows] *= self.weights[rows] != 0

    def _scale_gradients(self) -> None:
        assert self.weights.grad is not None and self.centroids.grad is not None
        signed, unsigned = self._row_vector(), self._row_vector()
        for rows in self._chunks():
            gradient, assignment = self.gradient[rows].float(), self.assignment[rows].float()
            assigned = assignment.abs()
            signed[rows] = torch.linalg.vecdot(assignment, gradient)
            unsigned[rows] = torch.linalg.vecdot(assigned, gradient)
            if self._any_ternary:
                scale = self.quantized[rows].abs().add_(1 - assigned)  # w_p, w_n or 1
                if self.most > 1:
                    scale = torch.where(self._is_ternary[rows], scale, 1.0)
                torch.mul(gradient, scale, out=self.weights.grad[rows])
            else:
                self.weights.grad[rows] = gradient
        signed, unsigned = self._per_layer(signed).sum(1), self._per_layer(unsigned).sum(1)
        self.centroids.grad.copy_(torch.stack([unsigned + signed, signed - unsigned]) / 2)

    @torch.no_grad()
    def extent(self) -> Extent:
        """Extent of every layer's weights."""
        high, low, total, square = (self._row_vector() for _ in range(4))
        for rows in self._chunks():
            weights = self.weights[rows]
            high[rows], low[rows] = weights.amax(1), weights.amin(1)
            total[rows], square[rows] = weights.sum(1), torch.linalg.vecdot(weights, weights)
        mean = self._per_layer(total).sum(1) / self.numel
        variance = (self._per_layer(square).sum(1) - self.numel * mean**2) / (self.numel - 1).clamp(min=1)
        return Extent(
            self._per_layer(high).amax(1), self._per_layer(low).amin(1), variance.clamp(min=0).sqrt(), self.numel
        )

    def _assigned(self, steps: Tensor, edges: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each stretch of rows: how many of its layer's `edges` `[2, L, N]` w exceeds, and how many -w does."""
        if self.most <= MOST_COMPARED:
            yield from self._compared(edges)
            return
        below = torch.nextafter(-edges[1].float(), torch.full((), -torch.inf, device=edges.device)).flip(1)
        both = torch.cat([below, edges[0].float()], 1)  # w < -t and w > t, both as "exceeds"
        looks_up = steps.device.type == "cpu" and not torch.compiler.is_compiling()
        for rows, level in self._looked_up(steps, both) if looks_up else self._searched(both):
            yield rows, level.clamp(min=0), (-level).clamp_(min=0)

    def _compared(self, edges: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """As `_assigned`, by comparing each weight with every edge."""
        above, below = ([self._per_row(edge) for edge in side.unbind(1)] for side in (edges[0], -edges[1]))
        for rows in self._chunks():
            weights = self.weights[rows]
            # float results: many times faster than booleans
            plus = torch.gt(weights, above[0][rows], out=torch.empty_like(weights))
            minus = torch.lt(weights, below[0][rows], out=torch.empty_like(weights))
            exceeds = torch.empty_like(weights)
            for higher, lower in zip(above[1:], below[1:], strict=True):
                plus += torch.gt(weights, higher[rows], out=exceeds)
                minus += torch.lt(weights, lower[rows], out=exceeds)
            yield rows, plus, minus

    def _searched(self, edges: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The level of each weight, layer by layer, by binary search among the ascending `edges` `[L, 2N]`."""
        for i, rows in enumerate(self._rows):
            yield rows, torch.bucketize(self.weights[rows], edges[i], out_int32=True).sub_(self.most).float()

    def _looked_up(self, steps: Tensor, edges: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same by tables of what lies between two neighbours among the centroids, most often one edge.

        Faster than a search. Which centroids are a weight's neighbours is rounded, so that what lies a thousandth of a
        step beyond them belongs to their tables too.
        """
        most, edges = self.most, edges.double()
        left = torch.arange(-most, most + 1, device=steps.device)  # the lower centroid
        of_sides = self._in_steps(steps).double().clamp(min=TINY).reciprocal()[..., None]
        step = torch.where(left >= 0, of_sides[0], of_sides[1])
        first = torch.where(left > -self.levels[:, None], (left - MARGIN) * step, -FAR)
        last = torch.where(left < self.levels[:, None], (left + 1 + MARGIN) * step, FAR)
        at, end = torch.searchsorted(edges, first), torch.searchsorted(edges, last, right=True)
        base = (at - most).float().flatten()
        tables: list[tuple[Tensor, Tensor]] = []
        while (there := at < end).any():
            edge = edges.gather(1, at.clamp(max=2 * most - 1))
            beyond = torch.where(there, torch.searchsorted(edges, edge, right=True), at)
            tables.append((torch.where(there, edge, torch.inf).float().flatten(), (beyond - at).float().flatten()))
            at = beyond
        place = (self._layer_of_row * len(left) + most).int()[:, None]
        for rows, scaled in self._scaled(steps):
            cell = scaled.floor_().int().add_(place[rows]).flatten()
            weights, level = self.weights[rows].flatten(), base.index_select(0, cell)
            for edge, more in tables:
                exceeds = torch.gt(weights, edge.index_select(0, cell), out=torch.empty_like(weights))
                level.addcmul_(exceeds, more.index_select(0, cell))
            yield rows, level.view(scaled.shape)

    def _in_steps(self, steps: Tensor) -> Tensor:
        """What weights are multiplied by to be in units of their layer's steps, float32 `[2, L]`; 0 for a step of 0."""
        return torch.where(steps > 0, 1 / steps, 0.0).clamp(max=torch.finfo(torch.float32).max).float()

    def _scaled(self, steps: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """For each stretch of rows: its weights in units of their layer's steps, within -n and n."""
        w_p, w_n, n = (self._per_row(each) for each in (*self._in_steps(steps), self.levels))
        for rows in self._chunks():
            weights = self.weights[rows]
            scaled = (weights.clamp(min=0) * w_p[rows]).addcmul_(weights.clamp(max=0), w_n[rows])
            yield rows, scaled.clamp_(-n[rows], n[rows]).nan_to_num_()  # NaN: training has diverged

    def _sizes(self, steps: Tensor) -> Tensor:
        """The number of weights nearest to each centroid of either side, `[2, L, N]`."""
        if self.most == 1:
            n_p, n_n = self._row_vector(), self._row_vector()
            for rows, plus, minus in self._assigned(steps, ec2t.nearest_edges(steps, self.levels, 1)):
                n_p[rows], n_n[rows] = plus.sum(1), minus.sum(1)
            return torch.stack([self._per_layer(n).sum(1) for n in (n_p, n_n)])[..., None]
        width = 2 * self.most + 1
        counts = torch.zeros(len(self.numel) * width, dtype=torch.int64, device=steps.device)
        place = (self._layer_of_row * width + self.most).float()[:, None]
        for rows, scaled in self._scaled(steps):
            _count(scaled.round_().add_(place[rows]).int().flatten(), counts)
        sides = counts.view(-1, width).double()
        return torch.stack([sides[:, self.most + 1 :], sides[:, : self.most].flip(1)])

    def _chunks(self) -> Iterator[slice]:
        return (slice(start, start + self.chunk) for start in range(0, len(self.weights), self.chunk))

    def _row_vector(self) -> Tensor:
        return torch.empty(len(self.weights), device=self.weights.device)

    def _per_row(self, per_layer: Tensor) -> Tensor:
        """`[L]` to float32 `[R, 1]`: each row gets its layer's number."""
        return per_layer.float()[self._layer_of_row][:, None]

    def _per_layer(self, per_row: Tensor) -> Tensor:
        """`[R]` to float64 `[L, most rows of a layer]`, filled up with zeros: sums in a fixed order."""
        return F.pad(per_row.double(), (0, 1))[self._rows_of_layer]

    def cluster_sizes(self) -> Tensor:
        """The number of weights assigned to each level of either side, `[2, L, N]`."""
        counts = [
            torch.cat([(self.assignment[r] == sign * k).sum(1) for r in self._chunks()])
            for sign in (1, -1)
            for k in range(1, self.most + 1)
        ]
        sums = torch.stack([self._per_layer(count).sum(1) for count in counts], 1)
        return sums.view(len(self.numel), 2, self.most).transpose(0, 1)

    def entropy(self) -> float:
        """First-order entropy of the assignments, in bits a weight over all layers."""
        return ((ec2t.entropy(self.cluster_sizes(), self.numel) * self.numel).sum() / self.numel.sum()).item()

    def facts(self) -> dict[str, dict[str, Any]]:
        """Of each layer by its name: weights below zero, of zero and above, the steps w_p and w_n, and lambda.

        Lambda is None where the assignment is frozen: nothing constrains it.
        """
        sizes, numel = self.cluster_sizes().sum(2).long().tolist(), self.numel.long().tolist()
        lam = [None] * len(numel) if self.frozen else self.lam.tolist()
        columns = zip(self.names, *sizes, numel, *self.centroids.tolist(), lam, strict=True)
        return {
            name: {"clusters": [n, all_ - n - p, p], "centroids": [w_p, w_n], "lambda": of_layer}
            for name, p, n, all_, w_p, w_n, of_layer in columns
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything that training changes."""
        state = {"weights": self.weights, "assignment": self.assignment, "centroids": self.centroids}
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a `state_dict` of the same network and names; ValueError where shapes are of another one's."""
        for name in self.state_dict():
            own, other = getattr(self, name), state[name]
            if own.shape != other.shape:
                raise ValueError(f"{name} is {list(other.shape)} where {list(own.shape)} is needed")
            own.copy_(other)
        self._kept_extent = None

    def by_layer(self) -> dict[str, dict[str, Tensor]]:
        """Assignments (int8, in the parameters' shapes) and centroids (w_p, w_n) by layer name, on the CPU."""
        return {
            "assignments": {n: self.view(self.assignment, i).cpu().contiguous() for i, n in enumerate(self.names)},
            "centroids": {n: self.centroids.detach()[:, i].cpu().clone() for i, n in enumerate(self.names)},
        }


def _count(places: Tensor, counts: Tensor) -> None:
    """Add to `counts` how often each of its indices is among `places`, int32."""
    if counts.device.type == "cpu":
        counts += torch.bincount(places, minlength=len(counts))
    else:  # there, bincount waits for the device
        counts.scatter_add_(0, places.long(), torch.ones_like(places, dtype=counts.dtype))

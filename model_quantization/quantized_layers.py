"""The ternary state of a network: full-precision weights, centroids and assignments of all its ternarized layers.

All layers lie one behind the other in flat buffers, each padded with zeros to whole rows of ROW weights. A step is
then a few dozen tensor operations over long stretches of rows, however many layers there are, and needs no
copies between the optimizer's and the network's tensors: the network's parameters are views into `quantized`,
their gradients views into `gradient`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_quantization import ec2t
from model_quantization.ec2t import Extent

ROW = 256  # weights
CHUNK = 1024  # rows that a CPU works on at a time: they stay in its cache; a GPU takes all in one launch


class TernaryLayers:
    """All ternarized layers of a network (or, with `prune`, all pruned ones), and the steps of EC2T on them.

    Attributes (R rows, L layers; float32 unless said otherwise):
        weights: `[R, ROW]` full-precision weights w, trained.
        assignment: int8 `[R, ROW]`, -1, 0 or +1.
        quantized: `[R, ROW]`, what the network computes with; of the parameters' dtype.
        gradient: `[R, ROW]`, the loss's gradient at `quantized`, accumulated by backward.
        centroids: `[2, L]`, w_p and w_n, both positive.
        frozen: whether the assignment stays as it is.
    """

    def __init__(
        self, network: nn.Module, names: list[str], s: float, g: float, sustain: float = 0.0, prune: bool = False
    ):
        parameters = dict(network.named_parameters())
        self.names = list(names)
        self.parameters = [parameters[name] for name in names]
        self.prune, self.frozen = prune, False
        device, dtype = self.parameters[0].device, self.parameters[0].dtype
        sizes = [p.numel() for p in self.parameters]
        rows = [-(-size // ROW) for size in sizes]
        self.numel = torch.tensor(sizes, dtype=torch.float64, device=device)
        self.strength = g * ec2t.layer_factor(self.numel, sustain)

        self.quantized = torch.zeros(sum(rows), ROW, dtype=dtype, device=device)
        self.gradient = torch.zeros_like(self.quantized)
        self.assignment = torch.zeros(sum(rows), ROW, dtype=torch.int8, device=device)
        self._starts = [ROW * sum(rows[:i]) for i in range(len(rows))]
        for i, parameter in enumerate(self.parameters):
            view = self.view(self.quantized, i)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.view(self.gradient, i)  # backward adds to it
        self.weights = nn.Parameter(self.quantized.float().clone())
        self.chunk = CHUNK if device.type == "cpu" else len(self.weights)
        self.weights.grad = self.gradient.float()  # the same memory for float32 parameters
        counts, total = torch.tensor(rows, device=device), sum(rows)
        layers = torch.arange(len(rows), device=device)
        self._layer_of_row = layers.repeat_interleave(counts, output_size=total)
        # rows of each layer, filled up with the index of a row of zeros behind the last
        column, first = torch.arange(max(rows), device=device), counts.cumsum(0) - counts
        self._rows_of_layer = torch.where(column < counts[:, None], first[:, None] + column, total)

        centroids = torch.stack(ec2t.initial_centroids(self.extent(), s))
        self.centroids = nn.Parameter(centroids.float())
        self.centroids.grad = torch.zeros_like(self.centroids)
        self.assign()

    def compile(self) -> None:
        """Compile the two passes of a step: their operations fuse, and need no chunks to stay in the cache."""
        self.chunk = len(self.weights)
        self.assign, self.scale_gradients = torch.compile(self.assign), torch.compile(self.scale_gradients)

    def view(self, buffer: Tensor, i: int) -> Tensor:
        """Layer `i` of a flat buffer, in the shape and memory layout of its parameter."""
        shape = self.parameters[i].shape
        return buffer.view(-1).as_strided(shape, self.parameters[i].stride(), self._starts[i])

    @torch.no_grad()
    def assign(self) -> None:
        """Bound the centroids, assign every weight again (unless frozen), rebuild `quantized`."""
        extent = self.extent()
        w_p, w_n = ec2t.bounded_centroids(*self.centroids.double(), extent)
        self.centroids.copy_(torch.stack([w_p, w_n]))
        row_w_p, row_w_n = self._per_row(w_p), self._per_row(w_n)
        if self.frozen:
            for rows in self._chunks():
                plus = self.assignment[rows].clamp(min=0).float()
                self._rebuild(rows, plus, plus - self.assignment[rows], row_w_p, row_w_n)
        else:
            n_p, n_n = self._count_beyond(w_p / 2, w_n / 2)
            t_p, t_n, _ = ec2t.thresholds(w_p, w_n, n_p, n_n, extent, self.strength)
            for rows, plus, minus in self._beyond(t_p, t_n):
                self.assignment[rows] = plus - minus
                self._rebuild(rows, plus, minus, row_w_p, row_w_n)

    def _rebuild(self, rows: slice, plus: Tensor, minus: Tensor, w_p: Tensor, w_n: Tensor) -> None:
        """Set `quantized` where the assignment is +1 (`plus` is 1.0) and where it is -1 (`minus` is 1.0)."""
        if self.prune:
            self.quantized[rows] = self.weights[rows] * (plus + minus)
        else:
            torch.addcmul(plus * w_p[rows], minus, -w_n[rows], out=self.quantized[rows])

    @torch.no_grad()
    def scale_gradients(self) -> None:
        """Turn the gradient at q into the gradients of the centroids and of the full-precision weights.

        dL/dw_p is the sum of g_q over a = +1, dL/dw_n minus the sum over a = -1, as q = -w_n there; g_q times
        w_p, w_n or 1 is the weights' gradient. Pruned weights take g_q as it is, and centroids get none.
        """
        if self.prune:
            self.weights.grad.copy_(self.gradient)
            return
        signed, unsigned = self._row_vector(), self._row_vector()
        for rows in self._chunks():
            gradient, assignment = self.gradient[rows].float(), self.assignment[rows].float()
            assigned = assignment.abs()
            signed[rows] = torch.linalg.vecdot(assignment, gradient)
            unsigned[rows] = torch.linalg.vecdot(assigned, gradient)
            scale = self.quantized[rows].abs().add_(1 - assigned)  # w_p, w_n or 1
            torch.mul(gradient, scale, out=self.weights.grad[rows])
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

    def _beyond(self, t_p: Tensor, t_n: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each chunk of rows: where w > t_p and where w < -t_n, as 1.0 and 0.0."""
        t_p, t_n = self._per_row(t_p), self._per_row(-t_n)
        for rows in self._chunks():
            weights = self.weights[rows]
            plus = torch.gt(weights, t_p[rows], out=torch.empty_like(weights))  # float results: many times faster
            minus = torch.lt(weights, t_n[rows], out=torch.empty_like(weights))
            yield rows, plus, minus

    def _count_beyond(self, t_p: Tensor, t_n: Tensor) -> tuple[Tensor, Tensor]:
        """The number of weights above t_p and below -t_n in each layer, `[L]`."""
        n_p, n_n = self._row_vector(), self._row_vector()
        for rows, plus, minus in self._beyond(t_p, t_n):
            n_p[rows], n_n[rows] = plus.sum(1), minus.sum(1)
        return self._per_layer(n_p).sum(1), self._per_layer(n_n).sum(1)

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

    def cluster_sizes(self) -> tuple[Tensor, Tensor]:
        """The number of weights assigned to w_p and to -w_n in each layer, `[L]`."""
        n_p, n_n = (
            self._per_layer(torch.cat([(self.assignment[r] == sign).sum(1) for r in self._chunks()])).sum(1)
            for sign in (1, -1)
        )
        return n_p, n_n

    def entropy(self) -> float:
        """First-order entropy of the assignments, in bits a weight over all layers."""
        return ((ec2t.entropy(*self.cluster_sizes(), self.numel) * self.numel).sum() / self.numel.sum()).item()

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

    def by_layer(self) -> dict[str, dict[str, Tensor]]:
        """Assignments (int8, in the parameters' shapes) and centroids (w_p, w_n) by layer name, on the CPU."""
        return {
            "assignments": {n: self.view(self.assignment, i).cpu().contiguous() for i, n in enumerate(self.names)},
            "centroids": {n: self.centroids.detach()[:, i].cpu().clone() for i, n in enumerate(self.names)},
        }

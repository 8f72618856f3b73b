"""What every ruler returns: one line a layer or operation, and the sums and the score that follow from them."""

from dataclasses import dataclass, field

MILLION = 1e6


@dataclass(frozen=True)
class Widths:
    """Bit widths that a score assumes: stored values, inputs of multiplications, inputs of additions.

    `act` is the width of activations where that is stated: multiplications count at it then, but for those with
    weights that have more bits. The `published` ruler knows of no such thing.
    """

    value: int = 16
    mul: int = 16
    add: int = 16
    act: int | None = None


@dataclass(frozen=True)
class Task:
    """A task of the MicroNet Challenge: its baseline network's size, and the accuracy to hold."""

    name: str
    classes: int
    base_params: float
    base_ops: float
    correct: int
    images: int

    @property
    def key(self) -> str:
        """The task's name as `--dataset` knows it."""
        return self.name.replace("-", "")

    def is_solved_by(self, dataset: str, classes: int) -> bool:
        """Whether telling `classes` classes of `dataset` apart is this task; ten classes of ImageNet are another."""
        return dataset == self.key and classes == self.classes

    @property
    def threshold_percent(self) -> float:
        return 100 * self.correct / self.images


TASKS = {
    "CIFAR-100": Task("CIFAR-100", 100, 36.5e6, 10.49e9, 8_000, 10_000),
    "ImageNet": Task("ImageNet", 1000, 6.9e6, 1170e6, 37_500, 50_000),
}


def task_of(dataset: str) -> Task:
    """The task that a data set's networks are scored on: its own, else CIFAR-100."""
    return next((task for task in TASKS.values() if task.key == dataset), TASKS["CIFAR-100"])


@dataclass
class Line:
    """One layer: its stored bits, its multiplications and additions, its weights and how many are not zero.

    `shape` says of a layer its kernel, input size and channels. `tree_adds` of the additions run in adder trees, whose
    levels differ in width: `tree_bits` is the sum of their widths. `mult_bits` is the sum of the widths of the
    multiplications where these are not all the stated one.
    """

    name: str
    bits: float = 0.0
    mults: float = 0.0
    adds: float = 0.0
    numel: int = 0
    nonzero: int = 0
    note: str = ""
    shape: str = ""
    tree_adds: float = 0.0
    tree_bits: float = 0.0
    mult_bits: float = 0.0


@dataclass
class Group:
    """Layers of one kind, in the network's order; `mults` and `adds` of the lines are operations, not bits."""

    name: str
    lines: list[Line]

    def total(self, field: str) -> float:
        return sum(getattr(line, field) for line in self.lines)


@dataclass
class Uncounted:
    """An operation that the ruler has no rule for: how often it runs, and in which module."""

    operation: str
    count: int
    place: str


@dataclass
class Tally:
    """The result of one ruler.

    `params` is the number of the network's parameters as that ruler counts them, compressed or not;
    `truncate` says whether a group's scoring parameters are cut to an integer before they are added;
    `uncounted` lists what the totals lack; `by_analogy` has, by operation, the MFLOP of what the rules do not name.
    """

    ruler: str
    widths: Widths
    groups: list[Group]
    params: int
    truncate: bool = False
    uncounted: list[Uncounted] = field(default_factory=list)
    by_analogy: dict[str, float] = field(default_factory=dict)

    def scoring_params(self, group: Group) -> float:
        """Parameters of 32 bit that hold the group's bits."""
        params = group.total("bits") / 32
        return int(params) if self.truncate else params

    def line_mflop(self, line: Line) -> float:
        """Millions of operations on 32 bit inputs that a line's operations count as."""
        add_bits = (line.adds - line.tree_adds) * self.widths.add + line.tree_bits
        mult_bits = line.mults * self.widths.mul if self.widths.act is None else line.mult_bits
        return (mult_bits + add_bits) / 32 / MILLION

    def mflop(self, group: Group) -> float:
        """Millions of operations on 32 bit inputs that the group's operations count as."""
        return sum(map(self.line_mflop, group.lines))

    @property
    def total_scoring_params(self) -> float:
        return sum(self.scoring_params(group) for group in self.groups)

    @property
    def total_mflop(self) -> float:
        return sum(self.mflop(group) for group in self.groups)

    @property
    def numel(self) -> int:
        return sum(int(group.total("numel")) for group in self.groups)

    @property
    def zeros_percent(self) -> float:
        """Share of the counted weights that are zero, in percent."""
        return 100 * (1 - sum(group.total("nonzero") for group in self.groups) / self.numel)

    @property
    def megabytes(self) -> float:
        return self.total_scoring_params * 4 / MILLION

    def score(self, task: Task) -> float:
        """The MicroNet Challenge's score: parameters and operations relative to the task's baseline."""
        return self.total_scoring_params / task.base_params + self.total_mflop * MILLION / task.base_ops

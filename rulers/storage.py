"""How few bits hold a tensor: the storage formats that the rules offer, each with its size.

`b` is the number of bits of a stored value. Every size holds for a tensor seen as a matrix with one row per
output channel; a mask has one bit for each of its elements, zeros included.
"""

from dataclasses import dataclass

from torch import Tensor

from model.levels import grid_of, is_codebook, numbers


@dataclass(frozen=True)
class Code:
    """How a tensor's values are written where few of them are distinct.

    Attributes:
        name: of the symbols, as formats are named.
        levels: distinct values that are not zero.
        symbol: bits a value.
        nonzero: bits a value where a mask says that it is not zero.
        table: values that tell what the symbols stand for.
    """

    name: str
    levels: int
    symbol: int
    nonzero: int
    table: int


@dataclass(frozen=True)
class Matrix:
    """What the size of a tensor depends on; `code` is None unless its values are few."""

    rows: int
    columns: int
    numel: int
    nonzero: int
    code: Code | None = None


TERNARY = Code("signs", 2, 2, 1, 2)

# Bits by the name of the format.
Formats = dict[str, int]


def challenge_formats(matrix: Matrix, b: int) -> Formats:
    """The formats of the MicroNet Challenge's rules.

    A mask says where the values are that are not zero; a ternary tensor needs only the sign of each, and its
    two values. (A mask for either value, as in `published`, is allowed as well, and never smaller.) A tensor on a
    grid of more levels needs its symbols and two steps, one of a codebook its symbols and that.
    """
    formats = {"dense": matrix.numel * b, "mask": matrix.numel + matrix.nonzero * b}
    if code := matrix.code:
        table = code.table * b
        formats[f"mask and {code.name}"] = matrix.numel + matrix.nonzero * code.nonzero + table
        formats[code.name] = matrix.numel * code.symbol + table
    return formats


def improved_formats(matrix: Matrix, b: int) -> Formats:
    """The challenge's formats, compressed sparse row (CSR) and compressed entropy row (CER).

    CSR holds the values row by row, the column of each, and where each row starts and the last one ends. Of a
    ternary tensor it holds signs and two values, of others with few values symbols and a table. CER (Wiedemann et al.,
    "Compact and Computationally Efficient Representation of Deep Neural Networks", arXiv:1805.10692) holds the
    columns sorted by value
    inside a row, so no per-weight value bit is needed: a weight's value follows from the run that it is in. Each
    value that is not zero has run starts of its own.

    Columns and starts have `b` bits each, as in the counts of the EC2T authors (D. Becking, "Finding Storage-
    and Compute-Efficient Convolutional Neural Networks", TU Berlin 2020), or more where `b` do not suffice.
    """
    column = max(b, (matrix.columns - 1).bit_length())
    starts = (matrix.rows + 1) * max(b, matrix.nonzero.bit_length())
    formats = challenge_formats(matrix, b)
    if code := matrix.code:
        table = code.table * b
        formats["CSR"] = matrix.nonzero * (code.nonzero + column) + starts + table
        formats["CER"] = matrix.nonzero * column + max(code.levels, 2) * starts + table
    else:
        formats["CSR"] = matrix.nonzero * (b + column) + starts
    return formats


def code_of(distinct: Tensor | None, numel: int) -> Code | None:
    """The code of a tensor of `numel` values, of which `distinct`, sorted, are not zero; None: too many to tell.

    Ternary values take two symbols bits where zeros have one too, others those of b bits, the least for which
    2**(b - 1) - 1 levels lie on either side of zero; what lies on no grid takes the fewest bits that its values need.
    """
    if distinct is None:
        return None
    levels = len(distinct)
    if int((distinct > 0).sum()) <= 1 and int((distinct < 0).sum()) <= 1:
        return TERNARY
    if found := grid_of(numbers(distinct)):
        bits = found[1].bit_length() + 1
        return Code(f"{bits} bit", levels, bits, bits, 2)
    if not is_codebook(levels + 1, numel):
        return None
    return Code(f"{levels} values", levels, levels.bit_length(), (levels - 1).bit_length(), levels)


def smallest(formats: Formats) -> tuple[str, int]:
    """The format with the fewest bits, and the bits; of equal ones the first."""
    name = min(formats, key=formats.__getitem__)
    return name, formats[name]

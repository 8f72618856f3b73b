"""How few bits hold a tensor: the storage formats that the rules offer, each with its size.

`b` is the number of bits of a stored value. Every size holds for a tensor seen as a matrix with one row per
output channel; a mask has one bit for each of its elements, zeros included.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """What the size of a tensor depends on; `ternary`: its values are zero, one positive and one negative."""

    rows: int
    columns: int
    numel: int
    nonzero: int
    ternary: bool


# Bits by the name of the format.
Formats = dict[str, int]


def challenge_formats(matrix: Matrix, b: int) -> Formats:
    """The formats of the MicroNet Challenge's rules.

    A mask says where the values are that are not zero; a ternary tensor needs only the sign of each, and its
    two values. (A mask for either value, as in `published`, is allowed as well, and never smaller.)
    """
    formats = {"dense": matrix.numel * b, "mask": matrix.numel + matrix.nonzero * b}
    if matrix.ternary:
        formats["mask and signs"] = matrix.numel + matrix.nonzero + 2 * b
    return formats


def improved_formats(matrix: Matrix, b: int) -> Formats:
    """The challenge's formats, compressed sparse row (CSR) and compressed entropy row (CER).

    CSR holds the values row by row, the column of each, and where each row starts and the last one ends. Of a
    ternary tensor it holds signs and two values. CER (Wiedemann et al., "Compact and Computationally
    Efficient Representation of Deep Neural Networks", arXiv:1805.10692) holds the columns sorted by value
    inside a row, so no per-weight value bit is needed: a weight's value follows from the run that it is in. Each
    of the two values has run starts of its own.

    Columns and starts have `b` bits each, as in the counts of the EC2T authors (D. Becking, "Finding Storage-
    and Compute-Efficient Convolutional Neural Networks", TU Berlin 2020), or more where `b` do not suffice.
    """
    column = max(b, (matrix.columns - 1).bit_length())
    starts = (matrix.rows + 1) * max(b, matrix.nonzero.bit_length())
    formats = challenge_formats(matrix, b)
    if matrix.ternary:
        formats["CSR"] = matrix.nonzero * (1 + column) + starts + 2 * b
        formats["CER"] = matrix.nonzero * column + 2 * starts + 2 * b
    else:
        formats["CSR"] = matrix.nonzero * (b + column) + starts
    return formats


def smallest(formats: Formats) -> tuple[str, int]:
    """The format with the fewest bits, and the bits; of equal ones the first."""
    name = min(formats, key=formats.__getitem__)
    return name, formats[name]

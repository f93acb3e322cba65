"""Which elements share memory: exactly, from shapes, strides and addresses.

Both questions ask whether a sum of strides, each times a whole number within bounds, can be equal
to one number. Strides that nest, as those of every tensor that was once allocated, answer at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from flash.wrapped import address

Term = tuple[int, int, int]  # a stride, and the least and the greatest number it is taken
# Of the terms of the smallest strides: their least and greatest sum, what divides the difference
# of any two sums, and whether all that this leaves are sums.
Sums = tuple[int, int, int, bool]
MOST_STEPS = 2000  # of a search that strides of no use to anybody would make long


def overlaps_itself(x: Tensor) -> bool:
    """Two places of x are one element."""
    dims = sorted((st, n) for n, st in zip(x.shape, x.stride(), strict=True) if n > 1)
    extent = 0
    for stride, size in dims:
        if stride <= extent:
            break
        extent += stride * (size - 1)
    else:
        return False
    if torch.compiler.is_compiling():
        return True
    lower: list[Term] = []
    for stride, size in dims:  # the places differ in this one, and in none of those after it
        if reaches(0, [(stride, 1, size - 1), *lower]):
            return True
        lower.append((stride, 1 - size, size - 1))
    return False


def share(x: Tensor, other: Tensor) -> bool:
    """An element of x has a byte of an element of the other; interleaved views need not."""
    here, there = address(x), address(other)
    if not here or not there:  # without memory, or without elements
        return False
    total = there - here
    if total >= _extent(x) if total >= 0 else -total >= _extent(other):
        return False
    size, other_size = x.element_size(), other.element_size()
    terms = [(st * size, 0, n - 1) for n, st in zip(x.shape, x.stride(), strict=True)]
    terms += [
        (st * other_size, 1 - n, 0) for n, st in zip(other.shape, other.stride(), strict=True)
    ]
    if size != other_size or total % size:
        terms.append((1, 1 - other_size, size - 1))
    return reaches(total, terms)


def _extent(x: Tensor) -> int:
    """Bytes from the first to the last element, both counted."""
    last = 1
    for n, stride in zip(x.shape, x.stride(), strict=True):
        last += (n - 1) * stride
    return last * x.element_size()


def reaches(total: int, terms: Iterable[Term]) -> bool:
    """Some choice of numbers within the bounds gives this sum; True if it takes too long to say."""
    joined: dict[int, tuple[int, int]] = {}
    for stride, low, high in terms:
        if stride and (low or high):
            a, b = joined.get(stride, (0, 0))
            joined[stride] = (a + low, b + high)
    ordered = [(stride, *joined[stride]) for stride in sorted(joined)]
    sums: list[Sums] = [(0, 0, 0, True)]
    low = high = divisor = 0
    every = True
    for stride, least, most in ordered:
        joint = math.gcd(divisor, stride)
        # every: no gap between what one multiple of the stride and the next add to the sums so far
        every = every and stride <= high - low + joint and (joint == divisor or not divisor)
        low, high, divisor = low + stride * least, high + stride * most, joint
        sums.append((low, high, divisor, every))
    return _found(total, ordered, sums, len(ordered), [MOST_STEPS])


def _found(total: int, terms: list[Term], sums: list[Sums], count: int, left: list[int]) -> bool:
    """With the first `count` terms; the largest stride leaves few numbers to try."""
    low, high, divisor, every = sums[count]
    if not low <= total <= high or (total - low) % (divisor or 1):
        return False
    if every:
        return True
    stride, least, most = terms[count - 1]
    below, above = sums[count - 1][:2]
    first = max(least, -((above - total) // stride))
    last = min(most, (total - below) // stride)
    for times in range(first, last + 1):
        left[0] -= 1
        if left[0] < 0 or _found(total - times * stride, terms, sums, count - 1, left):
            return True
    return False

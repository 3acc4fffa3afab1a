"""Loops over cells and counts, compiled at their first use and kept for the next process."""

from collections.abc import Callable

from numba import njit


def compiled(function: Callable | None = None, **options: object) -> Callable:
    """Compile a function of arrays and numbers, and keep the result for the next process.

    Where no folder can be written to, every process compiles it anew (seconds). `options` are numba's, as in
    `@compiled(nogil=True)`.
    """
    if function is None:
        return lambda function: compiled(function, **options)
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no place for its cache
        return njit(**options)(function)

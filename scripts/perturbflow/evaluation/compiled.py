"""Loops over sparse cells, compiled at their first use and kept for the next process."""

from collections.abc import Callable

from numba import njit


def compiled(function: Callable) -> Callable:
    """Compile a function of arrays and numbers; where no folder can be written to, every process compiles it anew (seconds)."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # numba finds no place for its cache
        return njit(function)

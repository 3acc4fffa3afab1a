"""The role of every cell in split.json: names by role or, of a large screen, two bits per row of harmonized.h5ad."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.splits.divisions import ROLES

MOST_NAMED = 200_000  # cells: the names of 2,000,000 take 44 MB, and a second wherever the file is read


def stored_roles(names: pd.Index, code: np.ndarray) -> dict[str, Any]:
    """Return the entries of split.json that hold the role of every cell.

    Parameters
    ----------
    names
        Of the cells of harmonized.h5ad, in its order.
    code
        Place of their role in `ROLES`, -1 for none, (cells,).

    Returns
    -------
    `cells`, the sorted names by role; of more than MOST_NAMED cells instead `role_of_row`, (cells,) numbers of two
    bits, packed and written as base64: 0 for none, 1 train, 2 validation, 3 test.
    """
    if len(names) <= MOST_NAMED:
        return {"cells": {role: sorted(names[code == i]) for i, role in enumerate(ROLES)}}
    bits = np.unpackbits((code + 1).astype(np.uint8)[:, None], axis=1)[:, -2:]
    return {"role_of_row": base64.b64encode(np.packbits(bits).tobytes()).decode()}


def roles_of_cells(content: Mapping[str, Any], names: pd.Index) -> np.ndarray:
    """Return the place of every cell's role in `ROLES`, -1 for none, (cells,) int8.

    Parameters
    ----------
    content
        Of split.json.
    names
        Of the cells of harmonized.h5ad, in its order.

    Raises
    ------
    InputError
        If the split is of another screen.
    """
    if "role_of_row" in content:
        packed = np.frombuffer(base64.b64decode(content["role_of_row"]), np.uint8)
        if len(packed) != -(-len(names) // 4):
            raise InputError(
                f"the split {content['name']} divides another screen than this one of {len(names):,} cells. "
                "Run `split` again."
            )
        bits = np.unpackbits(packed)[: 2 * len(names)].reshape(-1, 2)
        return (2 * bits[:, 0] + bits[:, 1]).astype(np.int8) - 1
    code = np.full(len(names), -1, np.int8)
    for i, role in enumerate(ROLES):
        found = names.get_indexer(pd.Index(content["cells"][role]))
        code[found[found >= 0]] = i
    return code

"""The facts on every perturbation of a screen, as a table, and on the screen as a whole, in numbers and sentences."""

from __future__ import annotations

import numpy as np
import pandas as pd

from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS
from perturbflow.quality.power import sentence
from perturbflow.quality.response import ALPHA, LEAST_CELLS, N_PERMUTATIONS
from perturbflow.quality.sample import CELLS_PER_PERTURBATION

LEAST_SCORED = 4
"""Cells of a held-out perturbation: half of them are scored, and distances and variances need two."""
FEW_CELLS = 30
"""Of fewer cells a mean effect is mostly noise: the default of qc.min_cells_per_perturbation."""
TEST_SHARE = 0.25
"""Of perturbations: the default of a split."""


def own_genes(efficacy: dict) -> pd.DataFrame:
    """Return, per perturbation, its own gene's level against the controls' from harmonization.json.

    For a combination it is that of the least changed member.

    Returns
    -------
    Index perturbation; columns own_gene, ratio, ratio_low, ratio_high and efficacy (share changed in the expected
    direction; NaN where no direction is known). Perturbations without a measured gene, or with too few molecules, have
    no row.
    """
    sign = {"down": -1.0, "up": 1.0}.get(efficacy["direction"], np.nan)
    rows = []
    for label, members in efficacy["perturbations"].items():
        clear = [(sign * (found["ratio"] - 1), member, found) for member, found in members.items() if found["is_told"]]
        if clear:
            changed, member, found = min(clear, key=lambda row: row[:2])
            rows.append((label, member, found["ratio"], found["low"], found["high"], changed))
    return pd.DataFrame(
        rows, columns=["perturbation", "own_gene", "ratio", "ratio_low", "ratio_high", "efficacy"]
    ).set_index("perturbation")


def batch_table(obs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per batch × cell type: batch, cell_type, controls, perturbed (cells), perturbations."""
    is_control = obs["is_control"].to_numpy(bool)
    keys = ["batch", "cell_type"]
    found = obs[keys].assign(controls=is_control, perturbed=~is_control).groupby(keys, observed=True).sum()
    found["perturbations"] = obs[~is_control].groupby(keys, observed=True)["perturbation"].nunique()
    return found.fillna({"perturbations": 0}).astype(int).reset_index()


def perturbation_facts(
    obs: pd.DataFrame, batches: pd.DataFrame, efficacy: dict, responses: pd.DataFrame
) -> pd.DataFrame:
    """Return quality.tsv: one row per perturbation, by label.

    Returns
    -------
    Index perturbation; columns n_cells, n_batches, n_cells_without_controls (in batches without controls of their cell
    type), those of `own_genes` and of `responses`, and not_scorable (why, empty where it is).
    """
    perturbed = obs[~obs["is_control"].to_numpy(bool)]
    has_controls = batches.set_index(["batch", "cell_type"])["controls"] > 0
    of_type = batches.groupby("cell_type", observed=True)["controls"].sum() > 0
    keys = perturbed[["perturbation", "batch", "cell_type"]].astype(str)
    size = keys.groupby(["perturbation", "batch", "cell_type"]).size().rename("n").reset_index()
    has_controls.index = has_controls.index.map(lambda key: tuple(map(str, key)))
    matched = size.set_index(["batch", "cell_type"]).index.map(has_controls).to_numpy(bool)
    comparable = size["cell_type"].map({str(name): bool(has) for name, has in of_type.items()}).to_numpy(bool)
    grouped = size.assign(
        n_cells_without_controls=size["n"].where(~matched, 0), comparable=size["n"].where(comparable, 0)
    ).groupby("perturbation")
    table = grouped.agg(
        n_cells=("n", "sum"),
        n_batches=("batch", "nunique"),
        n_cells_without_controls=("n_cells_without_controls", "sum"),
        comparable=("comparable", "sum"),
    )
    table = table.join(own_genes(efficacy)).join(responses)
    reasons = [
        (table["n_cells"] < LEAST_SCORED, f"fewer than {LEAST_SCORED} cells: no two to score"),
        (table["comparable"] < table["n_cells"], "cells of a cell type that has no controls"),
    ]
    table["not_scorable"] = np.select([mask for mask, _ in reasons], [text for _, text in reasons], "")
    return table.drop(columns="comparable")


def _share(n: int, of: int) -> str:
    return f"{n:,} of {of:,} ({100 * n / of:.0f} %)" if of else "0"


Finding = tuple[str, bool, str]
"""Topic, whether all is well, and sentences."""


def _on_cells(table: pd.DataFrame) -> Finding:
    n, few = len(table), int((table["n_cells"] < FEW_CELLS).sum())
    text = (
        f"A perturbation has {table['n_cells'].median():,.0f} cells (median). {_share(few, n)} have fewer than "
        f"{FEW_CELLS}: their mean effects are mostly noise."
    )
    return "cells", few <= 0.1 * n, text


def _on_controls(table: pd.DataFrame, batches: pd.DataFrame) -> Finding:
    n_lone, n_cells = int(table["n_cells_without_controls"].sum()), int(table["n_cells"].sum())
    n_batches = int((batches["controls"] == 0).sum())
    text = f"There are {batches['controls'].sum():,} control cells. "
    if n_lone:
        text += (
            f"{n_batches:,} of {len(batches):,} batches × cell types hold none: {_share(n_lone, n_cells)} of the "
            "perturbed cells are compared with controls of other batches, and lane effects are part of their effects."
        )
    else:
        text += "Every batch and cell type with perturbed cells has some."
    return "controls", n_lone == 0, text


def _on_target(table: pd.DataFrame, direction: str) -> Finding:
    reliable = table[table["ratio"].notna()] if "ratio" in table else table.iloc[:0]
    n, why = len(table), "not measured, or too few molecules"
    reached = int((reliable["ratio_high"] < 1).sum() if direction == "down" else (reliable["ratio_low"] > 1).sum())
    if len(reliable):
        text = (
            f"Own genes go {direction}, beyond chance, in {_share(reached, len(reliable))} perturbations; the median "
            f"level is {reliable['ratio'].median():.2f} of the controls'."
        )
        text += f" For {n - len(reliable):,} the change is not known: {why}." if len(reliable) < n else ""
    else:
        text = f"For no perturbation is the change of its own gene known: {why}."
    return "on target", 2 * len(reliable) >= n and reached >= 0.8 * len(reliable), text


def _on_response(table: pd.DataFrame) -> Finding:
    tested = table[table["responds"].notna()]
    n, n_responds = len(table), int(tested["responds"].eq(True).sum())
    text = "No perturbation could be compared with its controls."
    if len(tested):
        text = (
            f"{_share(n_responds, len(tested))} perturbations differ from their controls by energy distance "
            f"(Holm-adjusted p below {ALPHA})."
        )
    if len(tested) < n:
        text += f" {n - len(tested):,} were not tested: fewer than {LEAST_CELLS} cells with controls."
    return "response", len(tested) > 0 and n_responds >= 0.5 * len(tested), text


def _on_escaping(escaping: pd.Series) -> Finding:
    worst = escaping[escaping > 0.5].sort_values(ascending=False)
    text = (
        f"In {len(escaping):,} perturbations that respond, cells that look like controls can be recognized: "
        f"{100 * escaping.median():.0f} % of the cells (median). They are kept."
    )
    if len(worst):
        names = ", ".join(f"{label} ({100 * share:.0f} %)" for label, share in worst.head(8).items())
        text += f" More than half of the cells: {names}{', ...' if len(worst) > 8 else ''}."
    return "escaping", len(worst) <= 0.2 * len(escaping), text


def _on_scorable(table: pd.DataFrame) -> Finding:
    n, n_test = len(table), round(TEST_SHARE * len(table))  # as splits do
    lost = table[table["not_scorable"] != ""]
    text = "Every perturbation has enough cells to be scored."
    if len(lost):
        names = ", ".join(lost.index[:8]) + (", ..." if len(lost) > 8 else "")
        text = f"{_share(len(lost), n)} perturbations cannot be scored: {names}."
    if n_test < MIN_PERTURBATIONS:
        text += f" A quarter held out is {n_test}, and fewer than {MIN_PERTURBATIONS} allow no verdict."
    return "scorable", lost.empty and n_test >= MIN_PERTURBATIONS, text


def findings(table: pd.DataFrame, batches: pd.DataFrame, efficacy: dict, power: dict) -> list[dict]:
    """Return sentences on a screen, each with its topic and whether it needs a look: {about, is_fine, text}."""
    found = [_on_cells(table), _on_controls(table, batches)]
    if efficacy["direction"]:
        found.append(_on_target(table, efficacy["direction"]))
    found.append(_on_response(table))
    if len(escaping := table["escaping"].dropna()):
        found.append(_on_escaping(escaping))
    found += [_on_scorable(table), _on_power(power, len(table))]
    return [{"about": about, "is_fine": bool(is_fine), "text": text} for about, is_fine, text in found]


def _on_power(power: dict, n: int) -> Finding:
    return "power", power["n_reliable"] >= 0.5 * n, sentence(power, n)


def summary(
    name: str, obs: pd.DataFrame, table: pd.DataFrame, batches: pd.DataFrame, account: dict, power: dict
) -> dict:
    """Return quality.json.

    Parameters
    ----------
    account
        Content of harmonization.json.
    power
        The result of `Power.account`.
    """
    tested = table["responds"].dropna()
    n_members = obs["n_perturbations"].value_counts().sort_index()
    return {
        "dataset": name,
        "cells": {"all": len(obs), "control": int(obs["is_control"].sum())},
        "n_perturbations": len(table),
        "cells_by_n_perturbations": {str(n): int(size) for n, size in n_members.items()},
        "direction": account["efficacy"]["direction"],
        "batches": batches.astype({"batch": str, "cell_type": str}).to_dict("records"),
        "response": {
            "n_tested": len(tested),
            "n_responds": int(tested.eq(True).sum()),
            "alpha": ALPHA,
            "n_permutations": N_PERMUTATIONS,
            "cells_per_perturbation": CELLS_PER_PERTURBATION,
        },
        "not_scorable": {str(label): str(why) for label, why in table["not_scorable"].items() if why},
        "warnings": account["warnings"],
        "power": power,
        "findings": findings(table, batches, account["efficacy"], power),
    }

"""How alike effects are in two contexts: a matrix from source to target, and agreement among sources as trust."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from perturbflow.pairs import Pairs
from perturbflow.report.plotting import STYLE, new_axes, room_for

LEAST_SHARED = 6  # perturbations: of fewer, a mean correlation is chance
MOST_SHOWN = 12  # contexts in the figure
LEAST_LIMIT = 0.5  # of the colours: agreement near none is pale

Effects = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Agreement:
    """Agreement of the effects of contexts.

    Attributes
    ----------
    matrix
        Pearson's r over genes of effects that are centred over the perturbations that both contexts have, mean over
        these, (sources, targets); NaN where they share too few. Sources train, targets are all contexts.
    n_shared
        Numbers of these perturbations.
    held_out
        The targets whose perturbations are tested.
    trust
        Spearman's ρ over tested perturbations: agreement among the sources, with that of their mean and the target.
    n_tested
        Tested perturbations that two sources or more have.
    """

    matrix: pd.DataFrame
    n_shared: pd.DataFrame
    held_out: list[str]
    trust: float
    n_tested: int

    @classmethod
    def of(cls, pairs: Pairs, covariate: str) -> Agreement | None:
        """Measure the effects of all contexts, by cell type and this covariate; None where no two can be compared."""
        keys = ("batch" if covariate == "batch" else "dataset", "cell_type")
        n_types = pairs.obs["cell_type"].nunique()
        sources, tested = (_effects(pairs.roles(role).by(keys), n_types) for role in ("train", "test"))
        targets = {**sources, **{f"{name} (tested)" if name in sources else name: of for name, of in tested.items()}}
        held_out = [name for name in targets if name not in sources]
        if len(sources) < 2 or not held_out:
            return None
        matrix, n_shared = (pd.DataFrame(index=[*sources], columns=[*targets], dtype=float) for _ in range(2))
        for source, target in ((s, t) for s in sources for t in targets if s != t):
            labels = sorted(set(sources[source]) & set(targets[target]))
            n_shared.loc[source, target] = len(labels)
            if len(labels) >= LEAST_SHARED:
                matrix.loc[source, target] = _correlations(sources[source], targets[target], labels).mean()
        trust, n = _trust(sources, {name: targets[name] for name in held_out})
        return cls(matrix, n_shared, held_out, trust, n) if matrix.notna().any(axis=None) else None

    @property
    def words(self) -> str:
        """Return in a sentence or two how far contexts agree, and whether that is a sign of trust."""
        values = self.matrix[self.held_out].to_numpy()
        text = (
            f"Effects in the held-out context agree with those in another at r {np.nanmean(values):.2f} (mean; "
            f"{np.nanmin(values):.2f} to {np.nanmax(values):.2f})."
        )
        if np.isfinite(self.trust):
            meaning = (
                "The more its sources agree on a perturbation, the better they tell its effect in the target"
                if self.trust > 0
                else "That its sources agree on a perturbation is no sign that they tell its effect in the target"
            )
            text += f" {meaning}: Spearman's ρ {self.trust:.2f} over {self.n_tested:,} tested perturbations."
        return text


def _effects(cells: Pairs, n_types: int) -> Effects:
    """Return context → label → effect of the cells of a role."""
    return {_named(*context, n_types): of for context, of in cells.effects_by_context.items()}


def _named(place: str, cell_type: str, n_types: int) -> str:
    """Return one name of a context: that of a screen or batch, and the cell type where that tells more."""
    return place if n_types == 1 or place.casefold() == cell_type.casefold() else f"{place} {cell_type}"


def _centred(effects: dict[str, np.ndarray], labels: list[str]) -> np.ndarray:
    values = np.stack([effects[label] for label in labels])
    return values - values.mean(axis=0)


def _correlations(first: dict[str, np.ndarray], second: dict[str, np.ndarray], labels: list[str]) -> np.ndarray:
    """Return r over genes of the centred effects of every label, (labels,)."""
    return _rows(_centred(first, labels), _centred(second, labels))


def _rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norm, out=np.zeros(len(a)), where=norm > 0)


def _trust(sources: Effects, targets: Effects) -> tuple[float, int]:
    """Return Spearman's ρ of agreement among sources with accuracy in the target, and over how many perturbations."""
    means = {name: np.mean(list(of.values()), axis=0) for name, of in {**sources, **targets}.items()}
    among, accuracy = [], []
    for target, of in targets.items():
        for label, effect in of.items():
            own = [sources[name][label] - means[name] for name in sources if label in sources[name]]
            if len(own) > 1:
                pairs_of = list(combinations(own, 2))
                among.append(_rows(*(np.stack([pair[i] for pair in pairs_of]) for i in (0, 1))).mean())
                accuracy.append(_rows(np.mean(own, axis=0)[None], (effect - means[target])[None])[0])
    if len(among) < LEAST_SHARED:
        return float("nan"), len(among)
    return float(spearmanr(among, accuracy).statistic), len(among)


@mpl.rc_context(STYLE)
def matrix_figure(agreement: Agreement) -> Figure:
    """Draw the matrix: a row per source, a column per target, held-out ones last."""
    shown = agreement.matrix.iloc[:MOST_SHOWN]
    columns = [name for name in shown if name not in agreement.held_out][:MOST_SHOWN] + agreement.held_out[:MOST_SHOWN]
    values = shown[columns].to_numpy()
    names = [f"{name}, held out" if name in agreement.held_out and "(tested)" not in name else name for name in columns]
    left, below = room_for(shown.index), room_for(names)
    figure, axes = new_axes(left + 0.42 * len(columns) + 0.2, below + 0.3 * len(shown) + 0.2, left, bottom=below)
    limit = max(LEAST_LIMIT, float(np.nanmax(np.abs(values))))
    axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", alpha=0.75)
    axes.set_yticks(range(len(shown)), shown.index)
    axes.set_xticks(range(len(columns)), names, rotation=90)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=7)
    return figure

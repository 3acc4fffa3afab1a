"""Which perturbations move these cells towards that state? Ranked by predicted effects, beside the level of chance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbflow.counterfactuals.questions import holding, in_words
from perturbflow.errors import InputError
from perturbflow.genes.symbols import entities_of
from perturbflow.pairs import Pairs

N_CHANCE = 500  # directions of nothing


@dataclass(frozen=True)
class Direction:
    """The wanted change of cells, and changes towards nothing.

    Attributes
    ----------
    wanted
        The wanted change, (genes,); 0 for genes that do not matter.
    noise
        Changes towards nothing, (directions, genes): random halves of the start cells, or the signature on random
        genes.
    words
        The target, in words.
    """

    wanted: np.ndarray
    noise: np.ndarray
    words: str

    @classmethod
    def of(cls, search: dict, pairs: Pairs, start: Pairs, seed: int = 0) -> "Direction":
        """Read a query's `search`: towards cells by obs columns, or a signature.

        Raises
        ------
        InputError
            For a target without cells or with all start cells, or a signature without measured genes.
        """
        towards, rng = search["towards"], np.random.default_rng(seed)
        X = start.X[:].toarray()
        if "signature" in towards:
            return cls._of_signature(towards["signature"], pairs.genes, rng)
        mask = holding(pairs.obs, towards["cells"], "search.towards.cells")
        if not mask.any():
            raise InputError(f"search.towards.cells: {towards['cells']} selects no cell.")
        rows = np.flatnonzero(mask)
        if np.isin(start.rows, pairs.rows[rows]).all():
            raise InputError(
                f"search.towards.cells: {towards['cells']} holds all cells that the question starts from, so there is "
                "nothing to reach. Name other cells, such as those of a perturbation or of another cell type."
            )
        wanted = pairs.mean_of(rows) - X.mean(axis=0)
        words = f"{len(rows):,} cells of {in_words(towards['cells'])}"
        return cls(wanted, directions_of_nothing(X, len(rows), rng), words)

    def scored(self, labels: Sequence[str], effects: np.ndarray, genes: list[str]) -> pd.DataFrame:
        """Return score and reach of perturbations by their effects, (perturbations, genes), and scores of nothing."""
        is_target = np.stack([np.isin(genes, entities_of(label)) for label in labels])
        kept = np.where(is_target, 0.0, 1.0)
        of_nothing = scores(effects, self.noise, is_target)
        return pd.DataFrame(
            {
                "score": scores(effects, self.wanted[None], is_target)[0],
                "reach": (effects * kept) @ self.wanted / np.maximum(kept @ self.wanted**2, 1e-12),
                "nothing": list(of_nothing.T),
            }
        )

    def ranked(self, summary: pd.DataFrame, scored: pd.DataFrame, budget: int) -> pd.DataFrame:
        """Return the candidates, best first.

        New columns: score is the cosine of the predicted effect with the wanted change, perturbed genes left out. reach
        is the share of the wanted change that it makes: the projection, 1 is all. chance is how often the best of all
        candidates scores as high towards nothing; a small chance is a finding. search_rank and within_budget follow.
        towards is the target in words.

        Parameters
        ----------
        scored
            The result of `scored` for all candidates, in the order of the summary.
        """
        best = np.sort(np.stack(scored["nothing"].tolist()).max(axis=0))
        n_as_high = len(best) - np.searchsorted(best, scored["score"].to_numpy(), side="left")
        found = summary.assign(score=scored["score"], reach=scored["reach"], chance=(1 + n_as_high) / (1 + len(best)))
        found = found.sort_values("score", ascending=False, ignore_index=True)
        within = np.arange(len(found)) < budget
        return found.assign(search_rank=np.arange(1, len(found) + 1), within_budget=within, towards=self.words)

    @classmethod
    def _of_signature(cls, signature: dict[str, float], genes: list[str], rng: np.random.Generator) -> "Direction":
        row = {gene: i for i, gene in enumerate(genes)}
        absent = [gene for gene in signature if gene not in row]
        if len(absent) == len(signature):
            raise InputError(
                f"search.towards.signature: none of its genes is among the {len(row)} of this screen: "
                f"{', '.join(absent)}."
            )
        wanted = np.zeros(len(row))
        for gene, value in signature.items():
            if gene in row:
                wanted[row[gene]] = value
        not_measured = f" ({', '.join(absent)} not measured)" if absent else ""
        words = f"a signature of {np.count_nonzero(wanted)} genes{not_measured}"
        return cls(wanted, np.stack([rng.permutation(wanted) for _ in range(N_CHANCE)]), words)


def directions_of_nothing(X: np.ndarray, n_target: int, rng: np.random.Generator) -> np.ndarray:
    """Return means of n_target start cells, sampled with replacement, minus the mean of all, (N_CHANCE, genes)."""
    share = rng.multinomial(n_target, np.full(len(X), 1.0 / len(X)), N_CHANCE) / n_target
    return share @ X - X.mean(axis=0)


def scores(effects: np.ndarray, wanted: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Return the cosine of effects with wanted changes, without perturbed genes, (directions, perturbations).

    Parameters
    ----------
    effects
        (perturbations, genes).
    wanted
        (directions, genes).
    is_target
        The perturbed genes of every perturbation, (perturbations, genes).
    """
    kept = ~is_target
    effects = effects * kept
    norms = np.sqrt((wanted**2) @ kept.T) * np.linalg.norm(effects, axis=1)
    return np.divide(wanted @ effects.T, norms, out=np.zeros_like(norms), where=norms > 1e-12)


def ranked(
    summary: pd.DataFrame, means: dict[str, np.ndarray], genes: list[str], direction: Direction, budget: int
) -> pd.DataFrame:
    """Return the candidates, best first, as `Direction.ranked` does, from their mean effects."""
    labels = summary["perturbation"].tolist()
    return direction.ranked(
        summary, direction.scored(labels, np.stack([means[label] for label in labels]), genes), budget
    )

"""Ablations: models without one kind of information. The score that they still reach does not need it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import CONTROL, members_of
from perturbflow.models.base import Artefact, Model, Run, off_level, start_cells
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.set_gp import SetGP
from perturbflow.models.thinning import with_mean_effect
from perturbflow.pairs import Pairs


class ShuffledLabels(SetGP):
    """`SetGP` on training cells with exchanged labels: singles among singles, combinations among combinations."""

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Exchange labels, then learn."""
        rng = np.random.default_rng(run.seed)
        new_label = {CONTROL: CONTROL}
        for n in sorted({len(members_of(label)) for label in pairs.perturbations}):
            labels = [label for label in pairs.perturbations if len(members_of(label)) == n]
            shuffled = [str(label) for label in rng.permutation(labels)]
            following = [*shuffled[1:], shuffled[0]]  # a cycle: no label keeps its own cells, unless it is alone
            new_label |= dict(zip(shuffled, following, strict=True))
        obs = pairs.obs.assign(perturbation=[new_label[label] for label in pairs.labels])
        return super().fit(replace(pairs, obs=obs), embeddings, run)


class BatchOnly(Model):
    """The mean effect of all training perturbations in the cell's batch and cell type; it ignores the perturbation."""

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Average effects over perturbations, per batch × cell type."""
        training = pairs.roles("train")
        strata = training.strata
        overall = Effects.of_training(training).values.mean(axis=0)
        of_label: dict[str, list[np.ndarray]] = {}
        perturbed = pd.DataFrame({"stratum": strata, "label": training.labels})[~training.is_control]
        cells = perturbed.groupby(["stratum", "label"])
        sums, _ = training.sums_over(cells.ngroup().to_numpy(), ~training.is_control, cells.ngroups)
        for total, ((stratum, _), index) in zip(sums, cells.groups.items(), strict=True):
            rows = index.to_numpy()
            mean = (total / len(rows)).astype(training.X.dtype)
            of_label.setdefault(stratum, []).append(mean - training.control_mean_for(rows))
        effects = {stratum: np.mean(values, axis=0) for stratum, values in of_label.items()}
        self.artefact = {
            "strata": np.array(list(effects), dtype=str),
            "effects": np.stack(list(effects.values())),
            "overall": overall,
        }
        return self.artefact

    def restore(self, artefact: Artefact) -> None:
        """Take over the arrays."""
        self.artefact = artefact

    def predict(
        self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Change control cells by the mean effect of their strata; by the overall one where a stratum is unknown."""
        known = self.artefact["strata"].tolist()
        effects = [
            self.artefact["effects"][known.index(stratum)] if stratum in known else self.artefact["overall"]
            for stratum in ([""] if context is None else context.strata)
        ]
        start = start_cells(cells, n)
        mean_change = np.mean(effects, axis=0) + off_level(start, context)
        changed = with_mean_effect(start, mean_change, None, np.random.default_rng(seed))
        return np.repeat(changed[None], len(perturbations), axis=0)

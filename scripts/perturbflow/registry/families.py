"""The families of models: where each is implemented, what it is, and which rule trains it."""

import ast
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Family:
    """Where a model family lives and what its training leaves behind."""

    implementation: str  # "module:Class" below perturbflow.models
    kind: str  # baseline, ablation, ceiling or learned
    rule: str = "train_closed_form"  # which rule trains it
    answers_counterfactuals: bool = False
    split_kinds: tuple[str, ...] = ()  # the only ones that the family can serve; empty: all

    @property
    def artefact(self) -> str:
        """Return the file name of a trained model: arrays of a closed form, or a checkpoint."""
        return "model.npz" if self.rule == "train_closed_form" else "model.ckpt"

    @property
    def description(self) -> str:
        """Return the first paragraph of the docstring of the family's class, read without importing it."""
        module, name = self.implementation.split(":")
        tree = ast.parse((MODELS / f"{module}.py").read_text(encoding="utf-8"))
        documented = (ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        return " ".join((next(documented, None) or "").split("\n\n")[0].split())


def _baseline(implementation: str) -> Family:
    return Family(implementation, "baseline", answers_counterfactuals=True)


FAMILIES = {
    "no_change": _baseline("baselines:NoChange"),
    "perturbed_mean": _baseline("baselines:PerturbedMean"),
    "dose_interpolation": _baseline("baselines:DoseInterpolation"),
    "matching_mean": _baseline("baselines:MatchingMean"),
    "additive": _baseline("baselines:Additive"),
    "shrunken_additive": _baseline("baselines:ShrunkenAdditive"),
    "latent_additive": _baseline("baselines:LatentAdditive"),
    "linear": _baseline("baselines:Linear"),
    "transfer": Family("baselines:Transfer", "baseline", answers_counterfactuals=True, split_kinds=("unseen_context",)),
    "ridge": _baseline("regressions:Ridge"),
    "random_forest": _baseline("regressions:RandomForest"),
    "nearest_perturbation": _baseline("regressions:NearestPerturbation"),
    "covariance_response": _baseline("regressions:CovarianceResponse"),
    "stacked": _baseline("stacked:Stacked"),
    "shuffled_labels": Family("ablations:ShuffledLabels", "ablation"),
    "batch_only": Family("ablations:BatchOnly", "ablation"),
    "technical_duplicate": Family("ceilings:TechnicalDuplicate", "ceiling"),
    "perfect_mean": Family("ceilings:PerfectMean", "ceiling"),
    "interpolated_duplicate": Family("ceilings:InterpolatedDuplicate", "ceiling"),
    "diffusion": Family("diffusion:Diffusion", "learned", "train_diffusion", answers_counterfactuals=True),
    "jepa": Family("jepa:Jepa", "learned", "train_jepa", answers_counterfactuals=True),
    "counterfactual": Family("counterfactual:Counterfactual", "learned", "train_counterfactual", answers_counterfactuals=True),
}

# Floors and ceilings: they are properties of data and metric, so they run with every selection, listed or not.
REFERENCES = ("no_change", "perturbed_mean", "technical_duplicate", "interpolated_duplicate", "perfect_mean")

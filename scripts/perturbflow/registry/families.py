"""The families of models: where each is implemented, what it is, and which rule trains it."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    losses: Mapping[str, str] = field(
        default_factory=dict
    )  # stage of training, empty for the last → what its loss means, for the report

    @property
    def artefact(self) -> str:
        """Return the file name of a trained model: arrays of a closed form, or a checkpoint."""
        return "model.npz" if self.rule == "train_closed_form" else "model.ckpt"

    @property
    def description(self) -> str:
        """Return the first paragraph of the docstring of the family's class, read without importing it."""
        module, name = self.implementation.split(":")
        tree = ast.parse((MODELS / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        documented = (
            ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
        )
        return " ".join((next(documented, None) or "").split("\n\n")[0].split())


def _baseline(implementation: str) -> Family:
    return Family(implementation, "baseline", answers_counterfactuals=True)


FAMILIES = {
    "no_change": _baseline("closed_form.baselines:NoChange"),
    "perturbed_mean": _baseline("closed_form.baselines:PerturbedMean"),
    "dose_interpolation": _baseline("closed_form.baselines:DoseInterpolation"),
    "matching_mean": _baseline("closed_form.baselines:MatchingMean"),
    "additive": _baseline("closed_form.baselines:Additive"),
    "shrunken_additive": _baseline("closed_form.baselines:ShrunkenAdditive"),
    "latent_additive": _baseline("closed_form.baselines:LatentAdditive"),
    "linear": _baseline("closed_form.baselines:Linear"),
    "transfer": Family("closed_form.baselines:Transfer", "baseline", answers_counterfactuals=True, split_kinds=("unseen_context",)),
    "ridge": _baseline("closed_form.regressions:Ridge"),
    "random_forest": _baseline("closed_form.regressions:RandomForest"),
    "nearest_perturbation": _baseline("closed_form.regressions:NearestPerturbation"),
    "covariance_response": _baseline("closed_form.regressions:CovarianceResponse"),
    "gaussian_process": _baseline("gaussian_process.set_gp:SetGP"),
    "stacked": _baseline("gaussian_process.set_gp:SetGP"),  # the stack of closed forms that this model replaced: its name stays valid
    "shuffled_labels": Family("closed_form.ablations:ShuffledLabels", "ablation"),
    "batch_only": Family("closed_form.ablations:BatchOnly", "ablation"),
    "technical_duplicate": Family("closed_form.ceilings:TechnicalDuplicate", "ceiling"),
    "perfect_mean": Family("closed_form.ceilings:PerfectMean", "ceiling"),
    "interpolated_duplicate": Family("closed_form.ceilings:InterpolatedDuplicate", "ceiling"),
    "diffusion": Family(
        "scppdm:Diffusion", "learned", "train_diffusion", answers_counterfactuals=True,
        losses={
            "": "Loss: squared error of what is denoised, at random levels of noise. A guess of zero has about 1. Most of it is noise that nothing "
            "can tell, so small differences count."
        },
    ),
    "jepa": Family(
        "jepa:Jepa", "learned", "train_jepa", answers_counterfactuals=True,
        losses={
            "stage_a": "Loss: squared error of the target's embedding (invariance), plus terms against collapse. It rises by design. The target's "
            "embedding grows from near 0 to a deviation of 1, as these terms ask. And the part that is predicted shrinks from a half of a cell's "
            "molecules to a tenth, which is mostly noise. So the loss measures no progress; the effective rank tells a collapse.",
            "stage_c": "Loss: negative log likelihood of the counts, per gene, given the embedding. It falls to what counting noise leaves.",
            "": "Loss: error of the mean effects of groups of cells (effect), negative log likelihood of their cells (world), and how much shifts of "
            "one perturbation differ (steadiness), weighted.",
        },
    ),
    "counterfactual": Family(
        "counterfactual:Counterfactual", "learned", "train_counterfactual", answers_counterfactuals=True,
        losses={
            "": "Loss: squared error of the velocity from control to perturbed cell, plus that of one shift for all cells. Cells of a pair differ "
            "mostly by noise, which stays, so small differences count."
        },
    ),
}  # fmt: skip

# Floors and ceilings: they are properties of data and metric, so they run with every selection, listed or not.
REFERENCES = ("no_change", "perturbed_mean", "technical_duplicate", "interpolated_duplicate", "perfect_mean")

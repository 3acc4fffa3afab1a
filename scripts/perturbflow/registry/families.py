"""The families of models: one declaration each. Everything else about a family follows from it.

Adding a closed form takes one class and one line here. `models/` holds the classes; this module imports none of them,
as the plan is made without numpy and torch.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from perturbflow.registry.contexts import CONTEXT_KINDS
from perturbflow.registry.params import Params, like, param

MODELS = Path(__file__).resolve().parent.parent / "models"


# --- params ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearParams(Params):
    """Of the bilinear closed form."""

    n_components: int = param(10, "principal components of the training effects", at_least=1)
    ridge: float = param(0.1, "λ, on both sides", above=0)


@dataclass(frozen=True)
class NetworkParams(Params):
    """What all learned families have."""

    mean: Literal["learned", "closed_form"] = param("closed_form", "who owns the mean effect: the network, or set_gp")
    n_latent: int = param(48, "dimensions of the latent space", at_least=2)
    n_steps: int = param(2000, "optimization steps", at_least=1)
    batch_size: int = param(128, "cells per step", at_least=2)
    learning_rate: float = param(0.001, above=0)
    weight_decay: float = param(0.01, at_least=0)
    ema_decay: float = param(0.995, "of the average of weights that predicts", at_least=0, below=1)
    control_share: float = param(0.1, "share of unperturbed targets in a batch", at_least=0, at_most=1)
    synthetic_share: float = param(
        0.5, "share of composed combinations, where training holds combinations", at_least=0, at_most=1
    )
    shifted_share: float = param(
        0.7, "share of start cells that are perturbed cells minus their mean effect", at_least=0, at_most=1
    )
    balance: Literal["perturbations", "screens"] = param(
        "perturbations", "what batches hold equally often: perturbations, or screens and the perturbations of each"
    )
    context: Literal["cells", "controls"] = param(
        "cells",
        "what tells the network of a context, where training holds several: its cells alone, or how alike its controls "
        "are to those of others, too",
    )


@dataclass(frozen=True)
class LatentFile:
    """A latent space that was learned elsewhere."""

    file: str = param(sentence="a table of gene loadings, or an encoder (.pt2)")


@dataclass(frozen=True)
class DiffusionParams(NetworkParams):
    """Of scPPDM."""

    mean: Literal["learned", "closed_form"] = like(
        NetworkParams, "mean", "learned", "who owns the mean effect: the network (scppdm), or set_gp (scppdm_hybrid)"
    )
    n_latent: int = like(
        NetworkParams, "n_latent", 48, "dimensions of the latent space of expression; a file brings its own"
    )
    latent: Literal["counts", "pca"] | LatentFile = param(
        "counts",
        "counts: negative binomial autoencoder with library size; pca: linear, on cells and effects; "
        "{file: ...}: gene loadings or an encoder that were learned elsewhere",
    )
    width: int = param(64, "of the tokens", at_least=8)
    n_tokens: int = param(2, "tokens per cell and per gene", at_least=1)
    n_blocks: int = param(2, at_least=1)
    n_heads: int = param(4, at_least=1)
    dropout: float = param(0.1, at_least=0, below=1)
    own_dropout: float = param(0.1, "how often a gene is known by its embedding alone", at_least=0, at_most=1)
    condition_dropout: float = param(0.1, "of each of the two conditions", at_least=0, below=1)
    objective: Literal["v", "noise"] = param("v", "what the network predicts")
    alignment: float = param(
        0.0, "weight of the InfoNCE term between perturbations and the changes they make", at_least=0
    )
    guidance_state: float = param(1.0, "s_state; 1 is the plain conditional")
    guidance_perturbation: float = param(1.0, "s_perturbation; above 1 exaggerates effects")
    sampler: Literal["ddim", "dpm", "ancestral"] = param(
        "ddim", "deterministic, second order (DPM-Solver++), or with fresh noise at every step"
    )
    n_sampling_steps: int = param(15, "of the sampler", at_least=1)
    fresh_noise: float = param(
        0.3, "share of noise that is not the cell's own; spreads outcomes", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class JepaWeights(Params):
    """Of the terms of the losses."""

    invariance: float = param(25.0, "stage A, embedding of one part of a cell from the other", at_least=0)
    variance: float = param(1.0, "stage A, against collapse to a point", at_least=0)
    covariance: float = param(0.04, "stage A, against collapse to a line", at_least=0)
    effect: float = param(1.0, "stage B, mean shift of a group, in units of what it does to genes", at_least=0)
    world: float = param(0.1, "stage B, likelihood of a group's cells", at_least=0)
    steadiness: float = param(
        0.5, "stage B, against shifts that differ between cells of a group without need", at_least=0
    )


@dataclass(frozen=True)
class JepaParams(NetworkParams):
    """Of the joint-embedding predictive architecture."""

    mean: Literal["learned", "closed_form"] = like(
        NetworkParams,
        "mean",
        "closed_form",
        "who owns the mean effect: the predictor, or set_gp, which adds the predictor as far as inner folds support it",
    )
    n_latent: int = like(NetworkParams, "n_latent", 48, "dimensions of the embedding")
    n_steps: int = like(NetworkParams, "n_steps", 1200, "optimization steps of the predictor (stage B)")
    learning_rate: float = like(NetworkParams, "learning_rate", 0.002)
    ema_decay: float = like(NetworkParams, "ema_decay", 0.98)
    synthetic_share: float = like(NetworkParams, "synthetic_share", 0.0)
    n_steps_representation: int = param(2000, "of the embedding (stage A)", at_least=1)
    n_steps_decoder: int = param(1000, "of the way back to counts (stage C)", at_least=1)
    width: int = param(128, "of hidden layers", at_least=8)
    dropout: float = param(0.1, at_least=0, below=1)
    own_dropout: float = param(0.3, "how often a gene is known by its embedding alone", at_least=0, at_most=1)
    action_dropout: float = param(
        0.1, "how often the perturbation is withheld and the learned null replaces it", at_least=0, below=1
    )
    mask_rate: float = param(0.5, "share of hidden genes at the start of stage A; falls to zero", at_least=0, below=1)
    target_decay: float = param(0.99, "of the moving average that is the target encoder", at_least=0, below=1)
    fold_embedding: Literal["shared", "own"] = param(
        "shared",
        "embedding of the inner folds that choose the mean. shared: that of the whole training, which has seen the "
        "cells held out without their labels; own: learned again without them, which takes a few times as long",
    )
    self_supervised: bool = param(
        True, "false leaves stage A out: the encoder learns with the decoder, in as many steps"
    )
    action: Literal["given", "withheld", "shuffled"] = param(
        "given", "what the predictor sees: the perturbation, never anything, or another perturbation"
    )
    when_broken: Literal["stop", "report"] = param(
        "stop",
        "what a collapsed embedding or an ignored action does: end the training, or be written into run.json",
    )
    weights: JepaWeights = param(JepaWeights, "of the terms of the losses")


@dataclass(frozen=True)
class CounterfactualParams(NetworkParams):
    """Of the flow between coupled cells."""

    mean: Literal["learned", "closed_form"] = like(
        NetworkParams, "mean", "closed_form", "who owns the mean effect: the flow, or set_gp"
    )
    n_latent: int = like(
        NetworkParams,
        "n_latent",
        64,
        "most dimensions of the latent space: states, at most half of them, and directions of effects, "
        "as many as the data tell from noise",
    )
    n_steps: int = like(NetworkParams, "n_steps", 1500)
    batch_size: int = like(NetworkParams, "batch_size", 512)
    control_share: float = like(NetworkParams, "control_share", 0.0)
    shifted_share: float = like(NetworkParams, "shifted_share", 0.3)
    width: int = param(128, "of hidden layers", at_least=8)
    n_layers: int = param(3, "of the velocity", at_least=1)
    dropout: float = param(0.0, at_least=0, below=1)
    own_dropout: float = param(0.3, "how often a gene is known by its embedding alone", at_least=0, at_most=1)
    bridge_noise: float = param(0.5, "standard deviation around the path between coupled cells in training", at_least=0)
    n_integration_steps: int = param(10, "of the midpoint rule", at_least=1)


@dataclass(frozen=True)
class PredictionsParams(Params):
    """Of predictions that were made elsewhere."""

    file: str = param(
        sentence="h5ad of cells, or of one mean per perturbation; or a table of means (tsv, csv, parquet). "
        "{dataset}, {split}, {model} and {seed} are filled in"
    )
    values: Literal["expression", "effect"] = param(
        "expression", "expression, or means minus the mean of the controls (effect)"
    )
    scale: Literal["log1p", "linear", "counts"] = param(
        "log1p", "log1p of normalized counts, normalized counts (linear), or counts"
    )
    target_sum: float | None = param(
        None, "sum that its counts are normalized to; null: found, by measured controls", above=0
    )
    label: str = param("perturbation", "the column of obs that names the perturbation")
    separator: str = param("+", "text between the members of a combination")


@dataclass(frozen=True)
class ExternalParams(Params):
    """Of a model that a script trains in an environment of its own."""

    script: str = param(
        sentence="gets three paths: the exported folder, the predictions.h5ad to be written, and settings.json"
    )
    environment: str | None = param(
        None,
        "a lock of pip (.txt), one that ships (by its name), or the folder of an environment that is there; null: the "
        "workflow's own",
    )
    command: str = param("python", "words before the script, found in the environment first")
    values: Literal["expression", "effect"] = like(PredictionsParams, "values", "expression")
    scale: Literal["log1p", "linear", "counts"] = like(PredictionsParams, "scale", "log1p")
    options: dict = param(dict, "whatever the script takes")
    files: dict = param(dict, "name → path of a file that the script reads; its content counts")
    unseen_genes: bool = param(
        True, "whether it predicts genes that no training cell was perturbed in; if not, no unseen_perturbation"
    )


# --- families --------------------------------------------------------------------------------------------------------

Role = Literal["reference", "floor", "ceiling", "negative", "positive", "scale", "to_beat"]


@dataclass(frozen=True)
class Family:
    """Where a family lives, what it is, and what its training leaves behind.

    Attributes
    ----------
    implementation
        "module:Class" below perturbflow.models.
    kind
        baseline, ablation, ceiling or learned.
    params
        The dataclass of its params.
    rule
        The rule that trains it.
    roles
        reference: it runs with every selection, listed or not. floor, ceiling: any model should lie between them.
        scale: one end of the scale of scores. negative, positive: a metric must distinguish them. to_beat: the
        strongest closed form.
    split_kinds
        The only kinds of split that the family can serve; empty: all.
    made_elsewhere
        Whether its predictions come from a file, which `params.file` names or a script leaves. Such a family answers no
        what-if questions.
    losses
        Stage of training, empty for the last → the meaning of its loss, for the report.
    """

    implementation: str
    kind: Literal["baseline", "ablation", "ceiling", "learned"] = "baseline"
    params: type[Params] = Params
    rule: str = "train_closed_form"
    roles: frozenset[Role] = frozenset()
    split_kinds: tuple[str, ...] = ()
    made_elsewhere: bool = False
    losses: Mapping[str, str] = field(default_factory=dict)

    @property
    def answers_counterfactuals(self) -> bool:
        """Whether the family can be asked what-if questions."""
        return self.kind in ("baseline", "learned") and not self.made_elsewhere

    @property
    def artefact(self) -> str:
        """File name of a trained model: arrays of a closed form, or a checkpoint."""
        return "model.npz" if self.rule in ("train_closed_form", "train_external") else "model.ckpt"

    @property
    def description(self) -> str:
        """First paragraph of the docstring of the family's class, read without importing it."""
        module, name = self.implementation.split(":")
        tree = ast.parse((MODELS / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        documented = (
            ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
        )
        return " ".join((next(documented, None) or "").split("\n\n")[0].split())


def _family(implementation: str, *roles: Role, **others: Any) -> Family:
    return Family(implementation, roles=frozenset(roles), **others)


FAMILIES = {
    # Baselines
    "no_change": _family("closed_form.baselines:NoChange", "reference", "floor", "negative", "scale"),
    "perturbed_mean": _family("closed_form.baselines:PerturbedMean", "reference", "floor", "negative"),
    "additive": _family("closed_form.baselines:Additive", "floor"),
    "matching_mean": _family("closed_form.baselines:MatchingMean", "floor"),
    "other_contexts_mean": _family("closed_form.transfers:OtherContextsMean", "floor", split_kinds=CONTEXT_KINDS),
    "same_elsewhere": _family("closed_form.transfers:SameElsewhere", "floor", split_kinds=CONTEXT_KINDS),
    "nearest_context": _family("closed_form.transfers:NearestContext", "floor", split_kinds=CONTEXT_KINDS),
    "transfer": _family("closed_form.transfers:Transfer", "floor", split_kinds=CONTEXT_KINDS),
    "dose_interpolation": _family("closed_form.baselines:DoseInterpolation", "floor"),
    "shrunken_additive": _family("closed_form.baselines:ShrunkenAdditive"),
    "latent_additive": _family("closed_form.baselines:LatentAdditive"),
    "linear": _family("closed_form.baselines:Linear", params=LinearParams),
    "ridge": _family("closed_form.regressions:Ridge"),
    "random_forest": _family("closed_form.regressions:RandomForest"),
    "nearest_perturbation": _family("closed_form.regressions:NearestPerturbation"),
    "covariance_response": _family("closed_form.regressions:CovarianceResponse"),
    "gaussian_process": _family("gaussian_process.set_gp:SetGP", "to_beat"),
    # The stack of closed forms that the Gaussian process replaced: its name stays valid.
    "stacked": _family("gaussian_process.set_gp:SetGP", "to_beat"),
    # Ablations
    "shuffled_labels": _family("closed_form.ablations:ShuffledLabels", kind="ablation"),
    "batch_only": _family("closed_form.ablations:BatchOnly", kind="ablation"),
    # Ceilings
    "perfect_mean": _family("closed_form.ceilings:PerfectMean", "reference", "ceiling", "scale", kind="ceiling"),
    "technical_duplicate": _family(
        "closed_form.ceilings:TechnicalDuplicate", "reference", "ceiling", "positive", kind="ceiling"
    ),
    "interpolated_duplicate": _family(
        "closed_form.ceilings:InterpolatedDuplicate", "reference", "ceiling", "positive", kind="ceiling"
    ),
    "context_mean": _family("closed_form.ceilings:ContextMean", kind="ceiling", split_kinds=CONTEXT_KINDS),
    # Made elsewhere
    "predictions": _family("from_file:FromFile", kind="learned", params=PredictionsParams, made_elsewhere=True),
    "external": _family(
        "external:External", kind="learned", params=ExternalParams, rule="train_external", made_elsewhere=True
    ),
    # Learned
    "diffusion": _family(
        "scppdm:Diffusion", kind="learned", params=DiffusionParams, rule="train_diffusion",
        losses={
            "": "Loss: squared error of the denoised latent, at random levels of noise. A guess of zero has about 1. "
            "Most of it is noise that nothing can predict, so small differences count."
        },
    ),
    "jepa": _family(
        "jepa:Jepa", kind="learned", params=JepaParams, rule="train_jepa",
        losses={
            "stage_a": "Loss: squared error of the target's embedding (invariance), plus terms against collapse. It "
            "rises by design. These terms make the target's embedding grow from near 0 to a deviation of 1. The "
            "predicted part shrinks from a half of a cell's molecules to a tenth, which is mostly noise. So the loss "
            "measures no progress; the effective rank shows a collapse.",
            "stage_c": "Loss: negative log likelihood of the counts, per gene, given the embedding. It falls to what "
            "counting noise leaves.",
            "": "Loss: error of the mean effects of groups of cells (effect), negative log likelihood of their cells "
            "(world), and how much shifts of one perturbation differ (steadiness), weighted.",
        },
    ),
    "counterfactual": _family(
        "counterfactual:Counterfactual", kind="learned", params=CounterfactualParams, rule="train_counterfactual",
        losses={
            "": "Loss: squared error of the velocity from control to perturbed cell, plus that of one shift for all. "
            "Cells of a pair differ mostly by noise, which stays, so small differences count."
        },
    ),
}  # fmt: skip


def with_role(role: Role) -> tuple[str, ...]:
    """Return the families that have a role, in the order of their declaration."""
    return tuple(name for name, family in FAMILIES.items() if role in family.roles)


# Floors and ceilings are properties of data and metric.
REFERENCES = with_role("reference")

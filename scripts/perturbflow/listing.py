"""Tables of all datasets, splits, models and metrics, those of a user's own configuration too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perturbflow.registry.families import FAMILIES

KINDS = ("datasets", "splits", "models", "metrics")

Row = dict[str, Any]


def _datasets(config: dict) -> list[Row]:
    return [
        {
            "name": name,
            "organism": block["organism"],
            "perturbation_type": block["perturbation_type"],
            "combinations": {True: "yes", False: "no"}.get(block.get("combinations"), "unknown"),
            "reference": block["reference"],
        }
        for name, block in config["datasets"].items()
    ]


def _splits(config: dict) -> list[Row]:
    return [
        {"name": name, "kind": block["kind"], "held_out": block.get("path") or _share(block), "seed": block["seed"]}
        for name, block in config["splits"].items()
    ]


def _share(block: dict) -> str:
    """Return what a split holds out, in words: a fold, what it names, or a share."""
    if "folds" in block and "fold" not in block:
        return "each context in turn"
    if "folds" in block:
        return f"fold {block['fold']} of {block['folds']}"
    if "test_fraction" in block:
        return f"{block['test_fraction']:g} of all"
    held_out = block["held_out"]
    names = held_out if isinstance(held_out, list) else [name for of in held_out.values() for name in of]
    return ", ".join(map(str, dict.fromkeys(names)))


def _models(config: dict) -> list[Row]:
    return [
        {
            "name": name,
            "family": block["family"],
            "kind": FAMILIES[block["family"]].kind,
            "answers_what_if": "yes" if FAMILIES[block["family"]].answers_counterfactuals else "no",
        }
        for name, block in config["models"].items()
    ]


def _metrics(config: dict) -> list[Row]:
    from perturbflow.evaluation.metrics import METRICS  # seconds to import, and other tables do without

    return [
        {
            "name": metric.name,
            "family": metric.family,
            "better": metric.direction,
            "perfect": metric.perfect,
            "headline": "yes" if metric.headline else "no",
            "unit": metric.unit,
        }
        for metric in METRICS.values()
    ]


TABLES = {"datasets": _datasets, "splits": _splits, "models": _models, "metrics": _metrics}


def listed(kinds: Sequence[str], files: Sequence[Path] = ()) -> dict[str, list[Row]]:
    """Return kind → one row per thing that exists.

    Parameters
    ----------
    kinds
        Of KINDS.
    files
        A user's configuration files; they may be incomplete, as for snakemake --configfile.

    Raises
    ------
    InputError
        For a configuration that cannot be.
    """
    from perturbflow.registry.shipped import shipped  # a second to import, and help does without

    config = shipped(files)
    return {kind: TABLES[kind](config) for kind in kinds}

"""Cards of the models, as every section shows them, and the places of the files of a run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from perturbflow.colours import COLOURS, MARKERS
from perturbflow.errors import InputError
from perturbflow.registry.families import FAMILIES, Family
from perturbflow.report.plotting import INK

SHAPES = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.5-3.5h7v7h-7z",
    "D": "M0-4.6 4.6 0 0 4.6-4.6 0z",
    "^": "M0-4.4 4.4 3.6h-8.8z",
    "v": "M0 4.4 4.4-3.6h-8.8z",
    "|": "M-1-4.5h2v9h-2z",
}
"""Markers of figures as SVG paths, for the names of models in text."""


@dataclass(frozen=True)
class ModelCard:
    """A model, as every section shows it."""

    name: str
    kind: str  # learned, baseline, ablation or ceiling
    description: str
    params: dict
    colour: str
    marker: str
    losses: Mapping[str, str] = field(default_factory=dict)  # as in Family
    is_to_beat: bool = False  # the strongest closed form

    @property
    def shape(self) -> str:
        """The marker as an SVG path."""
        return SHAPES[self.marker]


def place_of(path: Path, n: int) -> tuple[str, ...]:
    """Return the last n folders above a file: dataset, split, model and seed stand in the path."""
    return path.parts[-1 - n : -1]


def read_table(paths: Iterable[Path]) -> pd.DataFrame:
    """Return tables below each other; a dataset called 2023 and a gene called NA stay words."""
    words = dict.fromkeys(("dataset", "split", "model", "perturbation", "gene", "metric"), str)
    return pd.concat(
        [pd.read_csv(path, sep="\t", dtype=words, keep_default_na=False, na_values=[""]) for path in paths],
        ignore_index=True,
    )


def _family(run: dict) -> Family:
    for family in FAMILIES.values():
        if family.implementation == run["implementation"]:
            return family
    raise InputError(
        f"run.json of {run['provenance']} names {run['implementation']}, which is no family of this version. Train it "
        "again."
    )


def model_cards(runs: dict[tuple, dict]) -> dict[str, ModelCard]:
    """Return the models in the order of the runs; learned models get their colours first, ceilings have none."""
    first: dict[str, dict] = {}
    for (_, _, model, _), run in runs.items():
        first.setdefault(model, run)
    families = {model: _family(run) for model, run in first.items()}
    kinds = {model: family.kind for model, family in families.items()}
    coloured = [model for kind in ("learned", "baseline", "ablation") for model in first if kinds[model] == kind]
    looks = {model: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, model in enumerate(coloured)}
    return {
        model: ModelCard(
            model,
            kinds[model],
            families[model].description,
            run["params"],
            *looks.get(model, (INK, "|")),
            families[model].losses,
            "to_beat" in families[model].roles,
        )
        for model, run in first.items()
    }

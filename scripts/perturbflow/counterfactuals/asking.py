"""One question, or one design, from the command line, about a model that the workflow has trained."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from perturbflow.counterfactuals.answers import counterfactual
from perturbflow.counterfactuals.design import design
from perturbflow.counterfactuals.figures import draw
from perturbflow.counterfactuals.questions import Asked, check_question, term_of
from perturbflow.counterfactuals.warranty import warranty
from perturbflow.errors import InputError
from perturbflow.io.files import read_json

logger = logging.getLogger(__name__)


def ask(
    run: Path,
    perturbations: list[str],
    output: Path,
    cells: str = "control",
    samples_per_cell: int = 50,
    keep_samples: bool = False,
    groups: str = "cell_type",
    search: str = "null",
    drawn: int = 20,
    annotations: Path | None = None,
) -> dict:
    """Ask what would become of control cells if genes were perturbed in them.

    Needs a finished training: a folder results/{dataset}/{split}/{model}/seed_{n} of this workflow. Writes OUTPUT.h5ad,
    OUTPUT.tsv, OUTPUT.ranking.tsv, OUTPUT.effects.h5ad and four figures; the first question about a model also writes
    its warranty beside it.

    Parameters
    ----------
    run
        The folder of the trained model.
    perturbations
        Genes, or A+B for several at once; all_single asks every perturbed gene of the screen, all_genes every gene
        with a vector, go:0006986 the genes of a GO term, and @FILE those of a text with a label per line.
    output
        Where to write, without suffix.
    cells
        control: the test controls; or JSON that selects among them by obs columns, such as '{"batch": ["1"]}'.
    samples_per_cell, keep_samples, groups, drawn
        As in config/counterfactuals.yaml.
    annotations
        GO annotations, for the genes of a term.
    search
        JSON, such as '{"towards": {"cells": {"perturbation": ["SOX2"]}}, "budget": 3}'.

    Returns
    -------
    The question, as a block of config/counterfactuals.yaml.

    Raises
    ------
    InputError
        If the folder holds no trained model, or the question cannot be answered.
    """
    asked = _as_in_config(perturbations)
    files, trained, further = _opened(run, annotations)
    about = (trained["implementation"], trained["params"])
    of_term = term_of(asked, further["annotations"], further["roles"])
    check_question(*files[:2], asked, further["gene_vectors"], of_term)
    shown = run / "warranty.json", run / "calibration.npz"
    if not all(path.is_file() for path in shown):
        logger.info("checking the model first; once per model")
        warranty(*files, *shown, *about, trained["seed"], trained["scored"])
    query = {
        "perturbations": asked,
        "cells": cells if cells == "control" else _parsed("cells", cells),
        "samples_per_cell": samples_per_cell,
        "keep_samples": keep_samples,
        "groups": groups,
        "search": _parsed("search", search),
        "drawn": drawn,
        "design": None,
        **dict(zip(("dataset", "split", "model"), run.resolve().parts[-4:-1], strict=True)),
    }
    if query["search"]:
        query["search"].setdefault("budget", 10)
    output.parent.mkdir(parents=True, exist_ok=True)
    answers = Path(f"{output}.h5ad"), Path(f"{output}.tsv"), Path(f"{output}.ranking.tsv")
    all_effects = Path(f"{output}.effects.h5ad")
    counterfactual(*files, *shown, *answers, all_effects, *about, query, trained["seed"], trained["scored"], **further)
    draw(*answers, *[Path(f"{output}.{figure}.png") for figure in ("effects", "responders", "map", "heatmap")])
    logger.info(
        "written: %s.h5ad, .tsv, .ranking.tsv, .effects.h5ad and .effects, .responders, .map and .heatmap.png", output
    )
    return query


def design_by_hand(
    run: Path,
    candidates: list[str],
    output: Path,
    budget: int = 50,
    aim: str = "rest",
    targets: list[str] | None = None,
    search: str = "null",
    annotations: Path | None = None,
    each_context: bool = False,
) -> None:
    """Choose which perturbations to measure next, by a `set_gp` that the workflow has trained.

    Parameters
    ----------
    run, search, annotations
        As in `ask`.
    candidates, targets
        As the perturbations of `ask`; without targets the candidates themselves are to be predicted.
    output
        Table to be written (`design.design`).
    budget, aim, each_context
        As in config/counterfactuals.yaml.
    """
    if aim == "interactions" and each_context:
        raise InputError("each_context: the aim interactions compares combinations over all contexts; leave it out.")
    files, trained, further = _opened(run, annotations)
    query = {
        "perturbations": _as_in_config(candidates),
        "design": {
            "aim": aim,
            "budget": budget,
            "targets": _as_in_config(targets) if targets else None,
            "each_context": each_context,
        },
        "search": _parsed("search", search),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    about = trained["implementation"], trained["params"]
    design(*files, output, *about, query, trained["seed"], trained["scored"], **further)
    logger.info("written: %s", output)


def _opened(run: Path, annotations: Path | None) -> tuple[tuple[Path, Path, Path], dict, dict]:
    """Return pairs, embeddings and model of a finished training, its run.json, and files on further genes.

    Raises
    ------
    InputError
        If the folder holds no trained model.
    """
    model = next((file for name in ("model.ckpt", "model.npz") if (file := run / name).is_file()), None)
    needed = {
        "run.json": run / "run.json",
        "pairs.h5ad": run.parents[1] / "pairs.h5ad",
        "embeddings.parquet": run.parents[1] / "embeddings.parquet",
    }
    missing = [str(path) for path in needed.values() if not path.is_file()]
    if model is None or missing:
        absent = "there is no " + ("model.ckpt or model.npz in it" if model is None else " and no ".join(missing))
        raise InputError(
            f"--run {run}: {absent}. It takes the folder of a model that the workflow has trained, "
            "results/{dataset}/{split}/{model}/seed_{n}."
        )
    everyone = run.parents[1] / "gene_vectors.parquet"
    further = {
        "gene_vectors": everyone if everyone.is_file() else None,
        "annotations": [annotations] if annotations else [],
        "roles": ["annotations"] if annotations else [],
    }
    return (needed["pairs.h5ad"], needed["embeddings.parquet"], model), read_json(needed["run.json"]), further


def _as_in_config(perturbations: list[str]) -> Asked:
    """Return the perturbations of a command as config/counterfactuals.yaml has them."""
    if len(perturbations) == 1:
        only = perturbations[0]
        if only in ("all_single", "all_genes"):
            return only
        if re.fullmatch(r"[a-z0-9_]+:\d{7}", only):
            return {"genes_of": only}
        if only.startswith("@"):
            return {"file": only[1:]}
    return perturbations


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f'--{name} {text}: this is no JSON ({error}). Example: \'{{"batch": ["1"]}}\'.') from error

"""The page on one question: the question in words, trust first, and nothing that it would have to fetch."""

import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import QUERY, Prepared, ask

from perturbflow.pairs import Pairs
from perturbflow.registry.families import FAMILIES
from perturbflow.report.answer_page import answer_page
from perturbflow.report.what_if import found_words
from perturbflow.train import train

ADDITIVE = FAMILIES["additive"].implementation


@pytest.fixture(scope="module")
def pages(prepared: dict[str, Prepared], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the pages of a question on two perturbations, one of them unseen, and of a search."""
    here, folder = prepared["unseen_perturbation"], tmp_path_factory.mktemp("page")
    train(here.pairs, here.embeddings, here.audit, folder / "model.npz", folder / "run.json", ADDITIVE, {}, 0)
    held_out = next(label for label in Pairs.open(here.pairs).roles("test").perturbations if "+" not in label)
    seen = next(label for label in Pairs.open(here.pairs).roles("train").perturbations if "+" not in label)
    asked = {
        "plain": {"perturbations": [held_out, seen]},
        "search": {
            "perturbations": "all_single",
            "search": {"towards": {"cells": {"perturbation": [seen]}}, "budget": 2},
        },
    }
    found = {"held out": held_out, "seen": seen}
    for name, query in asked.items():
        (folder / name).mkdir()
        answer = ask(here, folder / "model.npz", folder / name, ADDITIVE, {}, **query)
        files = [Path(f"{answer}{suffix}") for suffix in (".h5ad", ".tsv", ".ranking.tsv")]
        about = {**QUERY, **query, "dataset": "mine", "split": "a_split", "model": "additive"}
        answer_page(*files, folder / name / "calibration.npz", folder / f"{name}.html", about)
        found[name] = (folder / f"{name}.html").read_text()
        found[f"{name} ranking"] = pd.read_csv(files[2], sep="\t")
    return found


def test_a_page_says_what_was_asked_and_how_far_to_trust_it(pages: dict) -> None:
    page, ranking = pages["plain"], pages["plain ranking"]
    assert f"What if {pages['held out']} or {pages['seen']} were perturbed in these cells?" in page
    for words in ranking["trust"]:
        assert words[1:] in page
    assert "Measured in training" in page
    for part in ("What the answer leans on", "What would have to be measured", "Warranty of the model", "@media print"):
        assert part in page
    assert f"{pages['held out']} itself, in about" in page
    assert page.count("<svg") >= 2
    assert not re.search(r'(src|href)="(?!data:|#)', page), "it fetches nothing"


def test_a_page_of_a_search_has_all_candidates(pages: dict) -> None:
    page, ranking = pages["search"], pages["search ranking"]
    assert (
        f"Which of {len(ranking)} perturbations moves these cells towards cells of perturbation {pages['seen']}?"
        in page
    )
    assert page.index(found_words(ranking)) < page.index("<h2>"), "the answer comes first"
    for label in ranking["perturbation"]:
        assert f"<td>{label}</td>" in page

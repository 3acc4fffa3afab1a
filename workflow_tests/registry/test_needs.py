"""What a plan needs: it adds up, follows shapes, and is told for large plans alone."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from perturbflow.registry.needs import Needs

SMALL = {"shape": [10_000, 2_000], "bytes": 10**6}


def needs(runs: list[tuple[str, str, str]], **datasets: dict) -> Needs:
    """Return the needs of runs (dataset, split, model) on these screens."""
    table = pd.DataFrame(runs, columns=["dataset", "split", "model"])
    plan = SimpleNamespace(
        config={"datasets": datasets, "genes": {"n_hvg": 2000}},
        datasets=list(dict.fromkeys(table["dataset"])),
        divisions=table[["dataset", "split"]].drop_duplicates(),
        runs=table,
    )
    return Needs.of(plan)


def test_screens_splits_and_runs_add_up() -> None:
    one = needs([("a", "x", "m")], a=SMALL)
    two_models = needs([("a", "x", "m"), ("a", "x", "n")], a=SMALL)
    two_splits = needs([("a", "x", "m"), ("a", "y", "m")], a=SMALL)
    two_screens = needs([("a", "x", "m"), ("b", "x", "m")], a=SMALL, b=SMALL)
    assert one.n_bytes < two_models.n_bytes < two_splits.n_bytes < two_screens.n_bytes == 2 * one.n_bytes
    assert two_screens.hours == pytest.approx(2 * one.hours)
    assert two_screens.memory_mb == one.memory_mb, "of the largest job"


def test_a_union_is_as_large_as_its_screens_and_unknown_shapes_are_named() -> None:
    union = {"union": ["a", "b"]}
    both = needs([("u", "x", "m")], a=SMALL, b={**SMALL, "shape": [30_000, 2_000]}, u=union)
    assert both.memory_mb > needs([("b", "x", "m")], b={**SMALL, "shape": [30_000, 2_000]}).memory_mb
    assert needs([("u", "x", "m")], a=SMALL, b={}, u=union).unknown == ["u"]
    found = needs([("c", "x", "m"), ("large", "x", "m")], c={}, large={"shape": [2_000_000, 8_000]})
    assert found.unknown == ["c"]
    assert "not counted, as no shape is declared: c." in found.sentence(Path())


def test_a_plan_that_fits_everywhere_says_nothing() -> None:
    assert needs([("a", "x", "m")], a=SMALL).sentence(Path()) == ""
    large = needs([("a", "x", "m")], a={"shape": [2_000_000, 8_000], "bytes": 8 * 10**9})
    assert f"about {large.n_bytes / 1e9:,.0f} GB of disk" in large.sentence(Path())

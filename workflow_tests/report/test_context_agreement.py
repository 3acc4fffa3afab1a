"""Agreement of the effects of contexts, on lines whose shares of conserved and specific effects are known."""

from dataclasses import replace

import numpy as np
import pytest
from made_lines import CONSERVED, SPECIFIC, made_lines

from perturbflow.report.context_agreement import Agreement, matrix_figure
from perturbflow.report.plotting import Plots
from perturbflow.splits.contexts import Support


def test_agreement_is_the_conserved_share_and_tells_which_transfers_to_trust() -> None:
    found = Agreement.of(made_lines(n_perturbations=40).held_out("line2"), "dataset")
    assert found is not None
    assert list(found.matrix.index) == ["line0", "line1", "line3"]
    assert found.held_out == ["line2"]
    assert np.isnan(found.matrix.to_numpy()[np.arange(3), [0, 1, 2]]).all(), "no context is compared with itself"
    assert np.nanmean(found.matrix.to_numpy()) == pytest.approx(CONSERVED / (CONSERVED + SPECIFIC), abs=0.06)
    assert (found.n_shared["line2"] == 40).all()
    assert found.trust > 0.2
    assert "r 0.5" in found.words
    assert f"over {found.n_tested} tested perturbations" in found.words
    assert "The more its sources agree" in found.words
    against = replace(found, trust=-0.8)
    assert "is no sign that they tell" in against.words
    assert "The more" not in against.words


def test_a_context_that_trains_in_part_is_source_and_target() -> None:
    lines = made_lines(n_perturbations=30)
    found = Agreement.of(lines.held_out("line2", Support(0.4)), "dataset")
    assert found is not None
    assert found.held_out == ["line2 (tested)"]
    assert "line2" in found.matrix.index
    assert np.isnan(found.matrix.loc["line2", "line2 (tested)"]), "they share no perturbation"
    assert found.n_shared.loc["line0", "line2 (tested)"] == 18


def test_one_source_makes_no_matrix() -> None:
    assert Agreement.of(made_lines(2, 8).held_out("line1"), "dataset") is None


def test_the_figure_has_every_context_and_a_number_in_every_cell() -> None:
    found = Agreement.of(made_lines(n_perturbations=10, n_genes=30).held_out("line3"), "dataset")
    assert found is not None
    svg = str(Plots("contexts", 100_000).svg("matrix", matrix_figure, found))
    for name in found.matrix.columns:
        assert name in svg
    assert svg.count(">.") + svg.count(">-0.") + svg.count(">-.") >= found.matrix.notna().to_numpy().sum()

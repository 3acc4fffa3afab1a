"""From a harmonized screen to its description, before models are trained."""

import logging
from pathlib import Path

from perturbflow.io.files import atomic, read_json, write_json
from perturbflow.quality.facts import batch_table, perturbation_facts, summary
from perturbflow.quality.power import Power
from perturbflow.quality.response import responses
from perturbflow.quality.sample import Sample
from perturbflow.report.plotting import Plots
from perturbflow.report.rendering import render
from perturbflow.report.screens import screen_section

logger = logging.getLogger(__name__)

FIGURE_BYTES = 5_000_000
ROWS = 5000
TEMPLATE = "screen_page.html"


def quality(harmonized: Path, harmonization: Path, table: Path, account: Path, page: Path) -> None:
    """Describe a screen: cells, controls, own genes, response and escaping cells of every perturbation.

    It uses all cells, held-out ones too. No split, training or prediction reads the results. The tables of the
    benchmark group scores by them, and people read them.

    Parameters
    ----------
    harmonized, harmonization
        The screen and its account.
    table
        quality.tsv to be written: one row per perturbation (`facts.perturbation_facts`).
    account
        quality.json to be written: the screen as a whole (`facts.summary`).
    page
        HTML to be written: both as one page that fetches nothing.
    """
    known = read_json(harmonization)
    sample = Sample(harmonized)
    batches = batch_table(sample.obs)
    power = Power.of(sample)
    found = perturbation_facts(sample.obs, batches, known["efficacy"], responses(sample))
    found = found.join(power.table(found["n_cells"]))
    with atomic(table) as partial:
        found.to_csv(partial, sep="\t", float_format="%.6g")
    content = summary(known["dataset"], sample.obs, found, batches, known, power.account(found))
    write_json(account, content)
    for finding in content["findings"]:
        logger.info("%s: %s", finding["about"], finding["text"])
    plots = Plots("screens", FIGURE_BYTES)
    with atomic(page) as partial:
        partial.write_text(render(TEMPLATE, screen=screen_section(account, plots, ROWS)), encoding="utf-8")

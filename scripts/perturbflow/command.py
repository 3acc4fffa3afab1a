"""The command `perturbflow`: lists, scores of predictions, exports, audits, splits, what-if questions and designs.

Each verb calls one function of the package, imported when it is needed, so that help waits for no library.
"""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from perturbflow import __version__  # cli first: it limits threads
from perturbflow.cli import THREADS
from perturbflow.errors import InputError
from perturbflow.io.files import write_json
from perturbflow.listing import KINDS, listed

if TYPE_CHECKING:
    import pandas as pd

REFERENCES = ("no_change", "technical_duplicate", "perfect_mean")  # a score is read between these
EXTRAS = {"torch": "models", "pytorch_lightning": "models"}
Folder = click.Path(path_type=Path)

logger = logging.getLogger(__name__)


class _Verbs(click.Group):
    """Verbs whose bad input ends in one message and exit status 1; anything else is a bug, and a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            if extra := EXTRAS.get(error.name or ""):
                raise click.ClickException(f"this needs {error.name}: pip install 'perturbflow[{extra}]'.") from error
            raise


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message="%(prog)s %(version)s")
def perturbflow() -> None:
    """Score predictions of single-cell perturbations alike, whoever made them.

    Results of the workflow are looked for where it writes them: results/DATASET/SPLIT. The workflow itself is run with
    snakemake.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True
    )


def _require(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return files of results/DATASET/SPLIT; InputError names those that are not there."""
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        fault = "there is no such folder" if not folder.is_dir() else f"there is no {' and no '.join(missing)} in it"
        raise InputError(
            f"{folder}: {fault}. It takes results/DATASET/SPLIT of a run of the workflow; `snakemake pairs` makes its "
            "files."
        )
    return files


@perturbflow.command("list")
@click.argument("kinds", nargs=-1, type=click.Choice(KINDS), metavar="[datasets|splits|models|metrics]...")
@click.option(
    "--configfile", "files", multiple=True, type=Folder, help="A configuration of yours, whose blocks are listed too."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
def list_(kinds: tuple[str, ...], files: tuple[Path, ...], as_json: bool) -> None:
    """Show which datasets, splits, models and metrics exist."""
    tables = listed(kinds or KINDS, files)
    if as_json:
        click.echo(json.dumps(tables, indent=1, ensure_ascii=False))
        return
    import pandas as pd

    for kind, rows in tables.items():
        click.echo(f"{kind}\n" + pd.DataFrame(rows).to_string(index=False) + "\n")


@perturbflow.command()
@click.argument("file", type=Folder)
@click.option(
    "--against",
    required=True,
    type=Folder,
    metavar="results/DATASET/SPLIT",
    help="The split whose measured cells are the truth.",
)
@click.option(
    "--output",
    type=Folder,
    help="All scores, one row per metric × perturbation, as metrics.tsv of the workflow; FILE.metrics.tsv without it.",
)
@click.option("--scale", type=click.Choice(["log1p", "linear", "counts"]), help="Of the values; log1p without it.")
@click.option("--target-sum", type=float, help="Sum that its counts are normalized to; found without it.")
@click.option("--values", type=click.Choice(["expression", "effect"]), help="expression without it.")
@click.option("--label", help="Column of obs that names the perturbation; perturbation without it.")
@click.option("--separator", help="Text between the members of a combination; + without it.")
def score(file: Path, against: Path, output: Path | None, **declared: Any) -> None:
    """Score predictions on a split, and say the verdict in a sentence.

    FILE is predictions.h5ad of the workflow, or any h5ad of predicted cells or of one mean per perturbation, or a table
    of means (tsv, csv, parquet). Genes and members of labels may come in any order. The scale is checked by measured
    controls and converted where that is exact. Prints the verdict against the best closed forms that the workflow has
    scored there, then the headline metrics, which it rests on: the mean over perturbations; beside it the floor
    (no_change), the ceiling (technical_duplicate) and the ceiling without its own noise (perfect_mean) on the same
    perturbations. All metrics are in the file that it names last.
    """
    (pairs,) = _require(against, ("pairs.h5ad",))
    logger.info("%s is read and scored", file)
    from perturbflow import api
    from perturbflow.evaluation.table import write_scores

    place = against.resolve()
    params = {name: value for name, value in declared.items() if value is not None}
    table = api.score(file, pairs, params).assign(dataset=place.parent.name, split=place.name, model=file.stem)
    labels, output = table["perturbation"].unique(), output or Path(f"{file.stem}.metrics.tsv")
    click.echo(f"{file} on {against}: {len(labels)} perturbations\n{_verdict(table, against)}\n")
    click.echo(_summary(table, against).to_string(index=False, na_rep="–", float_format="{:.4f}".format))
    write_scores(output, table)
    click.echo(f"\nAll {table['metric'].nunique()} metrics of every perturbation: {output}")


def _verdict(table: "pd.DataFrame", folder: Path) -> str:
    """Return the verdict on scores beside those of the models that the workflow has scored on the split."""
    from perturbflow.benchmark import judged_beside
    from perturbflow.io.files import read_json
    from perturbflow.registry.families import FAMILIES
    from perturbflow.registry.shipped import shipped

    model = str(table["model"].iloc[0])
    families, files = {model: "predictions"}, {}
    of_code = {family.implementation: name for name, family in reversed(FAMILIES.items())}
    for file in sorted(
        folder.glob("*/seed_*/metrics.tsv"), key=lambda path: (path.parts[-3], len(path.parts[-2]), path)
    ):
        name, account = file.parts[-3], file.with_name("run.json")
        # A model of another version of the code may be of a class that is gone.
        family = of_code.get(read_json(account)["implementation"]) if account.is_file() else None
        if name not in families and family:
            families[name], files[name] = family, file
    if not files:
        return f"No verdict: no model of the workflow is scored in {folder}; `snakemake evaluated` does that."
    row = judged_beside(table, files, families, shipped()["verdicts"]["least_difference"])
    return f"Verdict on {model}: {row['sentence']}" + f"\nMind: {row['caveats']}" * bool(row["caveats"])


def _summary(table: "pd.DataFrame", folder: Path) -> "pd.DataFrame":
    """Return one row per headline metric: which way is better, the mean, and that of floor and ceilings."""
    import pandas as pd

    from perturbflow.evaluation.metrics import METRICS

    of_metrics = table.groupby("metric")["value"].mean()
    headlines = [metric for name, metric in METRICS.items() if metric.headline and name in of_metrics.index]
    means = of_metrics[[metric.name for metric in headlines]]
    shown = pd.DataFrame({
        "of": [metric.family.replace("_", " ") for metric in headlines], "metric": means.index,
        "better": [metric.direction for metric in headlines], "mean": means.to_numpy(),
    })  # fmt: skip
    for model in REFERENCES:
        files = sorted(folder.glob(f"{model}/seed_*/metrics.tsv"))
        if files:
            known = pd.concat([pd.read_csv(file, sep="\t") for file in files])
            known = known[known["perturbation"].isin(table["perturbation"])].groupby("metric")["value"].mean()
            shown[model] = known.reindex(means.index).to_numpy()
    return shown


@perturbflow.command()
@click.argument("folder", type=Folder, metavar="results/DATASET/SPLIT[/MODEL/seed_N]")
@click.argument("target", type=Folder, metavar="FOLDER")
def export(folder: Path, target: Path) -> None:
    """Write what a model made elsewhere may see of a split, or predictions for other evaluators.

    Of results/DATASET/SPLIT, FOLDER gets train.h5ad, controls.h5ad to start from, targets.tsv to be predicted,
    genes.tsv, embeddings.tsv, the layouts of GEARS and cell-load, and a README.md that says what to hand back. No
    perturbed test cell is in it. Of a run, results/DATASET/SPLIT/MODEL/seed_N, it gets predicted and measured cells as
    cell-eval and the preset vcc2026 of cell-eval2 read them, and a README.md with their commands.
    """
    if (folder / "predictions.h5ad").is_file():
        from perturbflow.evaluation.layouts import layouts

        run = folder.resolve()
        (pairs,) = _require(run.parents[1], ("pairs.h5ad",))
        for file in layouts(pairs, folder / "predictions.h5ad", target, " × ".join(run.parts[-4:])):
            click.echo(file)
        return
    pairs, split = _require(folder, ("pairs.h5ad", "split.json"))
    logger.info("%s is read", folder)
    from perturbflow.export import export

    place, vectors = folder.resolve(), folder / "embeddings.parquet"
    known = vectors if vectors.is_file() else None
    for file in export(pairs, split, target, f"{place.parent.name} × {place.name}", embeddings=known):
        click.echo(file)


@perturbflow.command()
@click.argument("folder", type=Folder, metavar="results/DATASET/SPLIT")
def audit(folder: Path) -> None:
    """Check a split for leaks.

    A leak is anything of held-out cells in the data that models are trained on. All checks are made anew; nothing is
    written.
    """
    split, pairs, embeddings = _require(folder, ("split.json", "pairs.h5ad", "embeddings.parquet"))
    (harmonized,) = _require(folder.resolve().parent, ("harmonized.h5ad",))
    logger.info("%s is read", folder)
    from perturbflow import api
    from perturbflow.embeddings import Embeddings

    for name, outcome in api.audit(harmonized, split, pairs, Embeddings.read(embeddings).table).items():
        click.echo(f"{outcome}  {name}")


@perturbflow.command()
@click.argument("file", type=Folder)
@click.option(
    "--kind",
    required=True,
    help="unseen_perturbation, unseen_combination, unseen_dose, unseen_context, random_cells or file.",
)
@click.option(
    "--test-fraction",
    type=float,
    help="Of genes or compounds, combinations, doses, contexts or cells; 0.25 without it.",
)
@click.option("--validation-fraction", type=float, help="Of the same; 0.1 without it.")
@click.option("--seed", type=int, help="0 without it.")
@click.option("--folds", type=int, help="In place of a test fraction: as many parts, each the test set of one fold.")
@click.option("--fold", type=int, help="Which fold, from 0.")
@click.option("--covariate", help="Kind unseen_context: batch, cell_type or dataset.")
@click.option(
    "--held-out", multiple=True, help="A gene, combination or context to hold out, by the kind; may be repeated."
)
@click.option("--path", help="Kind file: JSON with train, validation and test lists of labels.")
@click.option("--output", required=True, type=Folder, help="The JSON to be written.")
def split(file: Path, kind: str, output: Path, held_out: tuple[str, ...], **options: Any) -> None:
    """Divide a screen, or a list of labels, into roles.

    The roles are training, validation and test. FILE is a harmonized.h5ad: then OUTPUT is a split.json, with a role for
    every cell. Or FILE is text with a label per line, GENE or A+B: then OUTPUT holds three lists of labels, which a
    split of the kind `file` reads.
    """
    if not file.is_file():
        raise InputError(f"there is no file {file}; it takes a harmonized.h5ad, or text with a label per line.")
    from perturbflow import api

    options["held_out"] = list(held_out) or None
    if file.suffix == ".h5ad":
        content = api.split(file, kind, name=output.stem, **options)
        roles = content["perturbations"]
    else:
        labels = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        content = roles = api.split_labels([label for label in labels if label], kind, **options)
    write_json(output, content)
    click.echo("\n".join(f"{role}: {len(names)} perturbations" for role, names in roles.items()))


@perturbflow.command()
@click.argument("run", type=Folder, metavar="results/DATASET/SPLIT/MODEL/seed_N")
@click.argument("perturbations", nargs=-1, required=True, metavar="GENE|A+B|all_single|all_genes|go:TERM|@FILE...")
@click.option(
    "--output",
    required=True,
    type=Folder,
    help="Where to write, without suffix: .html, .h5ad, .tsv, .ranking.tsv and four figures.",
)
@click.option(
    "--cells", default="control", show_default=True, help='control, or JSON that selects, such as \'{"batch": ["1"]}\'.'
)
@click.option("--samples-per-cell", default=50, show_default=True, help="Outcomes sampled per cell.")
@click.option("--keep-samples", is_flag=True, help="Store every outcome, not their mean alone.")
@click.option("--groups", default="cell_type", show_default=True, help="The obs column that answers are given by.")
@click.option("--search", default="null", help="JSON: the state to search perturbations towards.")
@click.option("--drawn", default=20, show_default=True, help="Of more than 400 perturbations, so many have cells.")
@click.option("--annotations", type=Folder, help="GO annotations, for the genes of a term such as go:0006986.")
def ask(run: Path, perturbations: tuple[str, ...], output: Path, **options: Any) -> None:
    """Ask a trained model a what-if question.

    What would become of cells if these genes were perturbed in them? The first question about a model also checks the
    model and writes its warranty beside it. Options are explained in config/README.md, counterfactuals.yaml.
    """
    logger.info("%s is asked, with OMP_NUM_THREADS %s", run, THREADS)
    from perturbflow.counterfactuals import asking

    asked = asking.ask(run, list(perturbations), output, **options)
    from perturbflow.report.answer_page import answer_page

    cells, effects, ranking, page = (Path(f"{output}{suffix}") for suffix in (".h5ad", ".tsv", ".ranking.tsv", ".html"))
    answer_page(cells, effects, ranking, run / "calibration.npz", page, asked)


@perturbflow.command()
@click.argument("run", type=Folder, metavar="results/DATASET/SPLIT/set_gp/seed_N")
@click.argument("candidates", nargs=-1, metavar="[GENE|A+B|all_single|all_genes|go:TERM|@FILE]...")
@click.option("--budget", default=50, show_default=True, help="How many are chosen.")
@click.option(
    "--aim",
    default="rest",
    show_default=True,
    type=click.Choice(["rest", "target", "interactions"]),
    help="The rest of the list is predicted best; the state of --search is reached; or interactions are found.",
)
@click.option("--each-context", is_flag=True, help="Candidates are perturbations in each context of training.")
@click.option("--targets", multiple=True, help="To be predicted, if not the candidates themselves; may be repeated.")
@click.option("--search", default="null", help="JSON: the state to reach, as in ask.")
@click.option("--annotations", type=Folder, help="GO annotations, for the genes of a term such as go:0006986.")
@click.option("--output", required=True, type=Folder, help="The table to be written.")
def design(run: Path, candidates: tuple[str, ...], output: Path, targets: tuple[str, ...], **options: Any) -> None:
    """Choose which perturbations to measure next.

    Candidates are all single genes of the screen that training did not measure, or those that are named. They are
    chosen one by one, each given that those before it are measured. OUTPUT has them in this order, with their gains.
    """
    import pandas as pd

    from perturbflow.counterfactuals import asking

    asking.design_by_hand(run, list(candidates) or ["all_single"], output, targets=list(targets) or None, **options)
    click.echo(pd.read_csv(output, sep="\t").head(20).to_string(index=False, na_rep="–"))


def main() -> None:
    """Run the command of this process."""
    perturbflow(prog_name="perturbflow")


if __name__ == "__main__":
    main()

"""The leaderboard: frozen splits, rows of predictions, and the page that is made of them.

    python leaderboard/board.py freeze results/renge2023/unseen_perturbation   # once per split
    python leaderboard/board.py add results/renge2023/unseen_perturbation theirs.h5ad --name mine --who "A. Author" \
        --command "..." --commit 1a2b3c4                                       # a row
    python leaderboard/board.py rescore                                        # all rows, and the pages

A row is a folder with predictions and row.json. `rescore` scores the predictions as `perturbflow score` does, on
pairs.h5ad of the frozen split, keeps what it found in scored/, and writes the tables of README.md and index.html.
"""

import argparse
import datetime
import re
import shutil
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "scripts"))

from perturbflow import api
from perturbflow.errors import InputError
from perturbflow.evaluation.bootstrap import mean_with_interval
from perturbflow.evaluation.metrics import METRICS
from perturbflow.io.files import file_digest, read_json, write_json
from perturbflow.registry.families import FAMILIES
from perturbflow.report.rendering import render

METRICS_SHOWN = {"error": "l2_heg1000_off_target", "correlation": "pearson_delta_pert_off_target"}
NO_CHANGE, REPLICATE = "no_change", "technical_duplicate"
KEPT = ("sha256", "perturbations", "spec")  # of split.json: lists, and hashes of lists and of cells
LARGEST = 20_000_000  # bytes of predictions in a row: means are small
TRACK = (-1.0, 1.25)  # progress that the page shows
TABLES = "<!-- tables: all below is written by board.py rescore -->\n"


# --- frozen splits ---------------------------------------------------------------------------------------------------


def split_of(results: Path) -> str:
    """Return the name of a split on the board, of results/DATASET/SPLIT."""
    place = results.resolve()
    return f"{place.parent.name}.{place.name}"


def freeze(board: Path, results: Path) -> Path:
    """Write the frozen split, and its SHA-256 beside the others; a frozen split is never written again."""
    target = board / "splits" / f"{split_of(results)}.json"
    if target.exists():
        raise InputError(f"{target} is frozen. Another split has another name.")
    content = read_json(results / "split.json")
    write_json(target, {key: content[key] for key in KEPT})
    with (target.parent / "SHA256SUMS").open("a") as file:
        file.write(f"{file_digest(target)}  {target.name}\n")
    return target


def check_frozen(board: Path, results: Path) -> None:
    """Raise InputError unless results have the perturbations and the cells of the frozen split in every role."""
    target = board / "splits" / f"{split_of(results)}.json"
    if not target.is_file():
        raise InputError(f"{split_of(results)} is not on the board. Freeze it: board.py freeze {results}.")
    sums = dict(reversed(line.split()) for line in (target.parent / "SHA256SUMS").read_text().splitlines())
    if sums.get(target.name) != file_digest(target):
        raise InputError(f"{target} was changed after it was frozen: its SHA-256 is not that of SHA256SUMS.")
    frozen, made = read_json(target)["sha256"], read_json(results / "split.json")["sha256"]
    for role, hashes in frozen.items():
        if different := [kind for kind, value in hashes.items() if made[role][kind] != value]:
            raise InputError(
                f"{results}/split.json has other {' and '.join(different)} of the role {role} than the frozen split. "
                "Make it with the registered blocks of screen and split, and the default qc."
            )


# --- rows ------------------------------------------------------------------------------------------------------------


def add(board: Path, results: Path, predictions: Path, name: str, *, means: bool = False, **about: str) -> Path:
    """Check predictions by scoring them, and write their row; return its folder.

    With `means` the row has the mean of each perturbation, of a predictions.h5ad of the workflow.
    """
    check_frozen(board, results)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", name):
        raise InputError(f"'{name}': a name has small letters, digits and _.")
    if predictions.stat().st_size > LARGEST and not means:
        raise InputError(f"{predictions} has more than {LARGEST / 1e6:.0f} MB. Hand in means (--means, or a table).")
    params = {key: about.pop(key) for key in ("values", "scale") if about.get(key)}
    api.score(predictions, results / "pairs.h5ad", params)
    folder = board / "rows" / split_of(results) / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("predictions.tsv" if means else f"predictions{predictions.suffix}")
    if means:
        _means_of(predictions).to_csv(file, sep="\t")
    else:
        shutil.copyfile(predictions, file)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    known = {key: value for key, value in about.items() if value}
    write_json(folder / "row.json", {"date": date, **known, "params": params, "sha256": file_digest(file)})
    return folder


def _means_of(predictions: Path) -> pd.DataFrame:
    """Return perturbations × genes."""
    import anndata as ad

    cells = ad.read_h5ad(predictions)
    return cells.to_df().groupby(cells.obs["perturbation"].astype(str)).mean().rename_axis("perturbation").round(5)


def scores_of(results: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return perturbations × metrics of every scored model of a split, and the names of the closed forms among them."""
    kinds = {family.implementation: family.kind for family in FAMILIES.values()}
    found, closed = {}, []
    for folder in sorted({file.parent.parent for file in results.glob("*/seed_*/metrics.tsv")}):
        tables = [pd.read_csv(file, sep="\t") for file in sorted(folder.glob("seed_*/metrics.tsv"))]
        kind = kinds.get(read_json(next(folder.glob("seed_*/run.json")))["implementation"])
        if kind == "baseline" or folder.name == REPLICATE:
            found[folder.name] = pivoted(pd.concat(tables))
            closed += [folder.name] * (kind == "baseline")
    if missing := {NO_CHANGE, REPLICATE} - set(found):
        raise InputError(f"{results}: {' and '.join(sorted(missing))} is not scored. Run leaderboard/config.yaml.")
    return found, closed


def pivoted(scores: pd.DataFrame) -> pd.DataFrame:
    """Return perturbations × metrics, the mean over seeds."""
    return scores.pivot_table(index="perturbation", columns="metric", values="value", dropna=False)


def progress(row: pd.Series, best: pd.Series, replicate: pd.Series) -> tuple[float, float, float]:
    """Return the way from the best closed form (0) to the replicate (1), and its 95 % interval over perturbations.

    The interval is that of the paired difference to the best closed form. The length of the way is that of all
    perturbations: of some resamples it would be near zero, and their share of it of any size.

    Each series has the values of one metric by perturbation.
    """
    table = pd.concat([row, best, replicate], axis=1).dropna().to_numpy()
    length = (table[:, 2] - table[:, 1]).mean()
    found = mean_with_interval(((table[:, 0] - table[:, 1]) / length).tolist())
    return found["mean"] + 0.0, found["low"] + 0.0, found["high"] + 0.0  # no negative zero


def scored(board: Path, results: Path) -> dict:
    """Return what the page shows of one split: references and rows, by the progress of their error."""
    check_frozen(board, results)
    known, closed = scores_of(results)
    loss = {m: {name: float(METRICS[m].loss(known[name][m].mean())) for name in closed} for m in METRICS_SHOWN.values()}
    best = {m: min(losses, key=lambda name, losses=losses: losses[name]) for m, losses in loss.items()}

    def ways(table: pd.DataFrame) -> dict:
        return {
            name: {
                "mean": round(float(table[m].mean()), 5),
                "progress": [round(x, 3) for x in progress(table[m], known[best[m]][m], known[REPLICATE][m])],
            }
            for name, m in METRICS_SHOWN.items()
        }

    lines = [{"model": name, **ways(known[name])} for name in [REPLICATE, *closed]]
    for file in sorted((board / "rows" / split_of(results)).glob("*/row.json")):
        row, predictions = read_json(file), next(file.parent.glob("predictions.*"))
        if file_digest(predictions) != row["sha256"]:
            raise InputError(f"{predictions} is not the file of its row.json: its SHA-256 differs.")
        table = pivoted(api.score(predictions, results / "pairs.h5ad", row["params"]))
        about = {key: row[key] for key in ("who", "date", "command", "commit", "url") if key in row}
        lines.append({"model": file.parent.name, **ways(table), **about})
    return {
        "split": split_of(results),
        "sha256": file_digest(board / "splits" / f"{split_of(results)}.json"),
        "n_perturbations": len(known[NO_CHANGE]),
        "best": {name: best[m] for name, m in METRICS_SHOWN.items()},
        "lines": sorted(lines, key=lambda line: -line["error"]["progress"][0]),
    }


# --- the page --------------------------------------------------------------------------------------------------------


def markdown_of(split: dict) -> str:
    """Return the table of one split for README.md."""
    lines = []
    for line in split["lines"]:
        is_row, cells = "who" in line, []
        for metric in METRICS_SHOWN:
            way, low, high = line[metric]["progress"]
            cells += [f"{line[metric]['mean']:.3f}", f"{way:+.2f}" + f" ({low:+.2f}, {high:+.2f})" * is_row]
        made = f"`{line['command']}`" + (f" at {line['commit'][:7]}" if "commit" in line else "") if is_row else ""
        name, who = (line["model"], f"{line['who']}, {line['date']}") if is_row else (f"*{line['model']}*", "reference")
        lines.append(f"| {' | '.join([name, *cells, who, made])} |")
    best = split["best"]
    return (
        f"### {split['split']}\n\n{split['n_perturbations']} held-out perturbations. Split: "
        f"`splits/{split['split']}.json`, SHA-256 `{split['sha256'][:16]}…`. Best closed form by error: "
        f"{best['error']}; by correlation: {best['correlation']}.\n\n"
        "| model | error ↓ | progress (95 %) | correlation ↑ | progress (95 %) | who, when | command |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )


def rescore(board: Path, results: Path) -> list[str]:
    """Score all rows again, write README.md and index.html; return the splits that were scored.

    Splits whose results are not there keep what scored/ has of them.
    """
    names, kept = [], board / "scored"
    kept.mkdir(exist_ok=True)
    for file in sorted((board / "splits").glob("*.json")):
        dataset, split = file.stem.split(".")
        if (results / dataset / split / "pairs.h5ad").is_file():
            write_json(kept / file.name, scored(board, results / dataset / split))
            names.append(file.stem)
    splits = [read_json(file) for file in sorted(kept.glob("*.json"))]
    before = (board / "README.md").read_text(encoding="utf-8").split(TABLES)[0]
    tables = "\n".join(markdown_of(split) for split in splits)
    (board / "README.md").write_text(f"{before}{TABLES}\n{tables}", encoding="utf-8")
    page = render("page.html", HERE, splits=splits, metrics=METRICS_SHOWN, place=place_on_track)
    (board / "index.html").write_text(page, encoding="utf-8")
    return names


def place_on_track(way: float) -> float:
    """Return where a progress stands on the track of the page, 0 to 100; beyond its ends it stands at the end."""
    low, high = TRACK
    return round(100 * (min(max(way, low), high) - low) / (high - low), 2)


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("freeze").add_argument("results", type=Path)
    row = commands.add_parser("add")
    row.add_argument("results", type=Path)
    row.add_argument("predictions", type=Path)
    for name, help_ in (
        ("name", "of the model"), ("who", "you"), ("command", "that made the predictions"),
        ("commit", "of your code"), ("url", "of your code or paper"), ("values", "expression or effect"),
        ("scale", "log1p, linear or counts"),
    ):  # fmt: skip
        row.add_argument(f"--{name}", help=help_, required=name in ("name", "who", "command"))
    row.add_argument("--means", action="store_true", help="keep means of a predictions.h5ad of the workflow")
    commands.add_parser("rescore").add_argument("--results", type=Path, default=Path("results"))
    arguments = vars(parser.parse_args())
    what = {"freeze": freeze, "add": add, "rescore": rescore}[arguments.pop("what")]
    try:
        print(what(HERE, **arguments))
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

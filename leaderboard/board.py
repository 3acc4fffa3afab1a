"""The leaderboard: frozen splits, rows of predictions, and the page that is made of them.

    python leaderboard/board.py freeze results/renge2023/unseen_perturbation   # once per split
    python leaderboard/board.py add results/renge2023/unseen_perturbation theirs.h5ad --name mine --who "A. Author" \
        --command "..." --commit 1a2b3c4                                       # a row
    python leaderboard/board.py rescore                                        # all rows, and README.md

A row is a folder with predictions and row.json. `rescore` scores the predictions as `perturbflow score` does, on
pairs.h5ad of the frozen split, and writes the tables of README.md. Splits whose results are not there keep their table.
"""

import argparse
import datetime
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "scripts"))

from perturbflow import api
from perturbflow.errors import InputError
from perturbflow.evaluation.bootstrap import resampled_means
from perturbflow.evaluation.metrics import METRICS
from perturbflow.io.files import file_digest, read_json, write_json
from perturbflow.registry.families import FAMILIES

ERROR, CORRELATION = "l2_heg1000_off_target", "pearson_delta_pert_off_target"
NO_CHANGE, REPLICATE = "no_change", "technical_duplicate"
KEPT = ("sha256", "perturbations", "spec")  # of split.json: lists, and hashes of lists and of cells
LARGEST = 20_000_000  # bytes of predictions in a row: means are small
QUANTILES = (0.025, 0.975)


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

    Each series has the values of one metric by perturbation.
    """
    table = pd.concat([row, best, replicate], axis=1).dropna().to_numpy().T[:, None, :]
    resampled = np.concatenate([table.mean(axis=(1, 2))[:, None], resampled_means(table)], axis=1)
    way = (resampled[0] - resampled[1]) / (resampled[2] - resampled[1])
    low, high = np.quantile(way[1:], QUANTILES)
    return float(way[0]) + 0.0, float(low) + 0.0, float(high) + 0.0  # no negative zero


def board_of(board: Path, results: Path) -> str:
    """Return the table of one split in Markdown: references, then rows by the progress of their error."""
    check_frozen(board, results)
    known, closed = scores_of(results)
    loss = {m: {name: float(METRICS[m].loss(known[name][m].mean())) for name in closed} for m in (ERROR, CORRELATION)}
    best = {m: min(losses, key=lambda name, losses=losses: losses[name]) for m, losses in loss.items()}
    lines = []
    for file in sorted((board / "rows" / split_of(results)).glob("*/row.json")):
        row, predictions = read_json(file), next(file.parent.glob("predictions.*"))
        if file_digest(predictions) != row["sha256"]:
            raise InputError(f"{predictions} is not the file of its row.json: its SHA-256 differs.")
        table = pivoted(api.score(predictions, results / "pairs.h5ad", row["params"]))
        ways = {m: progress(table[m], known[best[m]][m], known[REPLICATE][m]) for m in best}
        values = " | ".join(
            f"{table[m].mean():.3f} | {ways[m][0]:+.2f} ({ways[m][1]:+.2f}, {ways[m][2]:+.2f})" for m in best
        )
        made = f"`{row['command']}`" + (f" at {row['commit'][:7]}" if "commit" in row else "")
        lines.append((-ways[ERROR][0], f"| {file.parent.name} | {values} | {row['who']}, {row['date']} | {made} |"))
    for name in [REPLICATE, *closed]:
        ways = {m: progress(known[name][m], known[best[m]][m], known[REPLICATE][m])[0] for m in best}
        values = " | ".join(f"{known[name][m].mean():.3f} | {ways[m]:+.2f}" for m in best)
        lines.append((-ways[ERROR], f"| *{name}* | {values} | reference | |"))
    n = len(known[NO_CHANGE])
    head = (
        f"### {split_of(results)}\n\n{n} held-out perturbations. Split: `splits/{split_of(results)}.json`, SHA-256 "
        f"`{file_digest(board / 'splits' / f'{split_of(results)}.json')[:16]}…`. Best closed form by error: "
        f"{best[ERROR]}; by correlation: {best[CORRELATION]}.\n\n"
        "| model | error ↓ | progress (95 %) | correlation ↑ | progress (95 %) | who, when | command |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(line for _, line in sorted(lines)) + "\n"


def rescore(board: Path, results: Path) -> list[str]:
    """Write the tables of README.md; return the splits that were scored."""
    page, scored = (board / "README.md").read_text(encoding="utf-8"), []
    for file in sorted((board / "splits").glob("*.json")):
        dataset, split = file.stem.split(".")
        if not (results / dataset / split / "pairs.h5ad").is_file():
            continue
        begin, end = f"<!-- board: {file.stem} -->\n", "<!-- board: end -->\n"
        if begin not in page:
            page += f"\n{begin}{end}"
        before, rest = page.split(begin, 1)
        page = f"{before}{begin}{board_of(board, results / dataset / split)}{end}{rest.split(end, 1)[1]}"
        scored.append(file.stem)
    (board / "README.md").write_text(page, encoding="utf-8")
    return scored


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

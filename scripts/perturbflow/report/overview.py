"""The overview: the numbers of runs, and the verdicts on all models."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from perturbflow.report.boards import Board
from perturbflow.report.cards import ModelCard


@dataclass(frozen=True)
class Overview:
    """One row per learned model, one column per dataset × split."""

    counts: list[str]
    columns: list[Board]  # without single folds
    rows: dict[str, list[dict | None]]  # model → row of verdicts.tsv per column
    # Per column: headline metrics that distinguish, and all; None where nothing was calibrated.
    n_distinguishing: list[tuple[int, int] | None]


def _n(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _counts(runs: list[tuple[str, ...]], cards: dict[str, ModelCard]) -> list[str]:
    """Return the numbers of datasets, splits, models, seeds and runs in words."""
    of_kind = Counter(card.kind for card in cards.values())
    kinds = [f"{of_kind['learned']} learned"] if of_kind["learned"] else []
    kinds += [_n(of_kind[kind], kind) for kind in ("baseline", "ablation", "ceiling") if of_kind[kind]]
    return [
        _n(len({dataset for dataset, *_ in runs}), "dataset"),
        _n(len({(dataset, split) for dataset, split, *_ in runs}), "split"),
        f"{_n(len(cards), 'model')} ({', '.join(kinds)})",
        _n(len({seed for *_, seed in runs}), "seed"),
        f"{_n(len(runs), 'run')} in all",
    ]


def _n_distinguishing(board: Board) -> tuple[int, int] | None:
    of_headlines = [
        row["distinguishes"] for row in board.calibration.rows if row["metric"] in board.leaderboard.headlines
    ]
    return (sum(of_headlines), len(of_headlines)) if of_headlines else None


def overview(boards: list[Board], runs: Iterable[tuple[str, ...]], cards: dict[str, ModelCard]) -> Overview:
    """Return the overview of a page.

    Parameters
    ----------
    boards
        The board of every dataset × split.
    runs
        Dataset, split, model and seed of every run.
    """
    columns = [board for board in boards if not board.is_fold]
    learned = [name for name, card in cards.items() if card.kind == "learned"]
    shown = learned or [name for name, card in cards.items() if card.kind != "ceiling"]
    by_model = [{row["model"]: row for row in board.verdicts.rows} for board in columns]
    rows = {model: [of_board.get(model) for of_board in by_model] for model in shown}
    return Overview(_counts(list(runs), cards), columns, rows, [_n_distinguishing(board) for board in columns])

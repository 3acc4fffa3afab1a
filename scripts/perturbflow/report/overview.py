"""What a reader wants to know first: what was run, and which models are better than the best baseline where."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from perturbflow.report.cards import ModelCard


@dataclass(frozen=True)
class Overview:
    """One row per learned model, one column per dataset × split."""

    counts: list[str]
    columns: list  # boards, without single folds
    rows: dict[str, list[dict | None]]  # model → row of verdicts.tsv per column
    n_telling: list[
        tuple[int, int] | None
    ]  # per column, of so many headline metrics; None where nothing was calibrated


def _n(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def overview(boards: list, runs: Iterable[tuple[str, ...]], cards: dict[str, ModelCard]) -> Overview:
    """Return the overview of a page.

    Parameters
    ----------
    boards
        What the page says of every dataset × split.
    runs
        Dataset, split, model and seed of every run.
    """
    runs = list(runs)
    columns = [board for board in boards if not board.is_fold]
    of_kind = Counter(card.kind for card in cards.values())
    others = [_n(of_kind[kind], kind) for kind in ("baseline", "ablation", "ceiling") if of_kind[kind]]
    kinds = ", ".join(([f"{of_kind['learned']} learned"] if of_kind["learned"] else []) + others)
    counts = [
        _n(len({dataset for dataset, *_ in runs}), "dataset"),
        _n(len({(dataset, split) for dataset, split, *_ in runs}), "split"),
        f"{_n(len(cards), 'model')} ({kinds})",
        _n(len({seed for *_, seed in runs}), "seed"),
        f"{_n(len(runs), 'run')} in all",
    ]
    learned = [name for name, card in cards.items() if card.kind == "learned"] or [
        n for n, card in cards.items() if card.kind != "ceiling"
    ]
    by_model = [{row["model"]: row for row in board.verdicts.rows} for board in columns]
    distinguishing = []
    for board in columns:
        of_headlines = [row["tells"] for row in board.calibration.rows if row["metric"] in board.leaderboard.headlines]
        distinguishing.append((sum(of_headlines), len(of_headlines)) if of_headlines else None)
    return Overview(
        counts, columns, {model: [rows.get(model) for rows in by_model] for model in learned}, distinguishing
    )

"""The words of messages."""

import pytest

from perturbflow.wording import capital


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("level with set_gp", "Level with set_gp"),
        ("qc.max_pct_mt = 20 drops nothing", "qc.max_pct_mt = 20 drops nothing"),
        ("12 cells are doubtful", "12 cells are doubtful"),
        ("", ""),
    ],
)
def test_a_sentence_begins_with_a_capital_and_a_key_keeps_its_letters(text: str, shown: str) -> None:
    assert capital(text) == shown

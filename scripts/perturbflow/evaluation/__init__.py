"""Scores of predicted cells against measured ones.

Notation: x̄ mean of the measured cells of a perturbation (half 'b', the same for every model), c̄ mean of the measured
controls of the scored role, weighted as the perturbation's cells are over batch and cell type, x̂ mean of the predicted cells as they
stand, moved to the same weights by the measured controls where theirs are others; all log1p-normalized. Cells that differ from c̄ by less
than half a count in one cell say that nothing changes: x̂ = c̄. The measured controls are used on both sides.

`inputs` brings predicted and measured cells together as `Scored` (`scored`; `ranks` does the tests); `pseudobulk`, `differential` and
`distributions` compute the metrics from it, `metrics` says what they mean, and `table` writes metrics.tsv.
"""

from perturbflow.evaluation.inputs import N_HIGH_EXPRESSION, score_inputs
from perturbflow.evaluation.metrics import METRICS, Metric
from perturbflow.evaluation.scored import Differential, Scored
from perturbflow.evaluation.table import evaluate

__all__ = ["METRICS", "N_HIGH_EXPRESSION", "Differential", "Metric", "Scored", "evaluate", "score_inputs"]

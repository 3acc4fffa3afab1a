"""Scores of predicted cells against measured ones.

Notation, all on log1p-normalized expression:

* x̄ is the mean of the measured cells of a perturbation (half 'b', the same for every model).
* c̄ is the mean of the measured controls of the scored role. Batches and cell types have the weights that they have
  among the perturbation's cells.
* x̂ is the mean of the predicted cells. Where they have other weights, the measured controls move x̂ to those of x̄.
  Cells that differ from c̄ by less than half a count in one cell predict no change: x̂ = c̄.

The measured controls are used on both sides.

`inputs` brings predicted and measured cells together as `Scored`, with tests by `ranks`. `pseudobulk`, `differential`
and `distributions` compute the metrics from it, `metric` describes a metric, and `table` writes metrics.tsv.
"""

from perturbflow.evaluation.inputs import N_HIGH_EXPRESSION, score_inputs
from perturbflow.evaluation.metric import Metric
from perturbflow.evaluation.metrics import METRICS
from perturbflow.evaluation.scored import Differential, Scored
from perturbflow.evaluation.table import evaluate

__all__ = ["METRICS", "N_HIGH_EXPRESSION", "Differential", "Metric", "Scored", "evaluate", "score_inputs"]

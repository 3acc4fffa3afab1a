"""All metrics by name, family by family. A function with the decorator `metric` in one of these modules is one."""

from typing import get_args

from perturbflow.evaluation import differential, distributions, pseudobulk
from perturbflow.evaluation.metric import Family, Metric

FOUND = [
    value
    for module in (pseudobulk, differential, distributions)
    for value in vars(module).values()
    if isinstance(value, Metric)
]
METRICS: dict[str, Metric] = {
    metric.name: metric for family in get_args(Family) for metric in FOUND if metric.family == family
}

"""One self-contained page that a biologist can read: all models and data of a run, their scores and their cost.

Numbers are read from the files of the run, never computed a second way. If there is no room for a part, the page names
it.
"""

from perturbflow.report.page import report

__all__ = ["report"]

"""One self-contained page that a biologist can read: what was run, how well it did, on what, and at what cost.

Numbers are read from the files of the run, never computed a second way. What a page cannot hold is cut, and the page
says so.
"""

from perturbflow.report.page import report

__all__ = ["report"]

"""What a plan takes on a machine: disk, memory of its largest job and core hours, by the declared shapes of screens.

The numbers per value and per cell were measured by workflow_tests/benchmarks/chain_scale.py. They tell whether a plan
fits on a disk, and are no promise.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perturbflow.registry.plan import Plan

EXPRESSED = 0.25  # share of a screen's genes that a cell has counts of
MEASURED_GENES = 3000  # of the screens that were measured
HELD = 1.5  # genes of a split per highly variable one, at most
# Bytes per count above 0: of a screen, of a split, and of the predictions of a model for a quarter of the cells.
BYTES = {"screen": 1.6, "split": 3.3, "run": 0.25 * 2.7}
# CPU seconds per 1,000 cells, and MB of the largest job per 1,000 cells above MB_LEAST.
SECONDS = {"screen": 0.2, "split": 0.4, "run": 0.5}
MB_LEAST, MB = 1000, 1.5
WORTH_SAYING = 5e9  # bytes: smaller plans fit everywhere


@dataclass(frozen=True)
class Needs:
    """What a plan takes, made from nothing.

    Attributes
    ----------
    n_bytes
        On disk, downloads included.
    memory_mb
        Of the largest job.
    hours
        Of one core, besides the training of networks.
    unknown
        Screens without a declared shape, which are not counted.
    """

    n_bytes: float
    memory_mb: float
    hours: float
    unknown: list[str]

    @classmethod
    def of(cls, plan: "Plan") -> "Needs":
        """Add up all screens, splits and runs of a plan."""
        n_bytes = seconds = largest = 0.0
        unknown = []
        for name in plan.datasets:
            shape = _shape(plan.config["datasets"], name)
            if shape is None:
                unknown.append(name)
                continue
            n_cells, n_genes = shape
            times = {
                "screen": 1,
                "split": int((plan.divisions["dataset"] == name).sum()),
                "run": int((plan.runs["dataset"] == name).sum()),
            }
            downloaded = plan.config["datasets"][name].get("bytes")
            n_bytes += downloaded if isinstance(downloaded, int) else 0
            # Splits hold the highly variable and the perturbed genes.
            kept = {"screen": n_genes, "split": min(n_genes, HELD * plan.config["genes"]["n_hvg"])}
            n_values = {part: EXPRESSED * n_cells * kept.get(part, kept["split"]) for part in times}
            n_bytes += sum(times[part] * n_values[part] * BYTES[part] for part in times)
            in_size = n_cells / 1000 * n_genes / MEASURED_GENES
            seconds += in_size * sum(times[part] * SECONDS[part] for part in times)
            largest = max(largest, n_cells / 1000)
        return cls(n_bytes, MB_LEAST + MB * largest, seconds / 3600, unknown)

    def sentence(self, folder: Path) -> str:
        """Return the needs in words, beside the free disk; nothing for a plan that fits everywhere."""
        if self.n_bytes < WORTH_SAYING:
            return ""
        free = shutil.disk_usage(folder).free
        text = (
            f"Made from nothing, this plan takes about {self.n_bytes / 1e9:,.0f} GB of disk ({free / 1e9:,.0f} GB are "
            f"free here), {self.memory_mb / 1000:.1f} GB of memory in its largest job and {self.hours:,.0f} core hours "
            "besides the training of networks"
        )
        if self.unknown:
            n, first = len(self.unknown), ", ".join(self.unknown[:3])
            more = f" and {n - 3} more" if n > 3 else ""
            text += f"; not counted, as no shape is declared: {first}{more}"
        return text + "."


def _shape(datasets: Mapping[str, dict], name: str) -> tuple[int, int] | None:
    """Return the cells and genes of a screen, of a union those of its screens together; None where unknown."""
    block = datasets[name]
    members = block.get("union")
    if members is None:
        n_cells, n_genes = block.get("shape") or (0, 0)
        return (n_cells, n_genes) if n_cells else None
    shapes = [_shape(datasets, member) for member in members if member in datasets]
    known = [shape for shape in shapes if shape is not None]
    if not known or len(known) < len(members):
        return None
    return sum(shape[0] for shape in known), max(shape[1] for shape in known)

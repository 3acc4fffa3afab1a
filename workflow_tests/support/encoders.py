"""Encoders as files, as somebody else would bring them."""

from pathlib import Path

import torch
from torch import Tensor


class Directions(torch.nn.Module):
    """An encoder learned elsewhere, of some genes in its own order: shares of counts on fixed directions, bent."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        weight = torch.randn(n_genes, 6, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(0.2 * weight / n_genes**0.5)

    def forward(self, k: Tensor) -> Tensor:
        """Counts, (cells, genes) → (cells, 6)."""
        return torch.tanh(torch.log1p(400.0 * k / k.sum(dim=1, keepdim=True).clamp(min=1.0)) @ self.weight)


def exported(
    path: Path,
    genes: list[str],
    module: torch.nn.Module | None = None,
    names: list[str] | None = None,
    *,
    any_number: bool = True,
) -> Path:
    """Save an encoder as docs/concepts/models.md says it."""
    cells = ({0: torch.export.Dim("cells")},) if any_number else None
    program = torch.export.export(module or Directions(len(genes)), (torch.ones(7, len(genes)),), dynamic_shapes=cells)
    torch.export.save(program, path, extra_files={"genes": "\n".join(names or genes)})
    return path

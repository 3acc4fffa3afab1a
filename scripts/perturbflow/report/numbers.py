"""report.json: the numbers of the page's text and tables, for programs."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

FIGURES = {"svg", "figures", "panels", "effects", "other_effects", "curves", "heatmap", "figure"}
"""Names of parts that are figures: their numbers stand elsewhere."""


def numbers(value: Any) -> Any:
    """Return content of the page as JSON has it: no figures, null for what is not finite, paths and keys as text."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, pd.Series):
        value = value.to_dict()
    if isinstance(value, dict):
        kept = {key: of for key, of in value.items() if key not in FIGURES and not isinstance(of, Markup)}
        return {
            "/".join(map(str, key)) if isinstance(key, tuple) else str(key): numbers(of) for key, of in kept.items()
        }
    if isinstance(value, list | tuple | set):
        return [numbers(of) for of in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

"""The modules of the package, and the order in which the data flow through them."""

from closures import PACKAGE

MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}

# The way the data flow: a module imports from its own line and from lines above it. A new module takes a place here.
ORDER = (
    ("registry",),
    ("download",),
    ("controls",),
    ("screens",),
    ("splits",),
    ("pairs", "export"),
    ("priors",),
    ("embeddings", "audit"),
    ("models", "train", "predict"),
    ("evaluation", "benchmark", "sweep"),
    ("counterfactuals",),
    ("report", "quality"),
    ("listing", "api", "command"),
)

# These hold no step: all may import them, and they import only one another.
SUPPORT = ("errors", "io", "cli", "provenance", "genes", "nearest", "wording", "progress", "colours", "__init__")


def stage(module: str) -> int:
    """Return the line of a module in ORDER, 0 for support."""
    name = module.split("/")[0]
    if name in SUPPORT:
        return 0
    places = [i for i, names in enumerate(ORDER, 1) if name in names]
    assert places, f"perturbflow/{module}.py has no place in the order of the data flow"
    return places[0]

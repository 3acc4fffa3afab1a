"""The version of the code changes with all that can change a number, and with nothing else."""

import ast
import builtins
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

import pytest
from conftest import DOSED, QUERY, SPECS, Prepared, copy_repository, make_screen, merged, prepare

from perturbflow.benchmark import benchmark
from perturbflow.counterfactuals.answers import counterfactual
from perturbflow.counterfactuals.figures import draw
from perturbflow.counterfactuals.warranty import warranty
from perturbflow.evaluation import evaluate
from perturbflow.predict import predict
from perturbflow.provenance import code_version as subject
from perturbflow.provenance.code_version import code_version, definitions, entry_point
from perturbflow.quality import quality
from perturbflow.registry.config import complete
from perturbflow.registry.families import FAMILIES
from perturbflow.train import train

STEPS = sorted(path.stem for path in subject.SCRIPTS.glob("*.py"))


def forget() -> None:
    """Empty the caches of a process that expects code to stay as it is."""
    for function in (subject._file, subject._module, subject._definition, code_version):
        function.cache_clear()


# --- a small package ------------------------------------------------------------------------------------------------

FILES = {
    "__init__.py": '"""A package."""\n\nfrom perturbflow.step import work\n\n__version__ = "1"\n',
    "step.py": '''"""A step."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.stats import rankdata as ranked

from perturbflow import __version__, other
from perturbflow.bases import Base, decorated, trusted
from perturbflow.tables import TABLE

if TYPE_CHECKING:
    from perturbflow.types import Kind

logger = logging.getLogger(__name__)
LEVELS, LIMIT = (1, 2), 7
TOTAL: int = 3
TOTAL += 4
NUMBERS = {}
NUMBERS["a"] = 1


@dataclass
class Settings(Base):
    """Some settings."""

    size: int = 3
    rates: list[float] = field(default_factory=lambda: [0.5])
    shared: ClassVar[int] = 8

    def hidden(self) -> int:
        """Return a number."""
        return self.size * 2


@decorated
def scaled(x: float, by: float = 2.0) -> float:
    """Return x, scaled."""

    def inner(y: float) -> float:
        return y + 1.0

    assert by > 0, f"by {by} is too small"
    if x > LIMIT:
        raise ValueError(f"{x} is too large for {other.message(x)}")
    return inner(x) * by


def work(x: float) -> float:
    """Do it."""
    from perturbflow.late import lately

    logger.info("working on %s", x)
    settings, text = Settings(), f"{other.shown(x)}"
    total: float = sum(other.weight(y) for y in ranked(LEVELS))
    match text:
        case other.NAME:
            total += TOTAL
    try:
        return trusted(scaled(total + lately(x) + settings.hidden() + len(TABLE)))
    except ValueError:
        return np.nan if __version__ else 0.0


def dead() -> int:
    """Serve nobody."""
    return other.unused()
''',
    "other.py": ("NAME = 'other'\nUNUSED = 1\n\n\ndef weight(y):\n    return 2 * y\n\n\ndef shown(x):\n    return x\n"
                 "\n\ndef message(x):\n    return x\n\n\ndef unused():\n    return UNUSED\n"),
    "bases.py": (
        "class Root:\n    rate = 1\n\n\nclass Base(Root):\n    pass\n\n\ndef decorated(function):\n    return "
        "function\n\n\n"
        "try:\n    from perturbflow.fast import trusted\nexcept ImportError:\n    def trusted(x):\n        return x\n"
    ),
    "fast.py": "def trusted(x):\n    return x\n",
    "late.py": "def lately(x):\n    return x + EXTRA\n\n\nEXTRA = 5\n",
    "tables.py": "from pathlib import Path\n\nTABLE = (Path(__file__).parent / 'table.tsv').read_text()\n",
    "table.tsv": "a\t1\n",
    "types.py": "Kind = int\n",
}  # fmt: skip


class Package:
    """A package that can be edited, and the version of what its root does."""

    def __init__(self, scripts: Path, *roots: str) -> None:
        self.folder, self.roots = scripts / "perturbflow", roots

    def version(self) -> str:
        """Return the version of the code as it lies there."""
        forget()
        return code_version(*self.roots)

    def changed_by(self, *edits: tuple[str, str, str]) -> bool:
        """Return whether edits (file, before, after) change the version; leave the files as they were."""
        before, texts = self.version(), {}
        for name, old, new in edits:
            path = self.folder / name
            texts.setdefault(path, path.read_text())
            assert old in path.read_text(), f"{old!r} is not in {name}"
            path.write_text(path.read_text().replace(old, new, 1) if old else path.read_text() + new)
        after = self.version()
        for path, text in texts.items():
            path.write_text(text)
        return before != after


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Yield the small package, whose root is `work`."""
    for name, text in FILES.items():
        path = tmp_path / "perturbflow" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(subject, "SCRIPTS", tmp_path)
    yield Package(tmp_path, "perturbflow.step:work")
    forget()


SAME = {
    "a docstring": ("step.py", "Do it.", "Do it well."),
    "a docstring less": ("step.py", '    """Some settings."""\n', ""),
    "the module's docstring": ("step.py", '"""A step."""', '"""Another."""'),
    "a comment": ("step.py", "    settings", "    # a remark\n    settings"),
    "layout": ("step.py", "(1, 2), 7", "(1,\n  2), 7"),
    "a message": ("step.py", "is too large for", "exceeds the limit of"),
    "a helper of a message": ("other.py", "def message(x):\n    return x", "def message(x):\n    return -x"),
    "the message of an assertion": ("step.py", "is too small", "is small"),
    "a log line": ("step.py", "working on", "at work on"),
    "a log line less": ("step.py", '    logger.info("working on %s", x)\n', ""),
    "an annotation": ("step.py", "x: float, by: float = 2.0) -> float", "x: int, by = 2.0) -> int"),
    "an annotation of a local": ("step.py", "total: float = sum", "total = sum"),
    "an annotation of a field": ("step.py", "size: int = 3", "size: float = 3"),
    "an annotation of a constant": ("step.py", "TOTAL: int = 3", "TOTAL = 3"),
    "a type for checkers": ("types.py", "int", "str"),
    "dead code": ("step.py", "return other.unused()", "return 0"),
    "what dead code uses": ("other.py", "UNUSED = 1", "UNUSED = 2"),
    "another definition": ("other.py", "", "\n\ndef more():\n    return 1\n"),
    "a release": ("__init__.py", '"1"', '"2"'),
}
OTHER = {
    "a value": ("step.py", "y + 1.0", "y + 2.0"),
    "a type of value": ("step.py", "y + 1.0", "y + 1"),
    "a default": ("step.py", "by: float = 2.0", "by: float = 3.0"),
    "a condition before a message": ("step.py", "x > LIMIT", "x >= LIMIT"),
    "the kind of error": ("step.py", "raise ValueError", "raise TypeError"),
    "an assertion": ("step.py", "assert by > 0", "assert by > 1"),
    "a decorator": ("step.py", "@decorated\ndef scaled", "def scaled"),
    "what a decorator does": ("bases.py", "return function", "return None"),
    "a base class": ("step.py", "Settings(Base)", "Settings"),
    "a base of a base": ("bases.py", "rate = 1", "rate = 2"),
    "a field": ("step.py", "size: int = 3", "size: int = 4"),
    "a field that is none any more": ("step.py", "size: int = 3", "size = 3"),
    "a field of the class": ("step.py", "ClassVar[int] = 8", "int = 8"),
    "the order of fields": (
        "step.py", "    size: int = 3\n    rates: list[float] = field(default_factory=lambda: [0.5])\n",
        "    rates: list[float] = field(default_factory=lambda: [0.5])\n    size: int = 3\n",
    ),
    "a factory of defaults": ("step.py", "[0.5]", "[0.6]"),
    "a method behind a constructor": ("step.py", "self.size * 2", "self.size * 3"),
    "a constant by its tuple": ("step.py", "(1, 2), 7", "(1, 2), 8"),
    "an augmented constant": ("step.py", "TOTAL += 4", "TOTAL += 5"),
    "a constant that is filled later": ("step.py", 'NUMBERS["a"] = 1', 'NUMBERS["a"] = 2'),
    "a function behind a module": ("other.py", "2 * y", "3 * y"),
    "a function in an f-string": ("other.py", "def shown(x):\n    return x", "def shown(x):\n    return -x"),
    "a constant in a pattern": ("other.py", "'other'", "'another'"),
    "an import within a function": ("late.py", "EXTRA = 5", "EXTRA = 6"),
    "one way of an import": ("fast.py", "return x", "return -x"),
    "the other way of an import": ("bases.py", "        return x", "        return -x"),
    "a library": ("step.py", "import numpy as np", "import cupy as np"),
    "a function of a library": ("step.py", "rankdata as ranked", "tiecorrect as ranked"),
    "a table": ("table.tsv", "1", "2"),
    "a class of warnings that fails": ("step.py", "    logger.info",
                                       '    warnings.simplefilter("error")\n    logger.info'),
}  # fmt: skip


@pytest.mark.parametrize("edit", SAME.values(), ids=SAME)
def test_what_changes_no_number_is_not_counted(edit: tuple[str, str, str], package: Package) -> None:
    assert not package.changed_by(edit)


@pytest.mark.parametrize("edit", OTHER.values(), ids=OTHER)
def test_what_can_change_a_number_is_counted(edit: tuple[str, str, str], package: Package) -> None:
    assert package.changed_by(edit)


def test_where_a_definition_stands_is_not_counted(package: Package) -> None:
    weight = "def weight(y):\n    return 2 * y\n"
    order = ("other.py", weight, ""), ("other.py", "", "\n\n" + weight)
    assert not package.changed_by(*order)
    lately = ("late.py", "def lately(x):\n    return x + EXTRA\n\n\nEXTRA = 5\n", "")
    moved = ("fast.py", "", "\n\nEXTRA = 5\n\n\ndef lately(x):\n    return x + EXTRA\n")
    assert not package.changed_by(lately, moved, ("step.py", "perturbflow.late import", "perturbflow.fast import"))


def test_a_name_that_now_means_another_of_the_same_name_is_counted(package: Package) -> None:
    twin = "\n\ndef weight(y):\n    return 3 * y\n\n\ndef shown(y):\n    return weight(y)\n"
    package.folder.joinpath("twin.py").write_text(twin)
    both = ("step.py", "text = Settings(), f", "text = Settings(), twin.weight(1) + weight(1), f"), (
        "step.py", "from perturbflow.tables", ("from perturbflow.other import weight\nfrom perturbflow import twin\n"
                                               "from perturbflow.tables"),
    )  # fmt: skip
    for name, old, new in both:
        path = package.folder / name
        path.write_text(path.read_text().replace(old, new))
    assert {"perturbflow.other:weight", "perturbflow.twin:weight"} <= set(definitions(*package.roots))
    assert package.changed_by(("step.py", "perturbflow.other import weight", "perturbflow.twin import weight"))


@pytest.mark.parametrize("use", ["used(other)", "getattr(other, 'unused')", "other.created_by_name"])
def test_a_module_that_is_handed_on_counts_whole(use: str, package: Package) -> None:
    path = package.folder / "step.py"
    path.write_text(path.read_text().replace("total += TOTAL", f"total += {use}"))
    assert package.changed_by(("other.py", "UNUSED = 1", "UNUSED = 2"))


def test_names_that_came_by_a_star_count(package: Package) -> None:
    path = package.folder / "step.py"
    path.write_text(
        path.read_text().replace(
            "from perturbflow.bases import Base, decorated, trusted", "from perturbflow.bases import *"
        )
    )
    assert package.changed_by(("bases.py", "rate = 1", "rate = 2"))


def test_a_root_is_found_behind_the_name_that_a_package_gives_it_and_a_misspelt_one_is_not_passed_over(
    package: Package,
) -> None:
    assert "perturbflow.step:work" in definitions("perturbflow:work")
    for root in ("perturbflow.step:wrok", "perturbflow.pets:work"):
        with pytest.raises(LookupError):
            definitions(root)


# --- this repository ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the scripts and the package."""
    return copy_repository(tmp_path_factory.mktemp("copy") / "repository") / "scripts"


@pytest.fixture
def of_steps(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Package]]:
    """Yield a function from a step and further roots to the package in the copy."""
    monkeypatch.setattr(subject, "SCRIPTS", scripts)
    forget()
    yield lambda step, *roots: Package(scripts, entry_point(step), *roots)
    forget()


ADDITIVE, JEPA = (f"perturbflow.models.{FAMILIES[name].implementation}" for name in ("additive", "jepa"))


@pytest.mark.parametrize(
    ("step", "roots", "edit"),
    [
        ("train", [ADDITIVE], ("io/files.py", 'raise InputError(f"', 'raise InputError(f"Really: ')),
        ("train", [ADDITIVE], ("models/closed_form/baselines.py", "", "\n\nclass Another(Additive):\n    pass\n")),
        ("train", [ADDITIVE], ("models/jepa.py", "", "\n\nX = 1\n")),
        ("train", [ADDITIVE], ("cli.py", '"%s failed"', '"%s did not end well"')),
        ("train", [JEPA], ("cli.py", "default: {parameter.default}", "without it: {parameter.default}")),
        (
            "train",
            [ADDITIVE],
            (
                "registry/families.py",
                '_family("closed_form.baselines:NoChange", ',
                '_family("closed_form.baselines:Additive", ',
            ),
        ),
        ("train", [JEPA], ("evaluation/metric.py", "useless: float", "useless: int")),
        ("evaluate", [], ("evaluation/similarity.py", "", "\n\ndef another(s):\n    return s\n")),
        ("harmonize", [], ("screens/recipes.py", "", "\n\ndef another(files, dataset):\n    return 1\n")),
        ("prior", ["perturbflow.priors:go"], ("priors/interactions.py", "", "\n\nX = 1\n")),
        (
            "prior",
            ["perturbflow.priors:go"],
            ("priors/__init__.py", "import interaction_vectors", "import chemical_vectors"),
        ),
    ],
)
def test_what_a_step_does_not_do_leaves_its_version(
    step: str, roots: list[str], edit: tuple, of_steps: Callable[..., Package]
) -> None:
    assert not of_steps(step, *roots).changed_by(edit)


@pytest.mark.parametrize(
    ("step", "roots", "edit"),
    [
        ("pair", [], ("pairs.py", "CONTROLS_PER_CELL = 8", "CONTROLS_PER_CELL = 9")),
        ("train", [ADDITIVE], ("models/base.py", "np.arange(n) %", "np.arange(n) //")),
        ("evaluate", [], ("evaluation/differential.py", "np.cumsum(is_significant", "np.cumprod(is_significant")),
        ("harmonize", [], ("io/kernels.py", "@compiled", "@uncompiled")),
        ("report", [], ("report/report_template.html", "<body", "<body lang='en'")),
        ("harmonize", ["perturbflow.screens.recipes:renge2023"], ("screens/recipes.py", "np.expm1(", "np.exp(")),
        ("prior", ["perturbflow.priors:ppi"], ("priors/reading.py", "N_DIMENSIONS = 64", "N_DIMENSIONS = 32")),
    ],
)
def test_what_a_step_does_is_its_version(
    step: str, roots: list[str], edit: tuple, of_steps: Callable[..., Package]
) -> None:
    assert of_steps(step, *roots).changed_by(edit)


def test_the_table_of_symbols_counts(of_steps: Callable[..., Package]) -> None:
    package = of_steps("split")
    before, table = package.version(), package.folder / "genes/hgnc.tsv.gz"
    content = table.read_bytes()
    table.write_bytes(content + b"\0")
    assert package.version() != before
    table.write_bytes(content)


def test_an_edit_concerns_the_families_that_use_it(of_steps: Callable[..., Package]) -> None:
    edit = ("models/closed_form/regressions.py", "RIDGES = (0.03,", "RIDGES = (0.02,")
    roots = {name: f"perturbflow.models.{family.implementation}" for name, family in FAMILIES.items()}
    stale = {
        name
        for name in ("additive", "linear", "ridge", "random_forest")
        if of_steps("train", roots[name]).changed_by(edit)
    }
    assert stale == {"ridge"}


def test_a_step_begins_at_the_function_of_its_script() -> None:
    assert entry_point("pair") == "perturbflow.pairs:pair"
    assert entry_point("report") == "perturbflow.report.page:report"
    assert entry_point("counterfactual") == "perturbflow.counterfactuals.answers:counterfactual"


@pytest.mark.parametrize("step", STEPS)
def test_no_step_counts_the_command_line_or_a_module_whole(step: str) -> None:
    whole = {name for name in definitions(entry_point(step)) if name.endswith((subject.ALL, ":"))}
    # `metrics` looks for metrics in these modules, whatever their names.
    modules = ("pseudobulk", "differential", "distributions")
    assert whole <= {f"perturbflow.evaluation.{module}:{subject.ALL}" for module in modules}
    assert "perturbflow.cli:run" not in definitions(entry_point(step))


# What reading the code cannot see. Whoever needs one of these names a further root, as the families, recipes and priors
# do.
BLIND = {
    "globals",
    "locals",
    "eval",
    "exec",
    "__import__",
    "import_module",
    "__subclasses__",
    "__init_subclass__",
    "singledispatch",
}
SEEN_TO = {("models/base.py", "import_module"), ("screens/recipes.py", "globals"), ("priors/__init__.py", "globals")}


def words_of(tree: ast.Module) -> set[str]:
    """Return the names and attributes in a module; a method that is called as a builtin function is none."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - {*vars(builtins)}
    return attributes | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_code_is_reached_by_names_alone() -> None:
    package = subject.SCRIPTS / "perturbflow"
    for path in package.rglob("*.py"):
        assert (path.parent / "__init__.py").exists()
        place, tree = path.relative_to(package).as_posix(), ast.parse(path.read_text())
        assert {(place, word) for word in words_of(tree) & BLIND} <= SEEN_TO
        name = ".".join(path.relative_to(subject.SCRIPTS).with_suffix("").parts).removesuffix(".__init__")
        module = subject._module(name)
        assert not {subject.LOOSE, "__getattr__"} & set(module.statements), (
            f"{place}: what only an import runs has no name"
        )
        assert "*" not in module.imports
        decorators = [
            subject._dotted(getattr(word, "func", word))
            for node in ast.walk(tree)
            for word in getattr(node, "decorator_list", [])
        ]
        own = {meaning for word in decorators for meaning in subject._meanings(name, word, {}) if ":" in meaning}
        # The verbs of the command are no part of any step, and modules of metrics count whole.
        allowed = ("io.compiled:compiled", "command:perturbflow", "evaluation.metric:metric")
        assert own <= {f"perturbflow.{name}" for name in allowed}, (
            f"{place}: a decorator adds to a table that no name leads to"
        )


@pytest.mark.slow
def test_the_whole_package_without_comments_and_layout_is_the_same(
    scripts: Path, of_steps: Callable[..., Package]
) -> None:
    roots = [of_steps(step).roots[0] for step in STEPS] + [
        f"perturbflow.models.{family.implementation}" for family in FAMILIES.values()
    ]
    package, texts = of_steps("train", *roots), {path: path.read_text() for path in scripts.rglob("*.py")}
    before = package.version()
    for path, text in texts.items():
        path.write_text(ast.unparse(ast.parse(text)))
    after = package.version()
    for path, text in texts.items():
        path.write_text(text)
    assert before == after


# --- what runs ------------------------------------------------------------------------------------------------------

IN_LOG_LINES = {  # and nowhere else
    "perturbflow.embeddings:_list_of",
    "perturbflow.counterfactuals.warranty:sentence",
    "perturbflow.counterfactuals.warranty:_sentence_on_intervals",
    "perturbflow.counterfactuals.agreement:sentence",
    "perturbflow.progress:left",
    "perturbflow.wording:capital",
}


@contextmanager
def functions_run() -> Iterator[set[CodeType]]:
    """Collect what Python functions run, in all threads."""
    codes: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        codes.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield codes
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def outside(codes: set[CodeType], *roots: str) -> set[str]:
    """Return the functions of the package among these that do not count for the roots."""
    counted, found = set(definitions(*roots)), set()
    for code in codes:
        path = Path(code.co_filename)
        if not path.is_relative_to(subject.SCRIPTS / "perturbflow") or code.co_name == "<module>":
            continue
        name = ".".join(path.relative_to(subject.SCRIPTS).with_suffix("").parts).removesuffix(".__init__")
        own = {
            f"{name}:{defined}"
            for defined, nodes in subject._module(name).statements.items()
            for node in nodes
            if min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
            <= code.co_firstlineno
            <= (node.end_lineno or 0)
        }
        if not own & (counted | IN_LOG_LINES):
            found.add(f"{name}:{code.co_qualname}")
    return found


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import all modules before any function is watched: what an import runs is no part of a step."""
    for path in (subject.SCRIPTS / "perturbflow").rglob("*.py"):
        importlib.import_module(
            ".".join(path.relative_to(subject.SCRIPTS).with_suffix("").parts).removesuffix(".__init__")
        )


@pytest.mark.parametrize("kind", SPECS)
def test_all_that_prepares_the_data_is_counted(kind: str, tmp_path: Path) -> None:
    with functions_run() as codes:
        prepare(tmp_path, make_screen(labels=DOSED if kind == "unseen_dose" else None), SPECS[kind])
    assert {"harmonize", "split", "pair", "embeddings", "audit"} <= {code.co_name for code in codes}
    assert not outside(codes, *map(entry_point, ("harmonize", "split", "pair", "embeddings", "audit")))


SHIPPED = complete(
    merged({"select": {"datasets": ["renge2023"], "splits": ["unseen_combination"], "models": ["no_change"]}})
)["models"]
QUICK = {
    "n_steps": 4, "n_steps_representation": 4, "n_steps_decoder": 4, "batch_size": 16, "n_latent": 8, "width": 16,
    "n_sampling_steps": 2,
    "n_integration_steps": 2,
}  # fmt: skip


WATCHED = [name for name, block in SHIPPED.items() if FAMILIES[block["family"]].kind != "learned"] + ["counterfactual"]


@pytest.mark.parametrize(
    "name", [*WATCHED, *[pytest.param(name, marks=pytest.mark.slow) for name in ("scppdm", "scppdm_hybrid", "jepa")]]
)
def test_all_that_a_model_runs_is_counted(name: str, prepared: dict[str, Prepared], tmp_path: Path) -> None:
    family = FAMILIES[SHIPPED[name]["family"]]
    here = prepared[(family.split_kinds or ["unseen_combination"])[0]]
    params = {
        key: QUICK.get(key, value) if family.kind == "learned" else value
        for key, value in SHIPPED[name]["params"].items()
    }
    model, own = tmp_path / family.artefact, f"perturbflow.models.{family.implementation}"
    with functions_run() as codes:
        train(
            here.pairs,
            here.embeddings,
            here.audit,
            model,
            tmp_path / "run.json",
            family.implementation,
            params,
            0,
            "cpu",
        )
    assert {"train", "fit"} <= {code.co_name for code in codes}
    assert not outside(codes, entry_point("train"), own)
    with functions_run() as codes:
        predict(here.pairs, model, tmp_path / "predictions.h5ad", family.implementation, params, 0, 20)
    assert {"predict", "restore"} <= {code.co_name for code in codes}
    assert not outside(codes, entry_point("predict"), own)


@pytest.mark.slow
def test_all_that_scores_is_counted(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    models, metrics = ["no_change", "additive", "perfect_mean"], []
    for name in models:
        folder, told = tmp_path / name, (FAMILIES[name].implementation, {}, 0)
        train(here.pairs, here.embeddings, here.audit, folder / "model.npz", folder / "run.json", *told)
        predict(here.pairs, folder / "model.npz", folder / "predictions.h5ad", *told, 20)
        metrics.append(folder / "metrics.tsv")
        provenance = {"dataset": "mine", "split": "unseen_combination", "model": name, "seed": "0"}
        with functions_run() as codes:
            evaluate(folder / "predictions.h5ad", here.pairs, here.split, metrics[-1], provenance)
        assert {"evaluate", "auprc", "sinkhorn_w2"} <= {code.co_name for code in codes}
        assert not outside(codes, entry_point("evaluate"))
    described = [tmp_path / name for name in ("quality.tsv", "quality.json", "quality.html")]
    with functions_run() as codes:
        quality(here.harmonized, here.harmonization, *described)
    assert {"quality", "escaping", "screen_section"} <= {code.co_name for code in codes}
    assert not outside(codes, entry_point("quality"))
    tables = [
        tmp_path / f"{name}.tsv"
        for name in ("benchmark", "calibration", "comparisons", "strata", "verdicts", "contexts")
    ]
    with functions_run() as codes:
        benchmark(
            metrics, {name: name for name in models}, *tables, described[:1], [here.audit], [here.harmonization], 0.02
        )
    assert {"benchmark", "judge"} <= {code.co_name for code in codes}
    assert not outside(codes, entry_point("benchmark"))


@pytest.mark.slow
def test_all_that_answers_is_counted(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here, told = prepared["unseen_combination"], (FAMILIES["additive"].implementation, {})
    files, shown = (
        (here.pairs, here.embeddings, tmp_path / "model.npz"),
        (tmp_path / "warranty.json", tmp_path / "calibration.npz"),
    )
    answers = [tmp_path / f"answer{suffix}" for suffix in (".h5ad", ".tsv", ".ranking.tsv", ".effects.h5ad")]
    train(*files[:2], here.audit, files[2], tmp_path / "run.json", *told, 0)
    query = {**QUERY, "perturbations": ["TF1+TF2", "TF3"]}
    calls: dict[str, tuple[Callable, list]] = {
        "warranty": (warranty, [*files, *shown, *told, 0]),
        "counterfactual": (counterfactual, [*files, *shown, *answers, *told, query, 0]),
        "draw": (draw, [*answers[:3], *[tmp_path / f"{i}.png" for i in range(4)]]),
    }
    for step, (function, arguments) in calls.items():
        with functions_run() as codes:
            function(*arguments)
        assert step in {code.co_name for code in codes}
        assert not outside(codes, entry_point(step), f"perturbflow.models.{told[0]}"), step

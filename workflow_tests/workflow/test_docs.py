"""The documents say what is: every key, every default, every command, the graph of rules.

Run as a script (PYTHONPATH=scripts python workflow_tests/workflow/test_docs.py), it writes the generated parts anew:
the tables of model params and of metrics, the command line, the map of the code, the citations and the rule graph.
"""

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import click
import pytest
import yaml

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))  # pytest does so, too

from house import MODULES, ORDER, stage
from software import locked, rules

from perturbflow.command import perturbflow
from perturbflow.evaluation import METRICS
from perturbflow.registry.config import complete
from perturbflow.registry.effort import EFFORTS
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.params import json_schema
from perturbflow.registry.shipped import merged

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
CONFIG_README = REPOSITORY / "config" / "README.md"
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
SITE = REPOSITORY / "docs"
DOCUMENTS = sorted(
    path
    for places in ("*.md", "config/**/*.md", "docs/**/*.md", "leaderboard/*.md", "workflow_tests/benchmarks/*.md")
    for path in REPOSITORY.glob(places)
    if "_build" not in path.parts
)
PAGES = [path for path in DOCUMENTS if SITE in path.parents]
# Pages with generated parts.
CITATIONS = SITE / "citations.md"
CODE = SITE / "developers" / "code.md"
COMMAND_LINE = SITE / "reference" / "cli.md"
MEASUREMENTS = REPOSITORY / "workflow_tests" / "benchmarks" / "README.md"
METRICS_PAGE = SITE / "reference" / "metrics.md"
RULES = SITE / "developers" / "rules.md"
RENEW = "run `PYTHONPATH=scripts python workflow_tests/workflow/test_docs.py` to write it anew"
SCHEMAS = REPOSITORY / "config" / "schemas"
DEFAULT_FILES = [
    REPOSITORY / "config" / f"{name}.yaml" for name in ("config", "datasets", "splits", "models", "counterfactuals")
]


def generated(file: Path, name: str) -> str:
    """Return the part of a document that stands between its marks."""
    match = re.search(
        rf"<!-- {name} -->\n(.*?)\n?<!-- {name.split(':')[0]}: end -->", file.read_text(), flags=re.DOTALL
    )
    assert match, f"{file} has no place for its generated part: add <!-- {name} --> and the mark of its end"
    return match[1]


def write(file: Path, name: str, text: str) -> None:
    """Put a text between the marks of a document."""
    end = f"<!-- {name.split(':')[0]}: end -->"
    pattern = rf"<!-- {name} -->\n.*?{end}"
    written, n = re.subn(pattern, lambda _: f"<!-- {name} -->\n{text}\n{end}", file.read_text(), flags=re.DOTALL)
    if n != 1:
        sys.exit(f"{file} has no place for its generated part: add <!-- {name} --> and {end}")
    file.write_text(written)


# --- what the schemas say -------------------------------------------------------------------------------------------


def schema(name: str) -> dict:
    return yaml.safe_load((SCHEMAS / f"{name}.schema.yaml").read_text())


def type_of(block: dict) -> str:
    """Return a property's type in the words of the tables."""
    if "$ref" in block:
        file, _, place = block["$ref"].partition("#/")
        return type_of(reduce(dict.__getitem__, place.split("/"), schema(file.removesuffix(".schema.yaml"))))
    if "enum" in block:
        return "one of " + ", ".join(f"`{'null' if value is None else value}`" for value in block["enum"])
    if "oneOf" in block:
        return " or ".join(
            f"`{branch['const']}`" if "const" in branch else type_of(branch) for branch in block["oneOf"]
        )
    types = block["type"] if isinstance(block["type"], list) else [block["type"]]
    names = {"array": "list", "object": "mapping"}
    return " or ".join(names.get(name, name) for name in types)


def default_of(block: dict, is_required: bool) -> str:
    """Return a property's default as it would be written in YAML."""
    if "default" in block:
        return f"`{json.dumps(block['default'], ensure_ascii=False)}`"
    return "required" if is_required else "–"


def rows(block: dict, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield key, first cells of the table row, and description of every property below a schema, mappings opened."""
    for key, value in block.get("properties", {}).items():
        if value.get("properties"):
            yield from rows(value, f"{prefix}{key}.")
        elif prefix or value.get("type") == "array" or key not in ("datasets", "splits", "models", "counterfactuals"):
            row = f"| `{prefix}{key}` | {type_of(value)} | {default_of(value, key in block.get('required', []))} |"
            yield f"{prefix}{key}", row, value.get("description", "")
        items = value.get("items", {})
        for branch in items.get("oneOf", []):
            yield from rows(branch, f"{prefix}{key}[].")


def with_params(family: str) -> bool:
    """Return whether a family has params at all."""
    return bool(schema("models")["$defs"][family]["properties"])


def params_table(family: str) -> str:
    """Return the table of a family's params."""
    block = schema("models")["$defs"][family]
    lines = ["| param | type | default | |", "| --- | --- | --- | --- |"]
    lines += [f"{row} {description} |".replace("|  |", "| |") for _, row, description in rows(block)]
    return "\n".join(lines)


def section(title: str) -> str:
    """Return the text below a heading of config/README.md, up to the next heading of its level."""
    match = re.search(
        rf"^(#+) {re.escape(title)}$(.*?)(?=^#{{1,2}} |\Z)", CONFIG_README.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert match, f"config/README.md has no section '{title}'"
    return match[2]


MODELS_SCHEMA = SCHEMAS / "models.schema.yaml"


def models_schema() -> str:
    """Return the schema of models.yaml, as the declarations of the families have it."""

    def flow(value: object) -> str:
        text = yaml.dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
        return text.removesuffix("...\n").strip()

    lines = [
        '$schema: "https://json-schema.org/draft/2020-12/schema"',
        (
            "# Written by workflow_tests/workflow/test_docs.py from the declarations in "
            "scripts/perturbflow/registry/families.py."
        ),
        'description: "Registry of models: a name, a family, and its params. $defs holds the params of every family."',
        "type: object",
        'propertyNames: {pattern: "^[a-z0-9][a-z0-9_]*$"}',
        "additionalProperties:",
        "  type: object",
        "  additionalProperties: false",
        "  required: [family]",
        "  properties:",
        f"    family: {flow({'enum': list(FAMILIES)})}",
        "    params: {type: object, default: {}}",
        "$defs:",
    ]
    for name, family in FAMILIES.items():
        block = json_schema(family.params)
        if not block["properties"]:
            lines.append(f"  {name}: {flow(block)}")
            continue
        required = [f"    required: {flow(block['required'])}"] if "required" in block else []
        lines += [f"  {name}:", "    type: object", "    additionalProperties: false", *required, "    properties:"]
        lines += [f"      {key}: {flow(of)}" for key, of in block["properties"].items()]
    return "\n".join(lines) + "\n"


def test_the_schema_of_models_is_that_of_their_declarations():
    assert MODELS_SCHEMA.read_text() == models_schema(), RENEW


DOCUMENTED = {
    "config.yaml: what to run": schema("config"),
    "priors: what is known of genes": schema("config")["properties"]["priors"]["additionalProperties"],
    "datasets.yaml: which screens exist": schema("datasets")["additionalProperties"],
    "splits.yaml: ways of holding out": schema("splits")["additionalProperties"],
    "models.yaml: which models exist": schema("models")["additionalProperties"],
    "counterfactuals.yaml: what-if questions": schema("counterfactuals")["additionalProperties"],
}


@pytest.mark.parametrize("title", DOCUMENTED)
def test_every_key_is_documented_with_its_type_and_default(title):
    documented = section(title)
    missing = [row for _, row, _ in rows(DOCUMENTED[title]) if row not in documented]
    assert not missing, "rows to add to or mend in config/README.md:\n" + "\n".join(missing)


@pytest.mark.parametrize("title", DOCUMENTED)
def test_no_key_is_documented_that_does_not_exist(title):
    of_families = r"(?s)<!-- (params|families)\b.*?<!-- \1: end -->"
    documented = set(
        re.findall(r"^\| `([a-z_.\[\]0-9]+)` \|", re.sub(of_families, "", section(title)), flags=re.MULTILINE)
    )
    assert documented <= {key for key, _, _ in rows(DOCUMENTED[title])}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_documented_with_its_params(family):
    if not with_params(family):
        assert f"| `{family}` | {FAMILIES[family].kind} |" in section("models.yaml: which models exist")
        return
    assert generated(CONFIG_README, f"params: {family}") == params_table(family), RENEW


def metrics_table() -> str:
    """Return a table of what metrics are, by family, and one of their facts."""

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:g}".replace("inf", "∞").replace("-", "−")

    lines, facts = [], ["| metric | better | range | perfect | useless | unit | needs | ceiling |", "| --- " * 8 + "|"]
    for metric in METRICS.values():
        if f"### {metric.family.replace('_', ' ').capitalize()}" not in lines:
            lines += ["", f"### {metric.family.replace('_', ' ').capitalize()}", ""]
            lines += ["| metric | definition | source |", "| --- | --- | --- |"]
        name = f"**`{metric.name}`**" if metric.headline else f"`{metric.name}`"
        lines.append(f"| {name} | {metric.formula} | {metric.source} |")
        ceiling = metric.correction.__name__.removeprefix("of_").replace("_", " ") if metric.correction else "duplicate"
        low, high, perfect, useless = map(shown, (*metric.range, metric.perfect, metric.useless))
        facts.append(
            f"| {name} | {metric.direction} | {low} to {high} | {perfect} | {useless} | {metric.unit} | {metric.needs} "
            f"| {ceiling} |"
        )
    return "\n".join([*lines[1:], "", "### Range and unit", "", *facts])


def test_metrics_are_documented():
    assert generated(METRICS_PAGE, "metrics") == metrics_table(), RENEW


# --- the command line -----------------------------------------------------------------------------------------------


def command_line() -> str:
    """Return a section per verb of the command, and the table of the scripts."""
    lines, bar = [], r"\|"
    for name, verb in perturbflow.commands.items():
        context = click.Context(verb, info_name=name, parent=click.Context(perturbflow, info_name="perturbflow"))
        usage = f"perturbflow {name} {' '.join(verb.collect_usage_pieces(context))}"
        lines += [f"## perturbflow {name}", "", inspect.cleandoc(verb.help), "", "```text", usage, "```", ""]
        records = [param.get_help_record(context) for param in verb.params if isinstance(param, click.Option)]
        lines += ["| option | |", "| --- | --- |"] * bool(records)
        lines += [f"| `{option.replace('|', bar)}` | {said.replace('|', bar)} |" for option, said in records]
        lines += [""] * bool(records)
    lines += ["## Scripts", "", "Each step of the workflow by hand; `--help` says its options.", ""]
    lines += ["| script | what it does |", "| --- | --- |"]
    for script in sorted((REPOSITORY / "scripts").glob("*.py")):
        said = (ast.get_docstring(ast.parse(script.read_text())) or "").split("\n\n")[0]
        lines.append(f"| `scripts/{script.name}` | {' '.join(said.split())} |")
    return "\n".join(lines)


def test_the_command_line_is_documented():
    assert generated(COMMAND_LINE, "cli") == command_line(), RENEW


# --- the map of the code --------------------------------------------------------------------------------------------


def rules_of_modules() -> dict[str, list[str]]:
    """Return module → rules whose script calls a function of it."""
    found: dict[str, list[str]] = {}
    for rule, fields in rules().items():
        for node in ast.parse(Path(fields["script"]).read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module != "perturbflow.cli":
                place = node.module.removeprefix("perturbflow.").replace(".", "/")
                found.setdefault(place if place in MODULES else f"{place}/__init__", []).append(rule)
    return found


def map_of_the_code() -> str:
    """Return the table of modules, in the order of the data; what holds no step comes last."""
    lines = ["| module | what it does | rules that run it |", "| --- | --- | --- |"]
    of_module = rules_of_modules()
    for module in sorted(MODULES, key=lambda name: (stage(name) or len(ORDER) + 1, name)):
        said = (ast.get_docstring(ast.parse(MODULES[module].read_text())) or "").split("\n\n")[0]
        called = ", ".join(f"`{rule}`" for rule in of_module.get(module, []))
        lines.append(
            f"| `{module}.py` | {' '.join(said.split()).replace('|', '/')} | {called} |".replace("|  |", "| |")
        )
    return "\n".join(lines)


def test_map_of_the_code_is_current():
    assert generated(CODE, "modules") == map_of_the_code(), RENEW


def test_every_rule_with_a_script_has_its_module_on_the_map():
    assert set().union(*rules_of_modules().values()) == set(rules())
    assert set(rules_of_modules()) <= set(MODULES)


def test_what_is_named_in_code_is_there():
    """A page that tells where to put a line names functions and tables that are still called so."""
    places = [
        path for folder in ("rules", "scripts", "config", "workflow_tests") for path in (REPOSITORY / folder).rglob("*")
    ]
    code = "\n".join(path.read_text() for path in places if path.suffix in (".py", ".smk", ".yaml"))
    named = set(re.findall(r"`([A-Za-z_][\w.]*)[`(=]", CONTRIBUTING.read_text()))
    words = {name.rsplit(".", 1)[-1] for name in named if not name.endswith((".py", ".cff", ".md"))}
    assert words
    assert not {word for word in words if not re.search(rf"\b{re.escape(word)}\b", code)}


# --- the map of the measurements ------------------------------------------------------------------------------------


def map_of_the_measurements() -> str:
    """Return the table of the scripts that measure, with the pages that show their commands."""
    lines = ["| script | what it does | page |", "| --- | --- | --- |"]
    for script in sorted(MEASUREMENTS.parent.glob("*.py")):
        said = (ast.get_docstring(ast.parse(script.read_text())) or "").split("\n\n")[0]
        pages = [page for page in PAGES if f"benchmarks/{script.name}" in page.read_text()]
        links = ", ".join(f"[{page.stem}]({os.path.relpath(page, MEASUREMENTS.parent)})" for page in pages)
        lines.append(
            f"| `{script.name}` | {' '.join(said.split()).replace('|', '/')} | {links} |".replace("|  |", "| |")
        )
    return "\n".join(lines)


def test_map_of_the_measurements_is_current():
    assert generated(MEASUREMENTS, "scripts") == map_of_the_measurements(), RENEW


# --- examples and commands ------------------------------------------------------------------------------------------


def yaml_blocks() -> list[tuple[str, str]]:
    return [(file.relative_to(REPOSITORY).as_posix(), block) for file in DOCUMENTS
            for block in re.findall(r"^```yaml\n(.*?)^```", file.read_text(),
                                    flags=re.MULTILINE | re.DOTALL)]  # fmt: skip


def files_named_in(value: object) -> Iterator[str]:
    """Yield every path and file value below a configuration."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("path", "file", "labels"):
                yield from item.values() if isinstance(item, dict) else [item]
            yield from files_named_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from files_named_in(item)


@pytest.mark.parametrize(("file", "block"), yaml_blocks(), ids=lambda value: value if len(value) < 40 else "block")
def test_examples_are_valid_configurations(file, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config: dict = {}
    for default in DEFAULT_FILES:
        config = merged(config, yaml.safe_load(default.read_text()))
    example = yaml.safe_load(block)
    config = merged(config, example)
    # What exists in an example is checked as if it were selected.
    for kind in ("datasets", "splits", "models", "counterfactuals"):
        selected = config["select"].get(kind) or []
        config["select"][kind] = list(dict.fromkeys([*selected, *example.get(kind, {})]))
    for name in files_named_in(example):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    complete(config)


def test_efforts_are_documented_as_they_are():
    rows = [
        f"| `{name}` | {of.steps:g} × the defaults | {', '.join(map(str, of.seeds))} |" for name, of in EFFORTS.items()
    ]
    assert "\n".join(rows) in CONFIG_README.read_text()


def test_readme_shows_an_example_for_an_own_screen():
    assert "<!-- example: mine.yaml -->\n```yaml" in README.read_text()


@pytest.mark.parametrize("name", ["run", "test"])
def test_commands_parse_and_name_files_that_exist(name):
    match = re.search(
        rf"^<!-- command: {name} -->\n```bash\n(.*?)```", README.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert match, f"README.md has no block marked <!-- command: {name} -->"
    subprocess.run(["bash", "-n", "-c", match[1]], check=True)
    words = shlex.split(match[1].replace("&&", " && "))
    assert words[0] == "python3.11"
    requirements = words[words.index("-r") + 1]
    assert (REPOSITORY / requirements).is_file()


def test_bash_blocks_parse():
    for file in DOCUMENTS:
        for block in re.findall(r"^```(?:ba)?sh\n(.*?)^```", file.read_text(), flags=re.MULTILINE | re.DOTALL):
            subprocess.run(["bash", "-n", "-c", block], check=True)
            for word in shlex.split(block, comments=True):
                if re.match(r"(config|rules|scripts|envs|workflow_tests)/.*\.(yaml|smk|py|txt)$", word):
                    assert (REPOSITORY / word).exists(), f"{file.name} runs {word}"


def test_python_blocks_parse():
    blocks = [
        (file, block)
        for file in DOCUMENTS
        for block in re.findall(r"^```python\n(.*?)^```", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    ]
    assert len(blocks) > 10
    for file, block in blocks:
        compile(block, str(file), "exec")


def test_snakemake_blocks_parse():
    text = "\n".join(file.read_text() for file in DOCUMENTS)
    blocks = re.findall(r"^```snakemake\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        command = [sys.executable, "-m", "snakefmt", "--check", "-"]
        done = subprocess.run(command, input=block, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stderr  # 1: it would be laid out in another way


def anchors(file: Path) -> set[str]:
    """Return what the headings of a document are linked by."""
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_headings_that_exist():
    for file in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", file.read_text()):
            assert anchor in anchors(file.parent / target if target else file), f"{file.name} links {target}#{anchor}"


def test_files_that_are_linked_or_named_exist():
    for file in DOCUMENTS:
        text = file.read_text()
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (file.parent / target).exists(), f"{file.name} links {target}"
        for named in re.findall(
            r"`((?:config|docs|rules|scripts|envs|workflow_tests)/[\w./-]+\.(?:yaml|smk|py|txt|md|tsv))`", text
        ):
            assert (REPOSITORY / named).exists(), f"{file.name} names {named}"


def test_what_code_and_messages_name_is_where_they_say():
    """`config/README.md, "Add a split"` leads to a heading of that document."""
    files = [
        path
        for folder in (*("config", "envs", "rules", "scripts", "profiles", "docs", "leaderboard"), ".github")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".smk", ".yaml", ".yml", ".rst", ".txt") and "_build" not in path.parts
    ]
    files += [REPOSITORY / name for name in ("Snakefile", "CITATION.cff", ".snakemake-workflow-catalog.yml")]
    found = 0
    for file in files:
        text = " ".join(re.sub(r"^\s*#", "", file.read_text(), flags=re.MULTILINE).split())
        for document in set(re.findall(r"\b((?:docs|config|workflow_tests|leaderboard)/[\w./-]+\.md)\b", text)):
            assert (REPOSITORY / document).exists(), f"{file} names {document}"
        for document, heading in re.findall(r"\b((?:[\w-]+/)*[\w-]+\.md), \"([^\"]+)\"", text):
            found += 1
            anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            assert anchor in anchors(REPOSITORY / document), f"{file} names {document}, {heading}"
    assert found > 3


# --- pages ----------------------------------------------------------------------------------------------------------

OF_ANOTHER_FILE = ("changelog", "contributing", "keys", "leaderboard")


def test_readme_is_one_front_page():
    assert len(README.read_text().split()) <= 900


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in OF_ANOTHER_FILE], ids=lambda page: page.stem
)
def test_a_page_begins_with_its_bottom_line(page):
    lines = [line for line in page.read_text().splitlines() if line]
    assert lines[0].startswith("# ")
    assert "**" in lines[1], f"{page} begins without a sentence in bold"


def test_every_table_of_the_results_is_linked_and_whole():
    tables = sorted((SITE / "results").glob("*.tsv"))
    linked = set(re.findall(r"\]\((?:[\w./-]*/)?(\w+\.tsv)\)", "".join(page.read_text() for page in PAGES)))
    assert {table.name for table in tables} == linked
    for table in tables:
        widths = {line.count("\t") for line in table.read_text().splitlines()}
        assert len(widths) == 1, f"{table} has rows of {sorted(widths)} tabs"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    if not all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "furo", "sphinxcontrib.mermaid")):
        pytest.skip("envs/requirements-docs.txt is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", SITE, tmp_path / "site"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    keys = (tmp_path / "site" / "reference" / "keys.html").read_text()
    assert "select.datasets" in keys
    assert 'href="metrics.html' in keys


def test_versions_that_are_named_are_those_of_the_locks():
    pins = {
        name: version
        for lock in ("requirements.txt", "requirements-test.txt")
        for name, version in locked(lock).items()
    }
    named = [
        pin for file in DOCUMENTS for pin in re.findall(r"\b([\w-]+)==(\d[\w.]*\w)", file.read_text()) if pin[0] in pins
    ]
    assert {"torch", "snakemake-executor-plugin-slurm"} <= {name for name, _ in named}
    assert [(name, version) for name, version in named if pins[name] != version] == []


def test_ci_runs_the_command_of_the_readme():
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "<!-- command: test -->" in script.read_text()


# --- the graph of rules ---------------------------------------------------------------------------------------------

RULEGRAPH = re.compile(
    r"<!-- rulegraph: (?P<command>.*?) -->\n```mermaid\n(?P<graph>.*?)```\n<!-- rulegraph: end -->", flags=re.DOTALL
)


def drawn(text: str) -> tuple[set[str], set[tuple[str, str]]]:
    """Return rules and edges of a mermaid graph; their order and numbers are Snakemake's whim."""
    names = dict(re.findall(r"(id\d+)\[([^\]]+)\]", text))
    return set(names.values()), {(names[start], names[end]) for start, end in re.findall(r"(id\d+) --> (id\d+)", text)}


def rule_graph(command: str) -> str:
    """Return the graph that a command prints now, without its title and colours."""
    words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.partition("flowchart")[2].splitlines(keepends=True)
    return "flowchart" + "".join(line for line in said if "style id" not in line)


def test_rule_graph_is_current():
    shown = RULEGRAPH.search(RULES.read_text())
    assert shown, f"{RULES} has no rule graph between its markers"
    current = drawn(rule_graph(shown["command"]))
    assert current[0], "snakemake drew nothing"
    assert drawn(shown["graph"]) == current, RENEW


# --- what to cite ---------------------------------------------------------------------------------------------------

SCOPES = {
    "screen": "Screens",
    "prior": "Priors and names",
    "model": "Models",
    "metric": "Baselines and metrics",
    "software": "Software",
}
IDENTIFIER = re.compile(r"\b10\.\d{4,}/[\w./-]*\w|\d{4}\.\d{5}\b")


def references() -> list[dict]:
    """Return what CITATION.cff refers to."""
    return yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["references"]


def identifier(reference: dict) -> str:
    """Return doi:... or arXiv:..., or nothing."""
    return (
        f"doi:{reference['doi']}"
        if "doi" in reference
        else next((entry["value"] for entry in reference.get("identifiers", [])), "")
    )


def citations() -> str:
    """Return the list of docs/citations.md."""

    def author(entry: dict) -> str:
        return (
            entry.get("name")
            or f"{entry['family-names']} {' '.join(name[0] + '.' for name in entry['given-names'].split())}"
        )

    lines = []
    for scope, title in SCOPES.items():
        lines.append(f"## {title}\n")
        for entry in (entry for entry in references() if entry["scope"] == scope):
            authors = f"{', '.join(map(author, entry['authors']))}.".replace(", et al.", " et al.").replace("..", ".")
            place = f" *{entry['journal']}*" if "journal" in entry else ""
            found = f" {identifier(entry)}." if identifier(entry) else ""
            lines.append(
                f"* {authors} {entry['title']}.{place} ({entry['year']}).{found} "
                f"{entry['notes'][0].upper() + entry['notes'][1:]}."
            )
        lines.append("")
    return "\n".join(lines)


def test_citations_are_those_of_the_citation_file():
    assert generated(CITATIONS, "citations: CITATION.cff") == citations(), RENEW


def test_everything_that_is_used_is_cited():
    known = " ".join(identifier(entry) for entry in references())
    files = [
        REPOSITORY / "config/datasets.yaml",
        REPOSITORY / "config/config.yaml",
        *(REPOSITORY / "scripts").rglob("*.py"),
    ]
    used = {
        name
        for file in files
        for name in IDENTIFIER.findall("\n".join(re.findall(r"(?:doi|arXiv)[: ].*", file.read_text())))
    }
    assert len(used) > 20
    assert sorted(name for name in used if name not in known) == []


def renew() -> None:
    """Write the generated parts anew."""
    MODELS_SCHEMA.write_text(models_schema())
    write(CITATIONS, "citations: CITATION.cff", citations())
    write(CODE, "modules", map_of_the_code())
    write(COMMAND_LINE, "cli", command_line())
    write(MEASUREMENTS, "scripts", map_of_the_measurements())
    write(METRICS_PAGE, "metrics", metrics_table())
    enum = ", ".join(f"`{family}`" for family in FAMILIES)
    CONFIG_README.write_text(
        re.sub(r"(?m)^\| `family` \| one of [^|]*\|", f"| `family` | one of {enum} |", CONFIG_README.read_text())
    )
    for family in filter(with_params, FAMILIES):
        write(CONFIG_README, f"params: {family}", params_table(family))
    text = RULES.read_text()
    shown = RULEGRAPH.search(text)
    graph = rule_graph(shown["command"])
    if drawn(graph) != drawn(shown["graph"]):  # another order of the same graph is no change
        RULES.write_text(text[: shown.start("graph")] + graph + text[shown.end("graph") :])


if __name__ == "__main__":
    renew()

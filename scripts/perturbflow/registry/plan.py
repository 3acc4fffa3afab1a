"""The plan of the runs: everything that a configuration makes."""

from collections.abc import Mapping
from itertools import product

import pandas as pd

from perturbflow.errors import InputError
from perturbflow.registry.config import (
    COEXPRESSION,
    check_predictions,
    complete,
    held_out_of,
    latent_files,
    predictions_file,
)
from perturbflow.registry.contexts import CONTEXT_KINDS, known_contexts
from perturbflow.registry.effort import EFFORTS
from perturbflow.registry.families import FAMILIES, REFERENCES, Family, NetworkParams
from perturbflow.registry.schemas import Places
from perturbflow.registry.sources import CONTENT_KEYS, content_of, files_of
from perturbflow.registry.unions import is_union

# Keys of a dataset's `perturbation` by which a label is read.
NAMING = ("control", "control_pattern", "separator", "pattern", "rename")


class Plan:
    """Everything that will be run.

    Parameters
    ----------
    config
        The merged configuration, as Snakemake hands it over.
    files
        The configuration files, and --config, for messages.
    files_are_there
        Whether the user's own files have to be there already.

    Attributes
    ----------
    config
        The completed configuration.
    datasets
        The harmonized screens.
    divisions
        One row per dataset × split of the runs. Where no model is selected, it has all possible ones.
    runs
        One row per dataset × split × model × seed, with the model's family: the selected models, and a floor
        or ceiling of every family of REFERENCES. It is empty where no split or no model is selected.
    queries
        One row per counterfactual query × seed.
    warranties
        One row per dataset × split × model × seed that is checked for what-if questions: learned families, and all
        models that a query asks.
    sweeps
        One row per dataset × split × model whose params are searched (`sweep`).
    left_out
        One sentence per selection that is not possible.
    """

    def __init__(self, config: dict, files: Places = (), files_are_there: bool = True) -> None:
        self.config = complete(config, files, files_are_there)
        select = self.config["select"]
        self.left_out: list[str] = []
        possible, rows = self._planned_runs()
        self.runs = pd.DataFrame(rows, columns=["dataset", "split", "model", "seed", "family"])
        self.left_out = list(dict.fromkeys(self.left_out))
        if files_are_there:
            check_predictions(self.config, self.runs.to_dict("records"), files)
        is_empty = self.runs.empty
        if is_empty and ((select["models"] and select["seeds"]) or not possible) and select["splits"]:
            raise InputError("Nothing is left to run. " + " ".join(self.left_out))
        made = pd.DataFrame(possible if is_empty else self.runs[["dataset", "split"]], columns=["dataset", "split"])
        self.divisions = made.drop_duplicates(ignore_index=True)
        self.datasets = list(dict.fromkeys(self.divisions["dataset"] if select["splits"] else select["datasets"]))
        if is_empty:
            self.left_out.append(self._instead())
        self.sweeps = pd.DataFrame(self._planned_sweeps(), columns=["dataset", "split", "model"])
        self.queries = pd.DataFrame(self._planned_queries(), columns=["dataset", "split", "model", "seed", "query"])
        key = ["dataset", "split", "model", "seed"]
        is_learned = self.runs["model"].map(self._is_warranted).astype(bool)
        checked = pd.concat([self.runs.loc[is_learned, key], self.queries[key]])
        self.warranties = checked.drop_duplicates(ignore_index=True)

    def _is_warranted(self, model: str) -> bool:
        """Return whether a model is checked for what-if questions, asked or not."""
        return self.family(model).kind == "learned" and self.family(model).answers_counterfactuals

    def _planned_runs(self) -> tuple[list[tuple[str, str]], list[tuple[str, str, str, int, str]]]:
        """Return the (dataset, split) that can be made, and the rows of `runs`.

        Every other selection becomes a sentence of `left_out`.
        """
        select = self.config["select"]
        possible, rows = [], []
        for dataset, split in product(select["datasets"], select["splits"]):
            base = self._base(split)
            if reason := self._why_impossible(dataset, split):
                if not self._has_other_folds(dataset, split):
                    self.left_out.append(f"{dataset} × {base} is left out: {reason}.")
                continue
            possible.append((dataset, split))
            reasons = {model: self._why_unfit(model, split) for model in select["models"]}
            self.left_out += [f"{model} × {base} is left out: {why}." for model, why in reasons.items() if why]
            for model in self._with_references([model for model, why in reasons.items() if not why]):
                family = self.config["models"][model]["family"]
                rows += [(dataset, split, model, seed, family) for seed in select["seeds"]]
        return possible, rows

    def _planned_queries(self) -> list[tuple[str, str, str, int, str]]:
        """Return the rows of `queries`; those that cannot be asked become sentences of `left_out`."""
        rows = []
        for name in self.config["select"]["counterfactuals"]:
            query = self.config["counterfactuals"][name]
            dataset, split, model = query["dataset"], query["split"], query["model"]
            if reason := self._why_impossible(dataset, split) or self._why_unfit(model, split):
                self.left_out.append(f"counterfactual {name} is left out: {reason}.")
            else:
                rows += [(dataset, split, model, seed, name) for seed in self.config["select"]["seeds"]]
        return rows

    def _planned_sweeps(self) -> list[tuple[str, str, str]]:
        """Return the rows of `sweeps`; a split that the model cannot serve becomes a sentence of `left_out`."""
        if not self.config["sweep"]:
            return []
        model, rows = self.config["sweep"]["model"], []
        for dataset, split in self.divisions.itertuples(index=False):
            if reason := self._why_unfit(model, split):
                self.left_out.append(f"the sweep of {model} × {split} is left out: {reason}.")
            else:
                rows.append((dataset, split, model))
        return rows

    def _with_references(self, models: list[str]) -> list[str]:
        """Return the models and a floor or ceiling of every family of REFERENCES that is not among them.

        Without models it returns none.
        """
        known = {block["family"]: name for name, block in reversed(self.config["models"].items())}
        families = {self.config["models"][model]["family"] for model in models}
        return models + [known[family] for family in REFERENCES if models and family not in families]

    def _instead(self) -> str:
        """Return a sentence on the results of a plan that trains nothing."""
        empty = next(key for key in ("splits", "models", "seeds") if not self.config["select"][key])
        made = "harmonized" if empty == "splits" else "harmonized, split and paired"
        return f"select.{empty} is empty, so no model is trained: {', '.join(self.datasets)} will be {made}."

    def _why_impossible(self, dataset: str, split: str) -> str | None:
        """Return why a screen cannot serve a split, or None."""
        block, screen = self.config["splits"][split], self.config["datasets"][dataset]
        if dataset not in block.get("datasets", [dataset]):
            return f"the split is for {' and '.join(block['datasets'])} (datasets in its block)"
        if screen.get("controls_only"):
            return f"{dataset} holds controls alone (controls_only: true), so it serves what-if questions, in a union"
        if block["kind"] == "unseen_context" and len(known := known_contexts(screen, block["covariate"])) == 1:
            return f"all cells of {dataset} are of one {block['covariate']}, {known[0]}"
        if block["kind"] == "unseen_combination" and screen.get("combinations") is False:
            return f"{dataset} holds no combinations (combinations: false)"
        if block["kind"] == "unseen_dose" and not _may_have_doses(screen):
            return f"{dataset} declares no perturbation.dose, so its perturbations have no doses"
        # Batches of a merged file differ at least by the screen that they belong to.
        declared = {*screen["covariates"], *(["batch"] if "dataset" in screen["covariates"] else [])}
        if block["kind"] in CONTEXT_KINDS and block["covariate"] not in declared:
            return f"{dataset} declares no covariates.{block['covariate']}, so all its cells are of one context"
        if (
            block["kind"] in CONTEXT_KINDS
            and self._is_of_each(split)
            and not known_contexts(screen, block["covariate"])
        ):
            key = f"contexts.{block['covariate']}"
            return f"{dataset} does not tell its contexts without the data; name them under {key} in its block"
        if (
            held_out_of(block.get("held_out", {}), dataset) is None
            and block["kind"] != "file"
            and not {"test_fraction", "folds"} & {*block}
        ):
            return f"held_out names nothing of {dataset}, and there is no test_fraction"
        return None

    def _has_other_folds(self, dataset: str, split: str) -> bool:
        """Return whether a split leaves out a context of other datasets, and another split one of this dataset."""
        covariate = self.config["splits"][split].get("covariate", "")
        return self._is_of_each(split) and len(known_contexts(self.config["datasets"][dataset], covariate)) > 1

    def _is_of_each(self, split: str) -> bool:
        """Return whether a split is one of those that leave out each context in turn."""
        return "name" in self.config["splits"][split] and "folds" not in self.config["splits"][split]

    def _why_unfit(self, model: str, split: str) -> str | None:
        """Return why a model cannot serve a split, or None."""
        kind, kinds = self.config["splits"][split]["kind"], self.family(model).split_kinds
        if kind == "unseen_perturbation" and not self.config["models"][model]["params"].get("unseen_genes", True):
            return "it predicts no gene that training never saw perturbed (params.unseen_genes)"
        return (
            f"family {self.config['models'][model]['family']} serves {', '.join(kinds)} only"
            if kinds and kind not in kinds
            else None
        )

    def _base(self, split: str) -> str:
        """Return the name that a split was selected by: the folds of a block share one."""
        return self.config["splits"][split].get("name", split)

    @property
    def sentence(self) -> str:
        """The plan in a sentence, whatever of it is done already; nothing where no model is selected."""
        if self.runs.empty:
            return ""
        models = list(self.runs["model"].unique())
        n_learned = sum(self.family(model).kind == "learned" for model in models)
        numbers = [
            (len(self.runs["dataset"].unique()), "dataset"),
            (len(self.divisions), "split"),
            (len(models), "model"),
            (len(self.runs["seed"].unique()), "seed"),
            (len(self.runs), "run"),
        ]
        *parts, runs = (f"{n:,} {word}{'' if n == 1 else 's'}" for n, word in numbers)
        parts[2] += f" ({n_learned} learned)"
        return f"The plan: {', '.join(parts)}: {runs}. Every job of it: snakemake -n --quiet rules."

    @property
    def effort(self) -> str:
        """A warning about a single seed at effort quick; nothing where no network is trained, or there are more."""
        networks = {name for name, family in FAMILIES.items() if issubclass(family.params, NetworkParams)}
        is_quick = self.config["effort"] == "quick" and len(self.config["select"]["seeds"]) == 1
        if not is_quick or not networks & {*self.runs["family"]}:
            return ""
        return (
            "Effort quick: one seed, which hides how much trainings differ. For claims, set effort: standard "
            f"(seeds {', '.join(map(str, EFFORTS['standard'].seeds))})."
        )

    def folders(self) -> list[str]:
        """Return the folders that downloads and results of all runs are written to."""
        runs = [run for table in (self.runs, self.queries) for run in table.itertuples()]
        datasets = dict.fromkeys([*self.datasets, *[run.dataset for run in runs]])
        screens = dict.fromkeys(screen for name in datasets for screen in self.members(name))
        retrieved = dict.fromkeys([*screens, *self.priors])
        results = dict.fromkeys(f"results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}" for run in runs)
        if not runs:
            results = dict.fromkeys(f"results/{name}" for name in self.datasets)
        results |= dict.fromkeys(f"results/{name}" for name in screens if name not in datasets)
        return [*[f"resources/{name}" for name in retrieved], *results]

    def models_of_rule(self, rule: str) -> list[str]:
        """Return the names of the models that a training rule trains."""
        return [name for name, block in self.config["models"].items() if FAMILIES[block["family"]].rule == rule]

    @property
    def swept_models(self) -> list[str]:
        """Names of the models whose params are searched: one or none."""
        return [self.config["sweep"]["model"]] if self.config["sweep"] else []

    def family(self, model: str) -> Family:
        """Return the family of a model."""
        return FAMILIES[self.config["models"][model]["family"]]

    def params(self, run: Mapping[str, str]) -> dict:
        """Return the params of a run's model: the path of predictions that were made elsewhere is filled in.

        Parameters
        ----------
        run
            Its dataset, split, model and seed.
        """
        block = self.config["models"][run["model"]]
        file = predictions_file(block, run)
        return block["params"] if file is None else {**block["params"], "file": file}

    def model_files(self, run: Mapping[str, str]) -> list[str]:
        """Return the user's own files that a run's model is made from."""
        block = self.config["models"][run["model"]]
        file = predictions_file(block, run)
        return latent_files(block) if file is None else [file]

    @property
    def families(self) -> dict[str, str]:
        """Return model → family of all runs, in their order."""
        return dict(zip(self.runs["model"], self.runs["family"], strict=True))

    @property
    def context_folds(self) -> dict[str, str]:
        """Return split → the block that it is a fold of, for splits whose folds hold out contexts."""
        blocks = {split: self.config["splits"][split] for split in self.divisions["split"].unique()}
        return {
            split: block["name"]
            for split, block in blocks.items()
            if block["kind"] == "unseen_context" and "name" in block
        }

    @property
    def descriptions(self) -> dict[str, str]:
        """Return family → its description, in the words of the report."""
        return {name: FAMILIES[name].description for name in dict.fromkeys(self.runs["family"])}

    @property
    def unions(self) -> list[str]:
        """Names of the datasets that unite others."""
        return [name for name, block in self.config["datasets"].items() if is_union(block)]

    @property
    def screens(self) -> list[str]:
        """Names of the datasets that have a source of their own."""
        return [name for name, block in self.config["datasets"].items() if not is_union(block)]

    def members(self, dataset: str) -> list[str]:
        """Return the screens that a dataset unites; itself where it is none."""
        members: list[str] = self.config["datasets"][dataset].get("union", [dataset])
        return members

    def union(self, name: str) -> dict:
        """Return the part of a union's block that decides its cells and genes."""
        block = self.config["datasets"][name]
        return {"members": block["union"], **{key: block[key] for key in ("genes", "perturbation_types", "organism")}}

    def dataset(self, name: str) -> dict:
        """Return the part of a dataset's block that harmonization reads: a change of the rest makes nothing stale."""
        unread = ("reference", "licence", "qc", "combinations", "contexts", *CONTENT_KEYS)
        block = {key: value for key, value in self.config["datasets"][name].items() if key not in unread}
        # The manifest has the source of a download; a further mirror makes nothing stale.
        block["source"] = {
            key: value for key, value in block["source"].items() if key in ("path", "member", "labels", "modality")
        }
        return block

    def files(self, name: str) -> dict[str, dict]:
        """Return role → file that the download of a dataset or prior retrieves: name, mirrors, size and checksums."""
        return files_of(self._retrieved(name))

    def content(self, name: str) -> dict[str, dict]:
        """Return role → declared content of the downloaded files of a dataset or prior."""
        return content_of(self._retrieved(name))

    def _retrieved(self, name: str) -> dict:
        """Return the block of a dataset or prior; none share a name."""
        return self.config["datasets"].get(name) or self.config["priors"][name]

    @property
    def priors(self) -> list[str]:
        """Names of the priors among the sources of embeddings, in their order."""
        return [
            source
            for source in self.config["embeddings"]["sources"]
            if isinstance(source, str) and source != COEXPRESSION
        ]

    @property
    def embedding_tables(self) -> list[str]:
        """The user's own tables among the sources of embeddings, in their order."""
        return [source["file"] for source in self.config["embeddings"]["sources"] if isinstance(source, dict)]

    def split(self, name: str, dataset: str) -> dict:
        """Return a split's block for one screen: held_out is the list of this screen, if it has one."""
        block = dict(self.config["splits"][name])
        if held_out := held_out_of(block.pop("held_out", {}), dataset):
            block["held_out"] = held_out
        return block

    def naming(self, split: str, dataset: str) -> dict:
        """Return the part of a dataset's block that reads the labels in a split's block.

        It is empty where the split names no labels; then a change of the dataset's block makes no split stale.
        """
        spec = self.split(split, dataset)
        names_labels = "support" in spec or ("held_out" in spec and spec["kind"] not in CONTEXT_KINDS)
        if spec["kind"] != "file" and not names_labels:
            return {}
        block = self.config["datasets"][dataset]
        declared = {key: value for key, value in block["perturbation"].items() if key in NAMING}  # none of a union
        return {"perturbation": declared, "perturbation_type": block["perturbation_type"]}

    def qc(self, dataset: str) -> dict:
        """Return the limits of quality control of a dataset: the global ones, overridden by its own."""
        return {**self.config["qc"], **self.config["datasets"][dataset].get("qc", {})}


def _may_have_doses(screen: dict) -> bool:
    """Return whether a screen can have doses: declared ones, or compounds, whose labels may hold them."""
    declared = screen["perturbation"]
    return (
        "dose" in declared
        or "(?P<dose>" in declared.get("pattern", "")
        or screen["perturbation_type"] in ("drug", "unknown")
    )

"""GO annotations and interactions become vectors: formats, omissions, and the meaning of nearness."""

import gzip
import io
import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from perturbflow.embeddings import rows_of
from perturbflow.errors import InputError
from perturbflow.priors import prior
from perturbflow.priors.annotations import annotation_vectors, read_annotations, with_ancestors
from perturbflow.priors.interactions import KNOWS, association_vectors, interaction_vectors, read_edges
from perturbflow.priors.reading import leading_factors, signed

OBO = """format-version: 1.2
ontology: go

[Term]
id: GO:0000001
name: root
namespace: biological_process

[Term]
id: GO:0000002
name: middle
alt_id: GO:0000092
is_a: GO:0000001 ! root

[Term]
id: GO:0000003
name: part
relationship: part_of GO:0000002 ! middle
relationship: regulates GO:0000005 ! elsewhere

[Term]
id: GO:0000004
name: gone
is_a: GO:0000001 ! root
is_obsolete: true

[Term]
id: GO:0000005
name: elsewhere
is_a: GO:0000001 {source="x"} ! root

[Typedef]
id: part_of
name: part of
"""

# symbol, qualifier, term, evidence
ANNOTATIONS = [
    ("AAA", "involved_in", "GO:0000003", "IDA"),
    ("AAA", "NOT|involved_in", "GO:0000005", "IDA"),
    ("BBB", "involved_in", "GO:0000092", "IEA"),
    ("CCC", "involved_in", "GO:0000005", "IEP"),
    ("DDD", "involved_in", "GO:0000001", "ND"),
    ("EEE", "involved_in", "GO:0000004", "TAS"),
    ("AARS", "contributes_to", "GO:0000005", "IMP"),
]


def gaf(path: Path, rows: list[tuple] = ANNOTATIONS) -> Path:
    """Write GAF 2.2, gzipped."""
    lines = ["!gaf-version: 2.2", "!date-generated: 2025-01-01"]
    for symbol, qualifier, term, evidence in rows:
        columns = [
            "UniProtKB",
            "P1",
            symbol,
            qualifier,
            term,
            "PMID:1",
            evidence,
            "",
            "P",
            'it"s a gene!',
            "syn",
            "protein",
            "taxon:9606",
        ]
        lines.append("\t".join([*columns, "20250101", "UniProt", "", ""]))
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return path


def table(path: Path, rows: list[tuple] = ANNOTATIONS) -> Path:
    """Write a table with a header."""
    frame = pd.DataFrame(rows, columns=["symbol", "qualifier", "go_id", "evidence"])
    frame.to_csv(path, sep="\t", index=False)
    return path


def database(path: Path, rows: list[tuple] = ANNOTATIONS) -> Path:
    """Write an annotation package of Bioconductor: more general terms in tables *_all, nothing that is negated."""
    above = {"GO:0000003": ["GO:0000003", "GO:0000002", "GO:0000001"], "GO:0000005": ["GO:0000005", "GO:0000001"]}
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE gene_info (_id INTEGER, gene_name TEXT, symbol TEXT)")
    symbols = list(dict.fromkeys(symbol for symbol, *_ in rows))
    connection.executemany("INSERT INTO gene_info VALUES (?, '', ?)", enumerate(symbols))
    for aspect in ("bp", "mf", "cc"):
        connection.execute(f"CREATE TABLE go_{aspect}_all (_id INTEGER, go_id TEXT, evidence TEXT)")
    for symbol, qualifier, term, evidence in rows:
        terms = {"GO:0000092": ["GO:0000002", "GO:0000001"], "GO:0000004": []}.get(term, above.get(term, [term]))
        if "NOT" not in qualifier:
            values = [(symbols.index(symbol), name, evidence) for name in terms]
            connection.executemany("INSERT INTO go_bp_all VALUES (?, ?, ?)", values)
    connection.commit()
    connection.close()
    return path


def package(path: Path) -> Path:
    """Write the database as a source package."""
    content = database(path.with_suffix(".sqlite")).read_bytes()
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (
            ("org.Xx.eg.db/DESCRIPTION", b"Package: org.Xx.eg.db"),
            ("org.Xx.eg.db/inst/extdata/org.Xx.eg.sqlite", content),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


EXPECTED = {
    ("AAA", "GO:0000003"), ("AAA", "GO:0000002"), ("AAA", "GO:0000001"), ("BBB", "GO:0000002"), ("BBB", "GO:0000001"),
    ("AARS1", "GO:0000005"), ("AARS1", "GO:0000001"),
}  # fmt: skip


@pytest.mark.parametrize("write", [gaf, table, database, package])
def test_all_formats_give_the_same_annotations(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """Negated, unknown, expression-derived and obsolete terms are left out; symbols are approved."""
    (tmp_path / "go.obo").write_text(OBO)
    found = read_annotations({"annotations": write(tmp_path / "annotations.tsv"), "ontology": tmp_path / "go.obo"})
    assert set(found.itertuples(index=False, name=None)) == EXPECTED
    assert not found.duplicated().any()


def test_without_the_ontology_terms_are_those_annotated(tmp_path: Path) -> None:
    found = read_annotations({"file": gaf(tmp_path / "goa.gaf.gz")})
    assert set(found["term"][found["gene"] == "AAA"]) == {"GO:0000003"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=12))
def test_ancestors_are_closed(tmp_path_factory: pytest.TempPathFactory, parents: list[list[int]]) -> None:
    """Whoever has a term has all above it; adding them twice adds nothing. Even where the ontology has a circle."""
    names = [f"GO:{i:07d}" for i in range(len(parents))]
    above = [[names[j] for j in of if j < len(parents)] for of in parents]
    stanzas = [
        f"[Term]\nid: {name}\n" + "".join(f"is_a: {p} ! x\n" for p in of) for name, of in zip(names, above, strict=True)
    ]
    ontology = tmp_path_factory.mktemp("obo") / "go.obo"
    ontology.write_text("format-version: 1.2\n\n" + "\n".join(stanzas))
    once = with_ancestors(pd.DataFrame({"gene": names, "term": names}), ontology)
    has = {gene: set(of["term"]) for gene, of in once.groupby("gene")}
    for name, of in zip(names, above, strict=True):
        assert {name, *of} <= has[name]
        assert all(has[parent] <= has[name] for parent in of)
    twice = with_ancestors(once, ontology)
    assert set(twice.itertuples(index=False, name=None)) == set(once.itertuples(index=False, name=None))


def families(n_families: int = 12, size: int = 8, seed: int = 0) -> list[tuple]:
    """Return annotations of genes in families that share terms; every gene also has the root and a term of its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for family in range(n_families):
        for member in range(size):
            gene = f"F{family}M{member}"
            terms = [1, 100 + family * size + member, *(10_000 + family * 10 + rng.choice(10, 6, replace=False))]
            rows += [(gene, "", f"GO:{term:07d}", "IDA") for term in terms]
    return rows


def nearest_is_of_family(vectors: pd.DataFrame) -> float:
    """Return how often the nearest gene is of the same family."""
    X = vectors.to_numpy() / np.linalg.norm(vectors.to_numpy(), axis=1, keepdims=True)
    similarity = X @ X.T
    np.fill_diagonal(similarity, -np.inf)
    family = vectors.index.str.extract(r"F(\d+)M")[0].to_numpy()
    return float((family[similarity.argmax(axis=1)] == family).mean())


def test_genes_of_a_family_lie_close(tmp_path: Path) -> None:
    vectors = annotation_vectors({"file": table(tmp_path / "go.tsv", families())}, n_dimensions=16)
    assert vectors.shape == (96, 16)
    assert nearest_is_of_family(vectors) > 0.95
    # The root, which all have, and terms of one gene tell nothing.
    without = [row for row in families() if int(row[2][3:]) >= 10_000]
    pd.testing.assert_frame_equal(
        vectors, annotation_vectors({"file": table(tmp_path / "less.tsv", without)}, n_dimensions=16)
    )


def test_vectors_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = families()
    first = annotation_vectors({"file": table(tmp_path / "a.tsv", rows)}, n_dimensions=8)
    second = annotation_vectors({"file": table(tmp_path / "b.tsv", rows[::-1])}, n_dimensions=8)
    pd.testing.assert_frame_equal(first, second)


# --- interactions ---------------------------------------------------------------------------------------------------


def edge_list(path: Path, rows: list[tuple], columns: tuple[str, ...] = ("a", "b")) -> Path:
    """Write a list of edges."""
    pd.DataFrame(rows, columns=columns).to_csv(path, sep="\t", index=False)
    return path


def modules(n_modules: int = 12, size: int = 8, seed: int = 0) -> list[tuple]:
    """Return edges: most pairs within a module, some between."""
    rng = np.random.default_rng(seed)
    names = [f"F{family}M{member}" for family in range(n_modules) for member in range(size)]
    within = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if a.split("M")[0] == b.split("M")[0] and rng.random() < 0.7
    ]
    return within + [tuple(rng.choice(names, 2, replace=False)) for _ in range(100)]


def test_genes_of_a_module_lie_close(tmp_path: Path) -> None:
    vectors = interaction_vectors({"file": edge_list(tmp_path / "edges.tsv", modules())}, n_dimensions=16)
    assert vectors.shape == (96, 16)
    assert nearest_is_of_family(vectors) > 0.9


def test_edges_are_undirected_once_and_without_loops(tmp_path: Path) -> None:
    rows = [("B", "A", 0.5), ("A", "B", 0.9), ("A", "A", 1.0), ("NA", "AARS", 0.2)]
    found = read_edges({"file": edge_list(tmp_path / "edges.tsv", rows, ("x", "y", "score"))})
    assert found.values.tolist() == [["A", "B", 0.9], ["AARS1", "NA", 0.2]]
    (tmp_path / "more").mkdir()
    turned = [(b, a) for a, b in modules()]
    one, other = (
        interaction_vectors({"file": edge_list(tmp_path / n, of)}, n_dimensions=8)
        for n, of in (("1.tsv", modules()), ("2.tsv", turned))
    )
    pd.testing.assert_frame_equal(one, other)


def string(folder: Path, rows: list[tuple]) -> dict[str, Path]:
    """Write STRING's two files: physical.links.detailed and info."""
    lines = ["protein1 protein2 experimental database textmining combined_score"]
    lines += [f"9606.{a} 9606.{b} {experimental} {base} {text} {999}" for a, b, experimental, base, text in rows]
    links, info = (
        folder / "9606.protein.physical.links.detailed.v12.0.txt.gz",
        folder / "9606.protein.info.v12.0.txt.gz",
    )
    links.write_bytes(gzip.compress("\n".join(lines).encode()))
    names = ["#string_protein_id\tpreferred_name\tprotein_size\tannotation"]
    names += [f'9606.{p}\t{p[1:]}\t100\tA "protein' for p in sorted({p for a, b, *_ in rows for p in (a, b)})]
    info.write_bytes(gzip.compress("\n".join(names).encode()))
    return {"links": links, "info": info}


def test_string_is_scored_without_text_mining(tmp_path: Path) -> None:
    rows = [
        ("PA", "PB", 500, 0, 0),
        ("PA", "PC", 0, 0, 999),
        ("PB", "PC", 300, 300, 0),
        ("PC", "PD", 350, 0, 900),
        ("PB", "PA", 500, 0, 0),
    ]
    found = read_edges(string(tmp_path, rows)).set_index(["a", "b"])["weight"]
    # 0.3 twice: each less the prior is (0.3 − 0.041) / 0.959 = 0.27; 1 − 0.73² · 0.959 = 0.489
    assert found.round(3).to_dict() == {("A", "B"): 0.5, ("B", "C"): 0.489}


# --- associations ---------------------------------------------------------------------------------------------------

CHANNELS = ["neighborhood", "fusion", "cooccurence", "coexpression", "experimental", "database", "textmining"]


def full_string(
    folder: Path, scores: dict[tuple[str, str], int], detailed: bool = False, alone: tuple[str, ...] = ()
) -> dict[str, Path]:
    """Write STRING's full files as of version 12.0.

    Every pair stands in both directions, proteins by ENSP ids, names in protein.info.
    """
    folder.mkdir(exist_ok=True)
    proteins = {
        name: f"9606.ENSP{i:011d}"
        for i, name in enumerate(sorted({name for pair in scores for name in pair} | {*alone}))
    }
    lines = [" ".join(["protein1", "protein2", *(CHANNELS if detailed else []), "combined_score"])]
    for (a, b), score in scores.items():
        channels = ["0"] * 6 + [str(score)] if detailed else []
        lines += [" ".join([proteins[x], proteins[y], *channels, str(score)]) for x, y in ((a, b), (b, a))]
    links = folder / f"9606.protein.links{'.detailed' if detailed else ''}.v12.0.txt.gz"
    info = folder / "9606.protein.info.v12.0.txt.gz"
    links.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    names = ["#string_protein_id\tpreferred_name\tprotein_size\tannotation"]
    names += [f'{protein}\t{name}\t100\tIts "role; in.' for name, protein in proteins.items()]
    info.write_bytes(gzip.compress(("\n".join(names) + "\n").encode()))
    return {"links": links, "info": info}


def two_blocks(size: int = 10) -> dict[tuple[str, str], int]:
    """Return two blocks of genes: all pairs of a block at 0.9, all others at 0.15, which is the least of STRING."""
    names = [f"{block}{i}" for block in "AB" for i in range(size)]
    return {(a, b): 900 if a[0] == b[0] else 150 for i, a in enumerate(names) for b in names[i + 1 :]}


@pytest.mark.parametrize("detailed", [False, True])
def test_two_blocks_have_a_known_component(detailed: bool, tmp_path: Path) -> None:
    """In a regular graph of degree d and τ = d it is ±(9 · 0.9 − 10 · 0.15) / 2d, block against block.

    The degree is d = 9 · 0.9 + 10 · 0.15.
    """
    found = association_vectors(full_string(tmp_path, two_blocks(), detailed), n_dimensions=1)
    value = (9 * 0.9 - 10 * 0.15) / (2 * (9 * 0.9 + 10 * 0.15))
    expected = [value] * 10 + [-value] * 10
    np.testing.assert_allclose(found[0], expected, atol=1e-9)


def random_scores(n: int = 60, seed: int = 0) -> dict[tuple[str, str], int]:
    """Return scores of about half of all pairs."""
    rng = np.random.default_rng(seed)
    names = [f"N{i:02d}" for i in range(n)]
    return {
        (a, b): int(rng.integers(150, 1000)) for i, a in enumerate(names) for b in names[i + 1 :] if rng.random() < 0.5
    }


def test_components_are_those_of_the_full_decomposition(tmp_path: Path) -> None:
    """Eigenvectors of (D + τ)^-½ A (D + τ)^-½ by the definition, all of them, on a network small enough."""
    scores = random_scores()
    found = association_vectors(full_string(tmp_path, scores), n_dimensions=5)
    A = pd.DataFrame(0.0, index=found.index, columns=found.index)
    for (a, b), score in scores.items():
        A.loc[a, b] = A.loc[b, a] = score / 1000
    mass = A.sum().to_numpy() + A.sum().mean()
    values, vectors = np.linalg.eigh(A.to_numpy() / np.sqrt(np.outer(mass, mass)))
    leading = np.argsort(values)[::-1][1:6]
    expected = vectors[:, leading] * np.sqrt(mass.sum() / mass)[:, None]
    np.testing.assert_allclose(found.to_numpy(), signed(expected) * values[leading], atol=1e-8)
    np.testing.assert_allclose((found.to_numpy() ** 2 * (mass / mass.sum())[:, None]).sum(axis=0), values[leading] ** 2)


def test_associations_depend_on_neither_order_nor_chance(tmp_path: Path) -> None:
    """The signs too: an eigenvector is as good as its opposite, and here it is always the same of the two."""
    scores = random_scores()
    turned = {(b, a): score for (a, b), score in reversed(scores.items())}
    one, again, other = (
        association_vectors(files, n_dimensions=8)
        for files in (
            full_string(tmp_path / "1", scores),
            full_string(tmp_path / "1", scores),
            full_string(tmp_path / "2", turned, True),
        )
    )
    pd.testing.assert_frame_equal(one, again, check_exact=True)
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert (one.max() >= -one.min() - 1e-9).all()


def test_blocks_of_rows_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = full_string(tmp_path, random_scores())
    whole = association_vectors(files, n_dimensions=8)
    monkeypatch.setattr("perturbflow.priors.reading.BLOCK_ROWS", 7)
    pd.testing.assert_frame_equal(whole, association_vectors(files, n_dimensions=8), check_exact=True)


def test_a_gene_without_an_association_has_no_row(tmp_path: Path) -> None:
    """Nor has one whose scores are all below 0.15; where its vector is asked for, it is NaN."""
    scores = two_blocks() | {("A0", "LOW"): 149, ("A0", "AARS"): 150}
    found = association_vectors(full_string(tmp_path, scores, alone=("ALONE",)), n_dimensions=2)
    assert len(found) == 21
    rows = rows_of(found, ["A0", "ALONE", "LOW", "AARS1"])
    assert rows.isna().all(axis=1).tolist() == [False, True, True, False]
    assert rows.notna().all(axis=1).tolist() == [True, False, False, True]


def test_genes_that_hang_on_by_a_thread_take_no_component(tmp_path: Path) -> None:
    """Components are of modules, not of pairs.

    There are six modules and twenty pairs of genes; one weak score joins each pair to the rest.
    """
    rng = np.random.default_rng(0)
    names = [f"F{family}M{member}" for family in range(6) for member in range(20)]
    scores = {
        (a, b): 800
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if rng.random() < (0.7 if a.split("M")[0] == b.split("M")[0] else 0.02)
    }
    for i in range(20):
        scores |= {(f"X{i}", f"Y{i}"): 900, (f"X{i}", names[6 * i]): 150}
    found = association_vectors(full_string(tmp_path, scores), n_dimensions=5)
    pairs = found.index.str.match("[XY]")
    assert (np.square(found[pairs]).sum() < 0.05 * np.square(found).sum()).all()
    assert nearest_is_of_family(found[~pairs]) > 0.95


def test_what_knows_the_literature_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log and in the file, so that whatever reads the vectors can say it too; other kinds say nothing."""
    files = full_string(tmp_path, random_scores(140))
    prior([*files.values()], tmp_path / "full.parquet", "associations", [*files])
    assert f"These vectors know {KNOWS}" in caplog.text
    written = pd.read_parquet(tmp_path / "full.parquet")
    assert written.shape == (140, 128)
    assert written.attrs == {"knows": KNOWS}
    caplog.clear()
    prior([edge_list(tmp_path / "edges.tsv", modules())], tmp_path / "ppi.parquet", "ppi", ["file"])
    assert "know" not in caplog.text
    assert pd.read_parquet(tmp_path / "ppi.parquet").attrs == {}


# --- all ------------------------------------------------------------------------------------------------------------


def test_leading_factors_are_those_of_the_full_decomposition() -> None:
    X = np.random.default_rng(0).normal(size=(40, 30))
    vectors, values = leading_factors(sparse.csr_matrix(X), 5)
    U, s, _ = np.linalg.svd(X, full_matrices=False)
    np.testing.assert_allclose(values, s[:5])
    np.testing.assert_allclose(np.abs(vectors), np.abs(U[:, :5]), atol=1e-8)
    assert (vectors[np.abs(vectors).argmax(axis=0), range(5)] > 0).all()


def test_the_step_writes_all_genes(tmp_path: Path) -> None:
    prior([table(tmp_path / "go.tsv", families())], tmp_path / "embedding.parquet", "go", ["file"])
    written = pd.read_parquet(tmp_path / "embedding.parquet")
    assert written.index.name == "gene"
    assert written.shape == (96, 64)
    assert (written.dtypes == np.float32).all()
    assert np.isfinite(written.to_numpy()).all()


FAULTS = {
    "no such columns": (
        "go",
        {"file": "gene\tterm\nA\tGO:0000001\n"},
        "the columns symbol and go_id; this has gene, term",
    ),
    "not text": ("go", {"file": b"\x1f\x8b\x00not gzip"}, "cannot be read"),
    "a page instead of annotations": ("go", {"file": "<html>\n<body>\n"}, "the columns symbol and go_id"),
    "columns shifted": (
        "go",
        {"file": "!gaf-version: 2.2\n" + "\t".join("abcdefgh") + "\n"},
        "its fifth column must hold GO terms",
    ),
    "a damaged database": ("go", {"file": b"SQLite format 3\0" + b"\0" * 200}, "no annotation package of Bioconductor"),
    "hardly any annotation": ("go", {"file": "symbol\tgo_id\nA\tGO:0000001\n"}, "only 0 genes share"),
    "no annotations": ("go", {"ontology": OBO}, "a file of role 'annotations' is needed, found ontology"),
    "another ontology": (
        "go",
        {"annotations": "symbol\tgo_id\nA\tGO:0000001\n", "ontology": "[Term]\nid: HP:1\n"},
        "none of the annotated",
    ),
    "one column": ("ppi", {"file": "a\nA\n"}, "has 1 columns"),
    "a weight that is none": ("ppi", {"file": "a\tb\tw\nA\tB\t1\nA\tC\tx\n"}, "line 3: the weight 'x'"),
    "few genes": ("ppi", {"file": "a\tb\nA\tB\n"}, "interactions of only 2 genes"),
    "links of the plain kind": (
        "ppi",
        {"links": "protein1 protein2 combined_score\n", "info": "#p\tn\n"},
        "lacks the columns database, exp",
    ),
    "another organism": (
        "ppi",
        {"links": "protein1 protein2 experimental database\n10090.A 10090.B 900 0\n", "info": "#p\tn\n9606.A\tA\n"},
        "are both of one organism",
    ),
    "links without a row": (
        "associations",
        {"links": "protein1 protein2 combined_score\n", "info": "#p\tn\n9606.A\tA\n"},
        "no interaction of score 0.15",
    ),
    "few associations": (
        "associations",
        {"links": "protein1 protein2 combined_score\n9606.A 9606.B 200\n", "info": "#p\tn\n9606.A\tA\n9606.B\tB\n"},
        "of only 2 genes",
    ),
    "half of STRING": ("ppi", {"links": "x"}, "roles 'links' and 'info' are needed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_named(fault: str, tmp_path: Path) -> None:
    name, content, expected = FAULTS[fault]
    for role, text in content.items():
        (tmp_path / role).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=expected) as caught:
        prior([tmp_path / role for role in content], tmp_path / "embedding.parquet", name, list(content))
    assert str(tmp_path) in str(caught.value) or "is needed" in str(caught.value) or "are needed" in str(caught.value)
    assert not (tmp_path / "embedding.parquet").exists()


@pytest.mark.slow
def test_real_annotations_and_interactions_agree(shared_data: Callable[[str], Path]) -> None:
    """Subunits of the proteasome and of the ribosome are told apart from any source."""
    tables = [
        annotation_vectors({"file": shared_data("priors/human_gene2go.tsv.gz")}),
        interaction_vectors({"file": shared_data("priors/ppi_biosnap_symbols.tsv.gz")}),
        association_vectors({"file": shared_data("priors/ppi_biosnap_symbols.tsv.gz")}),
    ]
    proteasome = ["PSMA1", "PSMA2", "PSMA3", "PSMA4", "PSMB1", "PSMB2", "PSMB3"]
    ribosome = ["RPL3", "RPL4", "RPL5", "RPL7", "RPL8", "RPS2", "RPS3"]
    for vectors in tables:
        assert len(vectors) > 15_000
        assert not vectors.index.duplicated().any()
        scaled = (vectors - vectors.mean()) / vectors.std()
        correlation = np.corrcoef(scaled.loc[proteasome + ribosome])
        n = len(proteasome)
        assert correlation[:n, :n][np.triu_indices(n, 1)].mean() > correlation[:n, n:].mean() + 0.3
        assert correlation[n:, n:][np.triu_indices(n, 1)].mean() > correlation[:n, n:].mean() + 0.3

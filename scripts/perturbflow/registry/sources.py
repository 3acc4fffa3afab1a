"""Where the files of a source come from: a declaration, checked and resolved to named files with mirrors and checksums.

The Snakefile imports this module, so it needs the standard library and pandas only.
"""

import difflib
import re
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

import pandas as pd

KINDS = ("path", "url", "pypi", "scperturb", "files")
# Keys that fix the bytes of a file.
CONTENT_KEYS = ("bytes", "md5", "sha256", "checksum")

# scPerturb v1.4; earlier records hold wrong labels (Dixit) and genes off by one row (sci-Plex 3) under the same names.
ZENODO_RECORD = "13350497"
ZENODO_URLS = (
    f"https://zenodo.org/api/records/{ZENODO_RECORD}/files/{{name}}/content",
    f"https://zenodo.org/records/{ZENODO_RECORD}/files/{{name}}?download=1",
)

# A name that is valid on any system, neither hidden nor one of ours.
SAFE_NAME = re.compile(r"(?!manifest\.json$)\w[\w .,+()=@~-]{0,199}")


@cache
def scperturb_files() -> pd.DataFrame:
    """Return bytes and md5 of the 54 files of the record, by file name."""
    return pd.read_csv(Path(__file__).parent / "scperturb.tsv", sep="\t", index_col="file")


def file_name(url: str) -> str:
    """Return the file name in a URL; Zenodo's API has one segment more, `content`."""
    segments = urlparse(url).path.split("/")
    if segments[-1] == "content" and len(segments) > 2:
        segments.pop()
    return unquote(segments[-1])


def _scperturb_name(name: str) -> str:
    return name.removesuffix(".h5ad") + ".h5ad"


def resolved(block: dict) -> dict:
    """Return a valid block with `scperturb` replaced by its URLs, bytes and md5."""
    source = block["source"]
    if "scperturb" not in source:
        return block
    name = _scperturb_name(source["scperturb"])
    known = scperturb_files().loc[name]
    rest = {key: value for key, value in source.items() if key != "scperturb"}
    urls = [url.format(name=name) for url in ZENODO_URLS]
    return {**block, "source": {"url": urls, **rest}, "bytes": int(known["bytes"]), "md5": str(known["md5"])}


def own_files(block: dict) -> dict[str, str]:
    """Return role → path of the user's own files; none where they are downloaded."""
    path = block["source"].get("path", {})
    return path if isinstance(path, dict) else {"file": path}


def labels_file(block: dict) -> str | None:
    """Return the user's own table of labels, which is joined to obs; None without one."""
    labels = block["source"].get("labels")
    return str(labels) if labels is not None else None


# A zarr store has one of these in its root, and a folder of Cell Ranger a matrix.
ZARR_ROOT = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
TENX_MATRIX = re.compile(r"(?:.*[_.-])?matrix\.mtx(?:\.[a-z.]+)?")
# Folders of kb-python and of Parse, whose matrices are cells × genes: role → names of the file. The first three
# roles have to be there.
LAYOUTS: tuple[dict[str, tuple[str, ...]], ...] = (
    {
        "matrix": ("cells_x_genes.mtx",),
        "barcodes": ("cells_x_genes.barcodes.txt",),
        "genes": ("cells_x_genes.genes.txt",),
        "names": ("cells_x_genes.genes.names.txt",),
    },
    {
        "matrix": ("count_matrix.mtx", "DGE.mtx"),
        "barcodes": ("cell_metadata.csv",),
        "genes": ("all_genes.csv", "genes.csv"),
        "cell_identities": ("cell_metadata.csv",),
    },
)
# Name that a file should have, and a sign of it in other names.
RENAMED = {"matrix.mtx": r"\.mtx", "barcodes.tsv": r"barcode|cell|cols", "features.tsv": r"gene|feature|rows"}


def layout_of(folder: Path) -> dict[str, Path] | None:
    """Return role → file of a folder of kb-python or Parse, plain or gzipped; None for another folder."""
    for layout in LAYOUTS:
        files = {
            role: [folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz")]
            for role, names in layout.items()
        }
        there = {role: [path for path in paths if path.is_file()] for role, paths in files.items()}
        found = {role: paths[0] for role, paths in there.items() if paths}
        if {"matrix", "barcodes", "genes"} <= set(found):
            return found
    return None


def renaming(names: list[str]) -> str:
    """Return a sentence on how to name the matrix and the lists of a folder or archive.

    It is empty where there is no matrix.
    """
    shared = [name for name in names if name.startswith("UniqueAndMult")]
    lists = {
        new: [name for name in names if name not in shared and re.search(sign, name, re.IGNORECASE)]
        for new, sign in RENAMED.items()
    }
    matrices = lists["matrix.mtx"]
    if shared and not matrices:
        return f" {shared[0]} of STARsolo shares reads among genes and holds no counts: add STARsolo's matrix.mtx."
    if len(matrices) > 1:
        return (
            f" Put one matrix of raw counts ({', '.join(matrices[:4])}) into a folder of its own, as matrix.mtx, with "
            "its lists of barcodes.tsv and features.tsv."
        )
    if not matrices:
        return ""
    new_names = []
    for new, found in lists.items():
        others = [name for name in found if new == "matrix.mtx" or name not in matrices]
        if not any(name.removesuffix(".gz") == new for name in others):
            new_names.append(f"{others[0] if len(others) == 1 else 'the list of ' + new.split('.')[0]} → {new}")
    return f" Rename its files: {', '.join(new_names)} (and .gz where they are gzipped)."


def folder_kind(folder: Path) -> str | None:
    """Return the kind of a folder: `zarr`, `10x` (also of kb-python and Parse), or None for neither."""
    if any((folder / name).is_file() for name in ZARR_ROOT):
        return "zarr"
    return "10x" if layout_of(folder) or any(TENX_MATRIX.fullmatch(file.name) for file in folder.iterdir()) else None


def problem_of_folder(folder: Path) -> str | None:
    """Return in one sentence why a folder is no source, with its content and the fix; None if it is one."""
    if folder_kind(folder):
        return None
    inside = sorted(folder.iterdir())
    shown = ", ".join(file.name + "/" * file.is_dir() for file in inside[:8]) + (", ..." if len(inside) > 8 else "")
    usable = [
        file for file in inside if (file.is_dir() and folder_kind(file)) or file.suffix in (".h5ad", ".h5", ".h5mu")
    ]
    fix = f" Name one of these: {', '.join(map(str, usable[:4]))}." if usable else ""
    return (
        f"the folder '{folder}' holds {shown or 'nothing'}; expected is a folder with matrix.mtx[.gz], "
        "barcodes.tsv[.gz] and features.tsv[.gz] (10x), or a zarr "
        f"store.{fix or renaming([file.name for file in inside])}"
    )


def files_of(block: dict) -> dict[str, dict]:
    """Return role → file of a resolved block: its name, url (mirrors) or pypi, and its declared size and checksums.

    A source of one file has the role `file`. A source by `path` has no files to retrieve.
    """
    source = block["source"]
    if "files" in source:
        return {role: {"name": file_name(file["url"][0]), **file} for role, file in source["files"].items()}
    content = {key: block[key] for key in CONTENT_KEYS if key in block}
    if "url" in source:
        return {"file": {"name": source.get("name", file_name(source["url"][0])), "url": source["url"], **content}}
    if "pypi" in source:
        return {
            "file": {
                "name": source.get("name", source["pypi"].replace("==", "-") + ".tar.gz"),
                "pypi": source["pypi"],
                **content,
            }
        }
    return {}


def content_of(block: dict) -> dict[str, dict]:
    """Return role → declared content of the files of a resolved block, without the mirrors.

    The same bytes may come from any mirror.
    """
    return {
        role: {key: value for key, value in file.items() if key not in ("url", "pypi") or "checksum" in file}
        for role, file in files_of(block).items()
    }


# --- checking -------------------------------------------------------------------------------------------------------


def _problem_with_scperturb(block: dict) -> tuple[list[str], str] | None:
    name = _scperturb_name(block["source"]["scperturb"])
    files = scperturb_files()
    if name not in files.index:
        folded = {known.casefold(): known.removesuffix(".h5ad") for known in files.index}
        nearest = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=4, cutoff=0.3)]
        return [
            "source",
            "scperturb",
        ], f"record {ZENODO_RECORD} holds no '{name}'. Nearest: {', '.join(nearest) or '(none)'}."
    for key, value in files.loc[name].items():
        if block.get(key, value) != value:
            return [
                key
            ], f"{block[key]} is declared, but {name} of record {ZENODO_RECORD} has {value}. Leave {key} out."
    if "checksum" in block:
        return ["checksum"], f"size and md5 of {name} are published. Leave checksum out."
    return None


def _problem_with_file(file: dict, kind: str) -> str | None:
    if not SAFE_NAME.fullmatch(file["name"]):
        return (
            f"the name of the file would be '{file['name']}', which cannot be a file's name here. "
            "Give it one of letters, digits, spaces and _.,+()=@~- with the key name."
        )
    if kind == "pypi":
        return (
            None if "sha256" in file else "a source by pypi needs sha256: without it a broken download passes for data."
        )
    # GEO gives no sizes of several files. A checksum finds the same mistakes, only later.
    is_pinned = ("bytes" in file or kind == "files") and ("md5" in file or "sha256" in file)
    if is_pinned and "checksum" in file:
        return "its size and checksum are given. Leave checksum: unpublished out."
    if not is_pinned and "checksum" not in file:
        return (
            "a source by url needs bytes and one of md5, sha256: without them a broken download passes for data. If "
            "nobody publishes them, say checksum: unpublished; those of the first download are then kept and compared "
            "with."
        )
    return None


def problem_of(block: dict) -> tuple[list[str], str] | None:
    """Return the problem with a block's source: the keys that lead there, and a sentence with the fix.

    None where the source and its checksums are valid.
    """
    source = block["source"]
    kinds = [kind for kind in KINDS if kind in source]
    if len(kinds) != 1:
        return ["source"], f"give exactly one of {', '.join(KINDS)} (found: {', '.join(kinds) or 'none'})."
    kind = kinds[0]
    if "member" in source and (source["member"].startswith("/") or ".." in PurePosixPath(source["member"]).parts):
        return ["source", "member"], f"'{source['member']}' leads out of the archive. Name a path inside it."
    if "name" in source and kind not in ("url", "pypi"):
        return ["source", "name"], f"a source by {kind} has no use for it; it belongs to url and pypi."
    if "recipe" in block and (
        idle := [key for key in ("counts", "labels", "modality") if key in block or key in source]
    ):
        keys = [idle[0]] if idle[0] in block else ["source", idle[0]]
        return keys, f"recipe {block['recipe']} knows the content of its files. Leave {idle[0]} out."
    if kind == "scperturb" and (problem := _problem_with_scperturb(block)):
        return problem
    if kind == "files" and (idle := [key for key in CONTENT_KEYS if key in block]):
        return [idle[0]], "in a source of several files it belongs to each file under source.files."
    files = files_of(resolved(block))
    for role, file in files.items():
        if sentence := _problem_with_file(file, kind):
            return ["source", "files", role] if kind == "files" else [], sentence
    names = [file["name"].casefold() for file in files.values()]
    if twice := [role for role, file in files.items() if names.count(file["name"].casefold()) > 1]:
        return [
            "source",
            "files",
        ], f"{' and '.join(twice)} would have the same name. Give each one of its own with the key name."
    return None

"""The site: sphinx-build -W --keep-going -b html docs docs/_build.

All pages are plain Markdown that a forge shows as it is. Documents with a place of their own in the repository have a
page that links them; on the site that page holds the whole document, and links to it lead to that page. The tree of
pages is that of the links in `index.md` of each folder.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
PAGES = {  # document → its page
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "developers/contributing",
    "README.md": "index",
    "config/README.md": "reference/keys",
    "leaderboard/README.md": "results/leaderboard",
}
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")

project = "perturbflow"
author = "The perturbflow authors"
release = re.search(r'__version__ = "(.+)"', (REPOSITORY / "scripts/perturbflow/__init__.py").read_text())[1]
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
html_theme = "furo"
html_title = f"perturbflow {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
suppress_warnings = ["misc.highlighting_failure"]  # `…` in what a command prints


def linked(text: str, folder: Path, page: Path) -> str:
    """Return a document of a folder with its links as they lead from a page of the site."""

    def moved(match: re.Match) -> str:
        path = os.path.normpath(folder / match["target"])
        name = os.path.relpath(path, REPOSITORY)
        place = HERE / f"{PAGES[name]}.md" if name in PAGES else path
        return os.path.relpath(place, page.parent) + (match["anchor"] or "")

    return LINK.sub(moved, text)


def contents(text: str, page: Path) -> str:
    """Return the tree of the pages beside an index, and of the folders below it, in the order of its links."""
    targets = [match["target"] for match in LINK.finditer(text)]
    below = [name for name in targets if re.fullmatch(r"[\w-]+(/index)?\.md", name) and (page.parent / name).exists()]
    return "\n```{toctree}\n:hidden:\n\n" + "\n".join(dict.fromkeys(below)) + "\n```\n"


def read(app: Sphinx, docname: str, content: list[str]) -> None:
    """Put a document in place of the page that links it; let links lead to pages where there are some."""
    page = HERE / f"{docname}.md"
    named = {of: name for name, of in PAGES.items() if name != "README.md"}
    file = REPOSITORY / named[docname] if docname in named else page
    if file != page:
        app.env.note_dependency(str(file))
        content[0] = file.read_text(encoding="utf-8")
    content[0] = linked(content[0], file.parent, page)
    if page.name == "index.md":
        content[0] += contents(content[0], page)


def setup(app: Sphinx) -> None:
    """Have every page read by `read`."""
    app.connect("source-read", read)

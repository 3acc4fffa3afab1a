"""What becomes of a download under every fault of `fault_server`, in one sentence each."""

import hashlib
import io
import json
import re
from pathlib import Path

import h5py
import numpy as np
from fault_server import Handler, Host

from perturbflow import download as step
from perturbflow.download import transfer
from perturbflow.errors import InputError

# Milliseconds for what takes seconds and minutes in a real run.
IMPATIENCE = transfer.Patience(
    connect=2,
    stall=0.3,
    first_wait=0.001,
    longest_wait=0.01,
    longest_retry_after=0.02,
    fruitless_attempts=3,
    report_every=0.05,
)
STATUSES = (202, 403, 404, 410, 429, 500, 503)
FAULTS = {
    name: method.__doc__.rstrip(".")
    for name, method in vars(Handler).items()
    if not name.startswith("_") and getattr(method, "is_fault", False)
}
FAULTS |= {f"once-{code}": f"{code} once" for code in STATUSES} | {
    f"always-{code}": f"{code} for ever" for code in STATUSES
}
KNOWN = {
    "declared": "size and checksum declared",
    "unpublished": "nothing published",
    "recorded": "nothing published, downloaded before",
}


def screen() -> bytes:
    """Return the bytes of a small HDF5 file."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["X"] = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)
    return buffer.getvalue()


def declared(content: bytes) -> dict:
    """Return what a block declares of a file."""
    return {
        "bytes": len(content),
        "md5": hashlib.md5(content).hexdigest(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def outcome(host: Host, fault: str, known: str, folder: Path, name: str = "screen.h5ad") -> str:
    """Download from a host with a fault and return how it ended.

    AssertionError if anything but the whole right file lies under the final name where it can be told.
    """
    manifest = folder / "resources" / "mine" / "raw" / "manifest.json"
    url = f"{host.address}/{fault}/{name}"
    file = {
        "name": name,
        "url": [url],
        **(declared(host.content) if known == "declared" else {"checksum": "unpublished"}),
    }
    if known == "recorded":
        manifest.parent.mkdir(parents=True)
        entry = {**declared(host.content), "url": [url], "source": url, "retrieved": "2026-01-01T00:00:00+00:00"}
        (manifest.parent.parent / "checksums.json").write_text(json.dumps({name: entry}))
    host.forget()
    try:
        step.download(manifest, "mine", {"file": file})
    except InputError as error:
        assert not [path for path in manifest.parent.iterdir() if not path.name.startswith(".")], (
            "something is left under a final name"
        )
        line = next(line for line in str(error).splitlines() if line.startswith(f"{url}: "))
        return _without_numbers(line.removeprefix(f"{url}: "))
    n = host.asked[f"/{fault}/{name}"]
    content = (manifest.parent / name).read_bytes()
    assert sorted(path.name for path in manifest.parent.iterdir()) == ["manifest.json", name], "parts are left"
    assert json.loads(manifest.read_text())["files"]["file"]["sha256"] == hashlib.sha256(content).hexdigest()
    if content != host.content:
        return "the file as it is served"
    return "the right file" + (f", in {n} requests" if n > 1 else "")


def _without_numbers(message: str) -> str:
    """Return the first sentence of a message without what another version of HDF5 would change."""
    message = re.sub(r"\b[0-9a-f]{32,64}\b", "…", message)
    message = re.sub(r"truncated file: [^)]*", "truncated file", message)
    message = re.sub(r"\b\d{1,3}(,\d{3})+\b", "n", message)
    return re.split(r"\.(?: |$)", message)[0]


def table(host: Host, folder: Path) -> str:
    """Return the table of all faults and outcomes, tab-separated."""
    lines = ["\t".join(["fault", "the host", *KNOWN.values()])]
    for fault, does in FAULTS.items():
        outcomes = [outcome(host, fault, known, folder / fault / known) for known in KNOWN]
        lines.append("\t".join([fault, does, *outcomes]))
    return "\n".join(lines)

"""The words of messages."""

import re

KEY = re.compile(r"[a-z_]+\.[a-z_]+")


def capital(text: str) -> str:
    """Return a text with a capital letter first; one that begins with a key, such as qc.min_counts, stays."""
    return text if KEY.match(text) else text[:1].upper() + text[1:]

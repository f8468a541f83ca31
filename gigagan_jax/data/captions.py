"""Captions as they are found on the web, cleaned."""

import html
import re
import unicodedata

_TAG = re.compile(r"<[/!a-zA-Z][^<>]{0,300}>")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_FILE = re.compile(r"\b[\w-]+\.(?:jpe?g|png|gif|webp|bmp)\b", re.IGNORECASE)
_BLANKS = re.compile(r"\s+")


def clean(caption: str) -> str:
    """Without markup, web addresses, names of image files and control characters; in NFC; blanks joined. May be empty."""
    text = html.unescape(html.unescape(caption))  # what was escaped twice is common
    text = _FILE.sub(" ", _ADDRESS.sub(" ", _TAG.sub(" ", text)))
    text = unicodedata.normalize("NFC", text)
    # Zero-width joiners (Cf) hold emoji and some scripts together; the rest of "other" says nothing.
    text = "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn") else " " for c in text)
    return _BLANKS.sub(" ", text).strip()


def clean_all(captions: tuple[str, ...]) -> tuple[str, ...]:
    """Cleaned captions, those of which nothing is left dropped."""
    return tuple(c for c in map(clean, captions) if c)

"""Cleaning of captions from the web."""

import html
import re
import unicodedata

# A tag starts with a letter, "/" or "!", so "5 < 6" stays. The bound keeps an unclosed "<" from swallowing a caption.
_TAG = re.compile(r"<[/!a-zA-Z][^<>]{0,300}>")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_FILE = re.compile(r"\b[\w-]+\.(?:jpe?g|png|gif|webp|bmp)\b", re.IGNORECASE)
_BLANKS = re.compile(r"\s+")


def clean_caption(caption: str) -> str:
    """Removes markup, web addresses, names of image files and control characters.

    The result is in NFC with single blanks. It may be empty.
    """
    # Web captions are often escaped twice.
    text = html.unescape(html.unescape(caption))
    # Tags go first: an address inside a tag's attribute would otherwise take the text behind it along.
    text = _FILE.sub(" ", _ADDRESS.sub(" ", _TAG.sub(" ", text)))
    text = unicodedata.normalize("NFC", text)
    # Zero-width joiners (Cf) hold emoji and some scripts together. The other "C" categories carry no text.
    text = "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn") else " " for c in text)
    return _BLANKS.sub(" ", text).strip()


def clean_all(captions: tuple[str, ...]) -> tuple[str, ...]:
    """Cleans captions and drops those that become empty."""
    return tuple(c for c in map(clean_caption, captions) if c)

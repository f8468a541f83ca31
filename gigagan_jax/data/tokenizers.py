"""Captions to token rows. A tokenizer is any object with the members of `Tokenizer`."""

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gigagan_jax.errors import UserError

_log = logging.getLogger(__name__)
_truncation_lock = threading.Lock()
_truncation_reported = False


class Tokenizer(Protocol):
    """What the pipeline and the text encoders need of a tokenizer."""

    length: int
    vocab_size: int
    pad_id: int
    eot_id: int

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Captions to int32 [N, length]."""
        ...

    def null(self) -> np.ndarray:
        """The null caption, int32 [length]."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens: needs no vocabulary file, for small runs and tests.

    A row is bos, bytes + 3, eot, pads. The empty caption, bos eot pad ..., is the null caption.
    """

    pad_id = 0
    bos_id = 1
    eot_id = 2
    vocab_size = 3 + 256

    def __init__(self, length: int):
        """length: tokens a row, bos and eot included; at least 3. Raises UserError below that."""
        if length < 3:
            raise UserError(
                f"a text length of {length} tokens leaves no room for text: bos and eot take 2; use 3 or more"
            )
        self.length = length

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Tokenizes captions to int32 [N, length]. Long ones are cut between characters, so eot still ends them."""
        rows = np.full((len(captions), self.length), self.pad_id, dtype=np.int32)
        for row, caption in zip(rows, captions, strict=True):
            # 'replace': a caption with a lone surrogate, legal in JSON files, is no reason to stop.
            text = caption.encode("utf-8", "replace")
            if len(text) > self.length - 2:
                self._report_truncation(len(text))
                text = text[: self.length - 2].decode("utf-8", "ignore").encode()
            row[0] = self.bos_id
            row[1 : len(text) + 1] = np.frombuffer(text, np.uint8).astype(np.int32) + 3
            row[len(text) + 1] = self.eot_id
        return rows

    def null(self) -> np.ndarray:
        """The row of the null caption, int32 [length]."""
        return self([""])[0]

    def _report_truncation(self, size: int) -> None:
        global _truncation_reported
        with _truncation_lock:
            if _truncation_reported:
                return
            _truncation_reported = True
        _log.warning(
            "a caption of %d bytes is cut to the %d that a row of %d tokens holds; further cuts are not reported",
            size,
            self.length - 2,
            self.length,
        )


def make_tokenizer(encoder: str, length: int) -> Tokenizer:
    """The tokenizer of a text encoder, by its name in the config.

    Raises:
      UserError: no encoder of that name.
    """
    if encoder != "bytes":
        raise UserError(f"config.text.encoder={encoder!r}: this version has 'bytes' (trainable, no download)")
    return ByteTokenizer(length)

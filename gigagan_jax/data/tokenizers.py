"""Tokenizers: captions to rows of token ids."""

import abc
import logging
import os
import re
import threading
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.files import is_lfs_pointer, lfs_hint

_log = logging.getLogger(__name__)
# One warning a process, over all threads and tokenizers: long captions would otherwise log one each.
_truncation_lock = threading.Lock()
_truncation_reported = False


class Tokenizer(Protocol):
    """The members that the pipeline and the text encoders use."""

    length: int
    vocab_size: int
    pad_id: int
    eot_id: int

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Captions to int32 [N, length]."""
        ...

    def null_tokens(self) -> np.ndarray:
        """The null caption, int32 [length]."""
        ...

    def measure_caption(self, caption: str) -> tuple[int, int, str]:
        """(units of a caption, units that a row holds, what they are: "bytes", "words" or "tokens")."""
        ...


class _TrainedTokenizer(abc.ABC):
    """A tokenizer of a trained encoder. A row is bos, tokens of the caption, eot, pads; the empty caption is the null caption.

    Args:
      length: tokens a row, bos and eot included; at least 3.

    Raises:
      UserError: the length leaves no room for text.
    """

    # Three special tokens come first.
    pad_id, bos_id, eot_id = 0, 1, 2

    def __init__(self, length: int):
        if length < 3:
            raise UserError(
                f"a text length of {length} tokens leaves no room for text: bos and eot take 2; use 3 or more"
            )
        self.length = length

    @abc.abstractmethod
    def _ids(self, caption: str, room: int) -> Sequence[int] | np.ndarray:
        """At most `room` tokens of a caption."""

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Tokenizes captions to int32 [N, length]. Long ones are cut and still end with eot."""
        rows = np.full((len(captions), self.length), self.pad_id, dtype=np.int32)
        for row, caption in zip(rows, captions, strict=True):
            ids = self._ids(caption, self.length - 2)
            row[0] = self.bos_id
            row[1 : len(ids) + 1] = ids
            row[len(ids) + 1] = self.eot_id
        return rows

    def null_tokens(self) -> np.ndarray:
        """The row of the null caption, int32 [length]."""
        return self([""])[0]

    @abc.abstractmethod
    def measure_caption(self, caption: str) -> tuple[int, int, str]:
        """See `Tokenizer`."""


class ByteTokenizer(_TrainedTokenizer):
    """UTF-8 bytes as tokens, for small runs and tests: no vocabulary file is needed. Long captions are cut between characters.

    Byte b is token b + 3.
    """

    vocab_size = 3 + 256

    def _ids(self, caption: str, room: int) -> np.ndarray:
        # 'replace': JSON files may hold lone surrogates, which UTF-8 cannot encode.
        text = caption.encode("utf-8", "replace")
        if len(text) > room:
            _report_truncation("bytes", len(text), room, self.length)
            # 'ignore' drops the incomplete character at the cut.
            text = text[:room].decode("utf-8", "ignore").encode()
        # uint8 would overflow at + 3.
        return np.frombuffer(text, np.uint8).astype(np.int32) + 3

    def measure_caption(self, caption: str) -> tuple[int, int, str]:
        return len(caption.encode("utf-8", "replace")), self.length - 2, "bytes"


class WordTokenizer(_TrainedTokenizer):
    """Words as tokens, for runs whose captions have few words: no vocabulary file is needed.

    A word is a run of letters, digits and underscores, without case; all else separates words. Its id is its CRC-32 modulo the
    vocabulary: two words rarely share one.

    Args:
      length: tokens a row, bos and eot included; at least 3.
      vocab_size: number of ids, 4 or more.
    """

    def __init__(self, length: int, vocab_size: int):
        super().__init__(length)
        self.vocab_size = vocab_size

    def _ids(self, caption: str, room: int) -> list[int]:
        words = re.findall(r"\w+", caption.casefold())
        if len(words) > room:
            _report_truncation("words", len(words), room, self.length)
        return [3 + zlib.crc32(word.encode("utf-8", "replace")) % (self.vocab_size - 3) for word in words[:room]]

    def measure_caption(self, caption: str) -> tuple[int, int, str]:
        return len(re.findall(r"\w+", caption.casefold())), self.length - 2, "words"


def _report_truncation(unit: str, size: int, room: int, length: int) -> None:
    global _truncation_reported
    with _truncation_lock:
        if _truncation_reported:
            return
        _truncation_reported = True
    _log.warning(
        "a caption of %d %s is cut to the %d that a row of %d tokens holds; further cuts are not reported",
        size,
        unit,
        room,
        length,
    )


def report_cut_captions(tokenizer: Tokenizer, captions: Iterable[str], what: str = "prompts") -> int:
    """Warns once of all captions that are longer than a row of tokens, and returns their number.

    The tokenizers report no further cuts in this process.
    """
    global _truncation_reported
    cut, total, longest = 0, 0, ("", 0, 0, "")
    for caption in captions:
        size, room, unit = tokenizer.measure_caption(caption)
        total, cut = total + 1, cut + (size > room)
        if size > max(room, longest[1]):
            longest = (caption, size, room, unit)
    if cut:
        with _truncation_lock:
            _truncation_reported = True
        caption, size, room, unit = longest
        _log.warning(
            "%d of %d %s %s longer than the text encoder reads: %d of %d %s are kept of %r",
            *(cut, total, what, "is" if cut == 1 else "are", room, size, unit, caption[:40] + "..."),
        )
    return cut


class FrozenTokenizer:
    """The tokenizer of a frozen text encoder, loaded by transformers from the folder of its weights.

    A row is begin (where the encoder has one), text, end, pads. The empty caption is the null caption.

    Args:
      folder: holds the tokenizer's files.
      length: tokens a row, begin and end included.
      vocab_size: rows of the encoder's embedding table.
      end_id: the encoder's end-of-text token.
      begins: whether the encoder expects a begin token.

    Raises:
      UserError: the folder holds no tokenizer, or one that does not fit the encoder.
    """

    def __init__(self, folder: Path, length: int, *, vocab_size: int, end_id: int, begins: bool):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        # Reader threads already tokenize in parallel. With its own threads, tokenizers warns about later forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Imported here: it takes seconds, and byte tokens do not need it.
        import transformers

        remedy = (
            "copy the tokenizer's files (tokenizer.json, or vocab.json and merges.txt) of the same network beside the "
            "weights"
        )
        # A spiece.model alone would need the package sentencepiece.
        files = ("tokenizer.json", "vocab.json")
        if not any((folder / name).exists() for name in files):
            # Rows of OpenAI's table: all CLIPs with so many share one tokenizer (models/pretrained/network_files.py).
            shared = (
                "; `hf download openai/clip-vit-large-patch14 tokenizer.json` will do too"
                if vocab_size == 49408
                else ""
            )
            raise UserError(f"{folder} holds no tokenizer (none of {', '.join(files)}): {remedy}{shared}")
        pointers = [folder / name for name in files if is_lfs_pointer(folder / name)]
        if pointers:
            raise UserError(lfs_hint(pointers[0]))
        # AutoTokenizer takes the kind from one of these, which a folder of open_clip lacks.
        named = any((folder / name).exists() for name in ("tokenizer_config.json", "config.json"))
        kind = transformers.AutoTokenizer if named or not begins else transformers.CLIPTokenizer
        try:
            tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
            backend = tokenizer.backend_tokenizer
        # The parsers of damaged files raise exceptions of many types.
        except Exception as e:
            why = str(e).splitlines()[0] if str(e) else ""
            raise UserError(
                f"{folder}: its tokenizer cannot be read ({type(e).__name__}: {why[:120]}): {remedy}"
            ) from None
        # __call__ truncates and pads: the backend's settings are not thread-safe, and saved files may contain some.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.length, self.vocab_size, self.eot_id = length, vocab_size, end_id
        eos_id = tokenizer.eos_token_id
        # The embedding table may be larger: T5 pads its table. A smaller table would be indexed out of range.
        added = sorted(token for token, i in tokenizer.get_added_vocab().items() if i >= vocab_size)
        if added and len(tokenizer) - len(added) <= vocab_size and eos_id == end_id:
            raise UserError(
                f"{folder}: the tokenizer has {len(added)} added tokens ({', '.join(added[:3])}) beyond the {vocab_size} rows "
                "of the weights: take the fine-tuned weights that have rows for them, or the tokenizer without them "
                "(remove added_tokens.json, and what tokenizer.json lists past the last row under added_tokens)"
            )
        if len(tokenizer) > vocab_size or eos_id != end_id:
            raise UserError(
                f"{folder}: the tokenizer does not fit the weights: it has {len(tokenizer)} ids and ends a text by "
                f"{eos_id}, the weights have {vocab_size} and expect {end_id}: {remedy}"
            )
        # CLIP rows begin with a token of their own, T5 rows do not.
        self._begin = [tokenizer.bos_token_id] if begins else []
        if begins and tokenizer.bos_token_id is None:
            raise UserError(f"{folder}: the tokenizer has no begin token, which the weights expect: {remedy}")
        # Without a pad token, the end token pads, as CLIP does.
        self.pad_id = end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._room = length - len(self._begin) - 1
        if self._room < 1:
            raise UserError(
                f"config.text.length={length}: leaves no room for text; use {length - self._room + 1} or more"
            )

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Tokenizes captions to int32 [N, length]. Long ones are cut and still end with the end token."""
        rows = np.full((len(captions), self.length), self.pad_id, dtype=np.int32)
        for row, caption in zip(rows, captions, strict=True):
            ids = self._ids(caption)
            if len(ids) > self._room:
                _report_truncation("tokens", len(ids), self._room, self.length)
                ids = ids[: self._room]
            tokens = [*self._begin, *ids, self.eot_id]
            row[: len(tokens)] = tokens
        return rows

    def _ids(self, caption: str) -> list[int]:
        # The backend refuses lone surrogates, which JSON files may hold.
        text = caption.encode("utf-8", "replace").decode()
        # A caption may spell out the end token. CLIP pools at the first one, so it must not occur in the text.
        return [i for i in self._backend.encode(text, add_special_tokens=False).ids if i != self.eot_id]

    def null_tokens(self) -> np.ndarray:
        """The row of the null caption, int32 [length]."""
        return self([""])[0]

    def measure_caption(self, caption: str) -> tuple[int, int, str]:
        """See `Tokenizer`."""
        return len(self._ids(caption)), self._room, "tokens"


def make_tokenizer(encoder: str, length: int, **options: Any) -> Tokenizer:
    """Makes the tokenizer of a text encoder from its name in the config.

    Args:
      encoder: "bytes", "words", or the name of a frozen one.
      length: tokens a row.
      options: see WordTokenizer and FrozenTokenizer.

    Raises:
      UserError: see FrozenTokenizer.
    """
    if encoder == "bytes":
        return ByteTokenizer(length)
    return WordTokenizer(length, **options) if encoder == "words" else FrozenTokenizer(length=length, **options)

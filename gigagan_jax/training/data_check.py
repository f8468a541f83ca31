"""A look at the data as a run starts: is there enough of it, and is anything left of the captions to learn from?"""

import logging
import time
from collections.abc import Callable

import jax
import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.data.captions import clean_all
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.source import Source
from gigagan_jax.data.tokenizers import Tokenizer, make_tokenizer
from gigagan_jax.models.pretrained.text_encoder import tokenizer_options

_log = logging.getLogger(__name__)

EXAMPLES, SECONDS = 1000, 2.0
# Tokens of a row that cuts nothing; of 1,000 captions 4 MB.
WHOLE_LENGTH = 1024
_UNCONDITIONAL = "config.condition=none trains without captions"


def warn_of_data(config: Config, source: Source) -> None:
    """Logs warnings about the data of a run: fewer examples than a batch has, and captions (`find_warnings`) on a disk."""
    if jax.process_index() != 0:
        return
    if len(source) < config.batch_size:
        _log.warning(
            "the data set has %d example%s and a batch takes %d: each comes several times in it, and is learnt by heart",
            len(source),
            "" if len(source) == 1 else "s",
            config.batch_size,
        )
    if config.condition != "text" or config.data.embeddings:
        return
    # Drawn captions are known. Reads from a bucket take longer than this look may.
    if config.data.source in ("digits", "shapes", "hub") or "://" in " ".join((config.data.path, *config.data.mixture)):
        return
    options = tokenizer_options(config.text)
    make = lambda length: make_tokenizer(config.text.encoder, length, **options)
    for line in find_warnings(source, make, config.text.length, clean=config.data.clean_captions):
        _log.warning("%s", line)


def find_warnings(
    source: Source,
    make: Callable[[int], Tokenizer],
    length: int,
    *,
    clean: bool = False,
    examples: int = EXAMPLES,
    seconds: float = SECONDS,
) -> list[str]:
    """What is wrong with captions as a whole, a line each; empty where nothing is.

    Args:
      source: the data set; only captions are read.
      make: the tokenizer of a number of tokens a row.
      length: tokens a row of the run.
      clean: captions are cleaned first.
      examples: how many are looked at, evenly spaced.
      seconds: after which no further one is.
    """
    looked, found = _read_captions(source, clean, examples, seconds)
    if not looked:
        return []
    texts = list(dict.fromkeys(found))
    # One example has one caption of its own: nothing is wrong with that.
    if not texts:
        return [f"none of the {looked} examples looked at has a caption: nothing is learnt of text; {_UNCONDITIONAL}"]
    if len(texts) == 1 and looked > 1:
        return [
            f"all of the {looked} examples looked at have one caption, {_shorten(texts[0])!r}: a prompt makes no difference, and "
            f"the matching-aware loss has nothing to compare; {_UNCONDITIONAL}"
        ]
    tokenizer = make(WHOLE_LENGTH)
    whole = tokenizer(texts)
    # Captions may also be equal to a tokenizer by case or punctuation: only what the cut loses counts.
    before, after = _count_distinct(whole), _count_distinct(make(length)(texts))
    if after == before:
        return []
    # The first end token: CLIP pads by the same one.
    longest = int((whole == tokenizer.eot_id).argmax(axis=1).max()) + 1
    return [
        f"of {before} distinct captions of the {looked} examples looked at, {after} are left after "
        f"config.text.length={length} cuts them: their ends are not seen; the longest takes {longest} tokens. "
        "Use a longer config.text.length where the encoder allows it, or captions that differ at their beginning"
    ]


def _read_captions(source: Source, clean: bool, examples: int, seconds: float) -> tuple[int, list[str]]:
    """(examples looked at, all their captions)"""
    places = np.unique(np.linspace(0, len(source) - 1, min(examples, len(source))).astype(np.int64))
    end, looked, found = time.monotonic() + seconds, 0, list[str]()
    for i in places:
        if time.monotonic() > end:
            break
        try:
            captions = source.captions(int(i))
        # Training reports it, and takes another.
        except BadExample:
            continue
        looked += 1
        found += clean_all(captions) if clean else captions
    return looked, found


def _count_distinct(rows: np.ndarray) -> int:
    return len(np.unique(rows, axis=0))


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."

"""Cleaning of captions, by itself and in the pipeline."""

import numpy as np
import pytest

from gigagan_jax.data import pipeline
from gigagan_jax.data.captions import clean_all, clean_caption
from gigagan_jax.data.example import Record
from gigagan_jax.data.tokenizers import ByteTokenizer
from tests.data.small_source import SmallSource, text_of


@pytest.mark.parametrize(
    "found, cleaned",
    [
        ("a cat", "a cat"),
        (" a\t cat\r\n on  a mat ", "a cat on a mat"),
        ("<b>Cat</b> &amp; dog<br/>", "Cat & dog"),
        # Escaped twice.
        ("Cat &amp;amp; dog", "Cat & dog"),
        # Comparisons are no tags.
        ("5 < 6 and 7 > 3", "5 < 6 and 7 > 3"),
        ("see https://example.org/a?b=c or www.example.org now", "see or now"),
        ("DSC_0042.JPG", ""),
        ("sunset IMG-12.png at sea", "sunset at sea"),
        # NFC composes letter and accent.
        ("cafe\u0301", "caf\u00e9"),
        ("a\x00b\x1fc\ud800", "a b c"),
        # Zero-width joiners hold this emoji together.
        ("family \U0001f468\u200d\U0001f469\u200d\U0001f467", "family \U0001f468\u200d\U0001f469\u200d\U0001f467"),
        ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
        ("", ""),
    ],
)
def test_clean(found, cleaned):
    assert clean_caption(found) == cleaned
    # Cleaning twice changes nothing more.
    assert clean_caption(cleaned) == cleaned


def test_captions_of_which_nothing_is_left_are_dropped():
    assert clean_all(("a.jpg", " b ", "http://c.d")) == ("b",)


class DirtySource(SmallSource):
    """A source with one real caption and one file name each; example 3 has the file name only."""

    def read(self, i):
        image = np.zeros((8, 8, 3), np.uint8)
        return Record(image, ("IMG_1.jpg",) if i == 3 else (f"<i>number</i>  {i}", "IMG_1.jpg"), -1, self.name(i))


def test_a_run_sees_cleaned_captions_and_counts_what_has_none():
    options = {"resolution": 8, "batch_size": 23, "seed": 0, "tokenizer": ByteTokenizer(20), "num_threads": 0}
    with pipeline.build_pipeline(DirtySource(), clean_captions=True, **options) as data:
        batch = next(data)
        assert [text_of(tokens) for tokens in batch["tokens"]] == [f"number {i}" for i in batch["index"]]
        assert 3 not in batch["index"]
        assert data.quarantine.state()["causes"] == {"caption_empty": 1}

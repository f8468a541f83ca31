import logging

import numpy as np
import pytest

from gigagan_jax.data import tokenizers
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.errors import UserError


@pytest.fixture(autouse=True)
def truncation_not_yet_reported(monkeypatch):
    monkeypatch.setattr(tokenizers, "_truncation_reported", False)


def test_a_row_is_bos_bytes_eot_pads():
    rows = ByteTokenizer(6)(["ab", ""])
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, [[1, 97 + 3, 98 + 3, 2, 0, 0], [1, 2, 0, 0, 0, 0]])


def test_null_is_the_empty_caption():
    tokenizer = ByteTokenizer(5)
    np.testing.assert_array_equal(tokenizer.null(), tokenizer([""])[0])
    assert tokenizer.null().shape == (5,)


def test_no_captions_make_no_rows():
    assert ByteTokenizer(5)([]).shape == (0, 5)


def test_every_byte_has_its_own_token_within_the_vocabulary():
    tokenizer = ByteTokenizer(4)
    assert tokenizer.vocab_size == 259
    row = ByteTokenizer(80)(["".join(map(chr, range(1, 70)))])[0]
    assert len(set(row[row > 2])) == 69
    assert ByteTokenizer(10)(["ÿ🎨"]).max() < tokenizer.vocab_size


def test_a_long_caption_keeps_its_eot_and_is_cut_between_characters():
    assert ByteTokenizer(5)(["abcdef"]).tolist() == [[1, 100, 101, 102, 2]]
    assert ByteTokenizer(5)(["ab" + "é" + "c"]).tolist() == [[1, 100, 101, 2, 0]]
    assert ByteTokenizer(5)(["abc"]).tolist() == [[1, 100, 101, 102, 2]]


def test_truncation_is_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        ByteTokenizer(5)(["abc"])
        assert not caplog.records
        ByteTokenizer(5)(["abcdef", "ghijkl"])
        ByteTokenizer(6)(["abcdef"])
    assert len(caplog.records) == 1
    assert "6 bytes is cut to the 3" in caplog.text


def test_a_lone_surrogate_does_not_stop_it():
    assert ByteTokenizer(5)(["\ud800"]).tolist() == [[1, ord("?") + 3, 2, 0, 0]]


def test_too_short_a_length_is_refused():
    with pytest.raises(UserError, match="3 or more"):
        ByteTokenizer(2)

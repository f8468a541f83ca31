"""The look at the data as a run starts: few examples; captions that are equal, missing, or alike after the cut of a row."""

import pytest

from gigagan_jax.config import from_dict
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.tokenizers import ByteTokenizer, WordTokenizer
from gigagan_jax.training.data_check import WHOLE_LENGTH, find_warnings, warn_of_data

PREFIX = "masterpiece, best quality, highly detailed, 1girl, solo, looking at viewer, upper body, "


class Captions:
    def __init__(self, *captions):
        self.rows = [(c,) if isinstance(c, str) else c for c in captions]
        self.asked = []

    def __len__(self):
        return len(self.rows)

    def captions(self, i):
        self.asked.append(i)
        if self.rows[i] is None:
            raise BadExample("caption_unreadable", "no")
        return self.rows[i]


def warnings_of(source, length=77, make=ByteTokenizer, **options):
    return find_warnings(source, make, length, **options)


def test_captions_that_are_cut_alike_are_counted():
    source = Captions(*(f"{PREFIX}photo {i}" for i in range(20)))
    (line,) = warnings_of(source)
    assert line.startswith(
        "of 20 distinct captions of the 20 examples looked at, 1 are left after config.text.length=77 cuts them"
    )
    assert f"the longest takes {len(PREFIX) + len('photo 19') + 2} tokens" in line
    assert warnings_of(source, 128) == []
    # Words are fewer than letters.
    assert warnings_of(source, 20, lambda n: WordTokenizer(n, 1024)) == []
    (line,) = warnings_of(source, 8, lambda n: WordTokenizer(n, 1024))
    assert "1 are left after config.text.length=8" in line


def test_captions_longer_than_any_row():
    (line,) = warnings_of(Captions("a" * 3000, "b" * 3000, "a" * 100 + "b"))
    assert "of 3 distinct captions" in line
    assert f"the longest takes {WHOLE_LENGTH} tokens" in line


def test_case_alone_is_not_the_cut():
    assert warnings_of(Captions("A cat", "a cat!", "a dog"), 20, lambda n: WordTokenizer(n, 1024)) == []


def test_one_caption_for_all():
    (line,) = warnings_of(Captions(*["a photo of sks dog"] * 20))
    assert line.startswith("all of the 20 examples looked at have one caption, 'a photo of sks dog'")
    assert line.endswith("config.condition=none trains without captions")
    assert warnings_of(Captions("a photo of sks dog")) == []
    assert warnings_of(Captions(("a dog", "the dog"), ("the dog",))) == []
    # With cleaning they are alike.
    assert len(warnings_of(Captions("a <b>dog</b>", "a dog"), clean=True)) == 1
    assert warnings_of(Captions("a <b>dog</b>", "a dog")) == []


def test_no_captions():
    assert warnings_of(Captions((), (), ())) == [
        "none of the 3 examples looked at has a caption: nothing is learnt of text; config.condition=none trains without captions"
    ]
    assert warnings_of(Captions(None, None)) == []
    assert warnings_of(Captions("a", "b", None)) == []


def test_few_examples_are_said(caplog):
    config = from_dict({"batch_size": 4, "condition": "none", "data": {"path": "photos"}})
    warn_of_data(config, Captions("a"))
    assert caplog.messages == [
        "the data set has 1 example and a batch takes 4: each comes several times in it, and is learnt by heart"
    ]
    caplog.clear()
    warn_of_data(config, Captions(*"abcd"))
    assert not caplog.messages
    text = from_dict({"batch_size": 4, "text": {"encoder": "bytes"}, "data": {"path": "photos"}})
    warn_of_data(text, Captions(*"aaaa"))
    assert [m.split(",")[0] for m in caplog.messages] == ["all of the 4 examples looked at have one caption"]


@pytest.mark.parametrize("examples, asked", [(1, [0]), (3, [0, 499, 999]), (5000, list(range(1000)))])
def test_the_look_is_bounded(examples, asked):
    source = Captions(*map(str, range(1000)))
    warnings_of(source, examples=examples)
    assert source.asked == asked
    late = Captions(*map(str, range(1000)))
    assert warnings_of(late, seconds=-1.0) == []
    assert late.asked == []

import json
import logging
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.data import tokenizers
from gigagan_jax.data.tokenizers import ByteTokenizer, FrozenTokenizer, make_tokenizer


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


# ---------------------------------------------------------------- tokenizers of frozen encoders

LENGTH = 77
CAPTIONS = {
    "plain": "a photo of the cat",
    "empty": "",
    "blank": " \t\n ",
    "case_and_space": "  The   CAT\tsat\r\non\u00a0THE  Mat. ",
    "punctuation": "it's the cat's 3rd hat -- isn't it?! (50%) #1",
    "emoji": "\U0001f600\U0001f389 the \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "right_to_left": "\u05e9\u05d1\u05e2 \u0631\u0642\u0645 \u0633\u0628\u0639\u0629 7 \u200fcat",
    "other_scripts": "\u4e03 \u732b\u3001 e\u0301\u00e9 \u00df \u0130stanbul \uac00",
    "control": "the\x00cat\x1b\x7f \ufffd",
    "as_long_as_a_row": "x " * (LENGTH - 2),
    "one_too_many": "x " * (LENGTH - 1),
    "10000_characters": "x" * 10_000,
    "10000_in_words": "the " * 2_500,
    "10000_emoji": "\U0001f600" * 10_000,
    "begin_spelled_out": "the <|startoftext|> cat",
    "end_in_capitals": "the <|ENDOFTEXT|> cat",
}


def ids(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    return {"vocab_size": text["vocab_size"], "end_id": text["eos_token_id"], "begins": True}


def frozen(folder, length=LENGTH, **changed):
    return FrozenTokenizer(folder, length, **ids(folder) | changed)


@pytest.fixture(scope="module")
def theirs(clip_folder):
    """Captions to rows, by transformers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)

    def rows(captions, length=LENGTH):
        said = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length)
        return np.asarray(said["input_ids"])

    return rows


@pytest.fixture
def copy(clip_folder, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(clip_folder, tmp_path / "copy")


@pytest.mark.parametrize("name", CAPTIONS)
def test_frozen_rows_are_those_of_transformers(clip_folder, theirs, name):
    caption = CAPTIONS[name]
    for length in (LENGTH, 12):
        row = frozen(clip_folder, length)([caption])[0]
        assert (row.dtype, row.shape) == (np.int32, (length,))
        np.testing.assert_array_equal(row, theirs([caption], length)[0])


def test_frozen_rows_of_many_captions_are_those_of_each(clip_folder, theirs):
    tokenizer = frozen(clip_folder)
    rows = tokenizer(list(CAPTIONS.values()))
    np.testing.assert_array_equal(rows, theirs(CAPTIONS.values()))
    for row, caption in zip(rows, CAPTIONS.values(), strict=True):
        np.testing.assert_array_equal(row, tokenizer([caption])[0])
    assert len(np.unique(rows, axis=0)) >= len(CAPTIONS) - 2
    assert tokenizer([]).shape == (0, LENGTH)


@pytest.mark.parametrize(
    "text", ["a <|endoftext|> the cat", "<|endoftext|>", "the<|endoftext|><|endoftext|>cat", "<|endoftext|>" * 800]
)
def test_frozen_text_that_spells_out_the_end_does_not_end_there(clip_folder, theirs, text):
    tokenizer = frozen(clip_folder)
    row, other = tokenizer([text])[0], theirs([text])[0]
    first = int(np.argmax(other == tokenizer.eot_id))
    np.testing.assert_array_equal(row[:first], other[:first])
    # As if it were not there: what comes after it counts.
    np.testing.assert_array_equal(row, tokenizer([text.replace("<|endoftext|>", " ")])[0])


def test_frozen_rows_begin_end_and_pad(clip_folder):
    tokenizer, known = frozen(clip_folder), ids(clip_folder)
    assert (tokenizer.length, tokenizer.vocab_size, tokenizer.eot_id) == (LENGTH, known["vocab_size"], known["end_id"])
    begin, end = known["vocab_size"] - 2, known["end_id"]
    assert tokenizer.null().tolist() == [begin] + [end] * (LENGTH - 1)
    assert tokenizer.null().dtype == np.int32
    rows = tokenizer(list(CAPTIONS.values()))
    assert (rows[:, 0] == begin).all()
    assert (rows == end).any(1).all()  # however long the caption is
    assert rows.min() >= 0
    assert rows.max() < tokenizer.vocab_size
    np.testing.assert_array_equal(tokenizer(["\ud800 cat"]), tokenizer(["? cat"]))  # a lone surrogate


def test_frozen_truncation_is_reported_once(clip_folder, caplog):
    with caplog.at_level(logging.WARNING):
        frozen(clip_folder)([CAPTIONS["as_long_as_a_row"], "<|endoftext|>" * 100])
        assert not caplog.records
        frozen(clip_folder)(["y" * 10_000, CAPTIONS["10000_in_words"]])
        frozen(clip_folder, 12)(["y" * 100])
        ByteTokenizer(5)(["abcdef"])
    assert len(caplog.records) == 1
    assert "10000 tokens is cut to the 75 that a row of 77 tokens" in caplog.text


def test_eight_threads_make_the_rows_of_one(clip_folder):
    tokenizer = frozen(clip_folder, 24)
    words = sorted({w for c in CAPTIONS.values() for w in c[:200].split()})
    draw = random.Random(0)
    captions = [" ".join(draw.choices(words, k=draw.randrange(30))) for _ in range(100)]
    expected = tokenizer(captions)
    start = threading.Barrier(8)

    def work(shift):
        start.wait()
        return [tokenizer(captions[shift:] + captions[:shift]) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for shift, found in zip(range(8), pool.map(work, range(8)), strict=True):
            for rows in found:
                np.testing.assert_array_equal(rows, np.roll(expected, -shift, axis=0))


@pytest.fixture
def plain(tmp_path):
    """The tokenizer of an encoder like T5: no begin token, a pad of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "the": 3, "cat": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    return tmp_path


def test_frozen_without_a_begin_token(plain, refused):
    import transformers

    options = {"vocab_size": 8, "end_id": 1}  # an embedding may have more rows than there are ids
    tokenizer = FrozenTokenizer(plain, 5, begins=False, **options)
    assert tokenizer(["the cat", "dog", "", "the the the the the"]).tolist() == [
        [3, 4, 1, 0, 0],
        [2, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [3, 3, 3, 3, 1],
    ]
    assert (tokenizer.pad_id, tokenizer.eot_id) == (0, 1)
    # How transformers was last asked to pad is saved with it, and does not matter.
    saved = transformers.AutoTokenizer.from_pretrained(plain)
    saved(["the"], padding="max_length", max_length=4)
    saved.save_pretrained(plain)
    assert json.loads((plain / "tokenizer.json").read_text())["padding"] is not None
    assert FrozenTokenizer(plain, 5, begins=False, **options)(["the"]).tolist() == [[3, 1, 0, 0, 0]]
    refused(
        lambda: FrozenTokenizer(plain, 5, begins=True, **options), plain, "no begin token", "copy the tokenizer's files"
    )


def test_the_tokenizer_of_an_encoder(clip_folder):
    assert isinstance(make_tokenizer("bytes", 9), ByteTokenizer)
    tokenizer = make_tokenizer("clip", 9, folder=clip_folder, **ids(clip_folder))
    assert isinstance(tokenizer, FrozenTokenizer)
    assert tokenizer(["the cat"]).shape == (1, 9)


# ---------------------------------------------------------------- and what may be wrong with them

MEND = "copy the tokenizer's files"


def test_a_folder_without_a_tokenizer(clip_folder, tmp_path, refused):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, tmp_path)
    refused(
        lambda: FrozenTokenizer(tmp_path, LENGTH, **ids(tmp_path)), tmp_path, "no tokenizer", "tokenizer.json", MEND
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-3],
        lambda data: b"[]",
        lambda data: b"{}",
        lambda data: b"<html>\n</html>",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n",
        lambda data: b"\xff" * 100,
    ],
    ids=["empty", "one_byte", "half", "almost_all", "list", "object", "web_page", "lfs_pointer", "no_text"],
)
def test_a_damaged_tokenizer(copy, damage, refused):
    file = copy / "tokenizer.json"
    file.write_bytes(damage(file.read_bytes()))
    refused(lambda: frozen(copy), copy, "tokenizer", MEND)


def test_a_vocabulary_without_its_merges(copy, refused):
    """Half of a tokenizer would read words letter by letter."""
    vocabulary = json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(vocabulary))
    (copy / "merges.txt").unlink(missing_ok=True)
    refused(lambda: frozen(copy), copy, "tokenizer", MEND)


def test_vocabulary_and_merges_are_a_tokenizer(copy, clip_folder):
    """The files of older networks."""
    model = json.loads((copy / "tokenizer.json").read_text())["model"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (copy / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    captions = [*CAPTIONS.values()]
    np.testing.assert_array_equal(frozen(copy)(captions), frozen(clip_folder)(captions))


def test_settings_that_were_saved_with_a_tokenizer_do_not_matter(copy, clip_folder):
    """transformers saves how it was last asked to cut and pad."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    tokenizer(["x"], padding="max_length", truncation=True, max_length=5)
    tokenizer.save_pretrained(copy)
    assert json.loads((copy / "tokenizer.json").read_text())["truncation"]["max_length"] == 5
    captions = [*CAPTIONS.values()]
    np.testing.assert_array_equal(frozen(copy)(captions), frozen(clip_folder)(captions))


def test_a_tokenizer_of_another_network(clip_folder, refused):
    known = ids(clip_folder)
    size, end = known["vocab_size"], known["end_id"]
    said = refused(lambda: frozen(clip_folder, vocab_size=size - 1), clip_folder, "does not fit", MEND)
    assert f"{size} ids" in said
    assert f"the weights have {size - 1}" in said
    said = refused(lambda: frozen(clip_folder, end_id=end - 1), clip_folder, "does not fit", MEND)
    assert f"ends a text by {end}" in said
    assert f"expect {end - 1}" in said
    assert frozen(clip_folder, vocab_size=size + 4).vocab_size == size + 4


def test_a_row_without_room_for_text(clip_folder, refused):
    refused(lambda: frozen(clip_folder, 2), "config.text.length=2", "no room for text")
    known = ids(clip_folder)
    word = known["vocab_size"] - 3  # the last before the special two
    assert frozen(clip_folder, 3)(["the cat"]).tolist() == [[word + 1, word, known["end_id"]]]

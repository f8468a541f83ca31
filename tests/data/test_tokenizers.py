"""Byte and word tokens, and tokenizers of frozen encoders against transformers."""

import binascii
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
from gigagan_jax.data.tokenizers import ByteTokenizer, FrozenTokenizer, WordTokenizer, make_tokenizer
from gigagan_jax.preparation.emoji_concepts import CONCEPTS


# The warning comes once a process. Without a reset, each test would depend on those before it.
@pytest.fixture(autouse=True)
def truncation_not_yet_reported(monkeypatch):
    monkeypatch.setattr(tokenizers, "_truncation_reported", False)


def test_a_row_is_bos_bytes_eot_pads():
    rows = ByteTokenizer(6)(["ab", ""])
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, [[1, 97 + 3, 98 + 3, 2, 0, 0], [1, 2, 0, 0, 0, 0]])


def test_null_is_the_empty_caption():
    tokenizer = ByteTokenizer(5)
    np.testing.assert_array_equal(tokenizer.null_tokens(), tokenizer([""])[0])
    assert tokenizer.null_tokens().shape == (5,)


def test_no_captions_make_no_rows():
    assert ByteTokenizer(5)([]).shape == (0, 5)


def test_every_byte_has_its_own_token_within_the_vocabulary():
    tokenizer = ByteTokenizer(4)
    assert tokenizer.vocab_size == 259
    row = ByteTokenizer(80)(["".join(map(chr, range(1, 70)))])[0]
    # Tokens above 2 are bytes.
    assert len(set(row[row > 2])) == 69
    assert ByteTokenizer(10)(["ÿ🎨"]).max() < tokenizer.vocab_size


def test_a_long_caption_keeps_its_eot_and_is_cut_between_characters():
    assert ByteTokenizer(5)(["abcdef"]).tolist() == [[1, 100, 101, 102, 2]]
    # é has two bytes, of which one would fit.
    assert ByteTokenizer(5)(["ab" + "é" + "c"]).tolist() == [[1, 100, 101, 2, 0]]
    assert ByteTokenizer(5)(["abc"]).tolist() == [[1, 100, 101, 102, 2]]


def test_truncation_is_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        ByteTokenizer(5)(["abc"])
        assert not caplog.records
        ByteTokenizer(5)(["abcdef", "ghijkl"])
        # Another tokenizer does not warn again.
        ByteTokenizer(6)(["abcdef"])
    assert len(caplog.records) == 1
    assert "6 bytes is cut to the 3" in caplog.text


def test_a_lone_surrogate_does_not_stop_it():
    assert ByteTokenizer(5)(["\ud800"]).tolist() == [[1, ord("?") + 3, 2, 0, 0]]


def test_too_short_a_length_is_refused():
    with pytest.raises(UserError, match="3 or more"):
        ByteTokenizer(2)


# ---------------------------------------------------------------- words

VOCABULARY = 256**2


def test_a_word_is_its_crc_without_case_and_punctuation():
    rows = WordTokenizer(5, VOCABULARY)(["A red-apple", "a (Red) APPLE!", ""])
    assert rows.dtype == np.int32
    # binascii has the same sum as zlib, from other code.
    words = [3 + binascii.crc32(word) % (VOCABULARY - 3) for word in (b"a", b"red", b"apple")]
    np.testing.assert_array_equal(rows, [[1, *words, 2], [1, *words, 2], [1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(WordTokenizer(5, VOCABULARY).null_tokens(), rows[2])


def test_a_long_caption_keeps_its_eot_and_is_cut_between_words(caplog):
    tokenizer = WordTokenizer(4, VOCABULARY)
    np.testing.assert_array_equal(tokenizer(["one two three"]), tokenizer(["one two"]))
    assert "3 words is cut to the 2" in caplog.text


def test_word_ids_stay_within_a_vocabulary_of_any_size():
    for size in (4, 100, VOCABULARY):
        rows = WordTokenizer(80, size)([" ".join(map(str, range(78))), "\ud800 é 猫"])
        assert (rows.max() < size, rows[0, 1:-1].min() >= 3) == (True, True)
    with pytest.raises(UserError, match="3 or more"):
        WordTokenizer(2, 100)


def test_concepts_of_emoji_have_ids_of_their_own():
    words = {word for concept in CONCEPTS for word in concept.split("-")}
    rows = WordTokenizer(3, VOCABULARY)(sorted(words))
    assert len(np.unique(rows[:, 1])) == len(words) > 64


# ---------------------------------------------------------------- tokenizers of frozen encoders

# CLIP's row: begin, 75 tokens, end.
LENGTH = 77
REMEDY = "copy the tokenizer's files"
CAPTIONS = {
    "plain": "a photo of the cat",
    "empty": "",
    "blank": " \t\n ",
    "case_and_space": "  The   CAT\tsat\r\non\u00a0THE  Mat. ",
    "punctuation": "it's the cat's 3rd hat -- isn't it?! (50%) #1",
    "emoji": "\U0001f600\U0001f389 the \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "right_to_left": "\u05e9\u05d1\u05e2 \u0631\u0642\u0645 \u0633\u0628\u0639\u0629 7 \u200fcat",
    "other_scripts": "\u4e03 \u732b\u3001 e\u0301\u00e9 \u00df \u0130stanbul \uac00",
    # Control characters and the replacement character.
    "control": "the\x00cat\x1b\x7f \ufffd",
    # Lengths around a row, and far beyond it.
    "as_long_as_a_row": "x " * (LENGTH - 2),
    "one_too_many": "x " * (LENGTH - 1),
    "10000_characters": "x" * 10_000,
    "10000_in_words": "the " * 2_500,
    "10000_emoji": "\U0001f600" * 10_000,
    # Special tokens as text.
    "begin_spelled_out": "the <|startoftext|> cat",
    "end_in_capitals": "the <|ENDOFTEXT|> cat",
}


def token_ids(folder):
    """Arguments of FrozenTokenizer by the folder's config."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    return {"vocab_size": text["vocab_size"], "end_id": text["eos_token_id"], "begins": True}


def load_tokenizer(folder, length=LENGTH, **changed):
    return FrozenTokenizer(folder, length, **token_ids(folder) | changed)


@pytest.fixture(scope="module")
def transformers_rows(clip_folder):
    """A function from captions to rows, by transformers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)

    def encode_rows(captions, length=LENGTH):
        encoding = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length)
        return np.asarray(encoding["input_ids"])

    return encode_rows


@pytest.fixture
def folder_copy(clip_folder, tmp_path):
    """A copy of the folder, for tests that damage it."""
    return shutil.copytree(clip_folder, tmp_path / "copy")


@pytest.mark.parametrize("name", CAPTIONS)
def test_frozen_rows_are_those_of_transformers(clip_folder, transformers_rows, name):
    caption = CAPTIONS[name]
    for length in (LENGTH, 12):
        row = load_tokenizer(clip_folder, length)([caption])[0]
        assert (row.dtype, row.shape) == (np.int32, (length,))
        np.testing.assert_array_equal(row, transformers_rows([caption], length)[0])


def test_frozen_rows_of_many_captions_are_those_of_each(clip_folder, transformers_rows):
    tokenizer = load_tokenizer(clip_folder)
    rows = tokenizer(list(CAPTIONS.values()))
    np.testing.assert_array_equal(rows, transformers_rows(CAPTIONS.values()))
    for row, caption in zip(rows, CAPTIONS.values(), strict=True):
        np.testing.assert_array_equal(row, tokenizer([caption])[0])
    # "empty" and "blank" are equal, and so are the x of two captions that are cut.
    assert len(np.unique(rows, axis=0)) >= len(CAPTIONS) - 2
    assert tokenizer([]).shape == (0, LENGTH)


@pytest.mark.parametrize(
    "text", ["a <|endoftext|> the cat", "<|endoftext|>", "the<|endoftext|><|endoftext|>cat", "<|endoftext|>" * 800]
)
def test_frozen_text_that_spells_out_the_end_does_not_end_there(clip_folder, transformers_rows, text):
    tokenizer = load_tokenizer(clip_folder)
    row, other = tokenizer([text])[0], transformers_rows([text])[0]
    # transformers takes the text for the end token. Up to there, both agree.
    first = int(np.argmax(other == tokenizer.eot_id))
    np.testing.assert_array_equal(row[:first], other[:first])
    # The words behind it are encoded as if it were a blank.
    np.testing.assert_array_equal(row, tokenizer([text.replace("<|endoftext|>", " ")])[0])


def test_frozen_rows_begin_end_and_pad(clip_folder):
    tokenizer, known = load_tokenizer(clip_folder), token_ids(clip_folder)
    assert (tokenizer.length, tokenizer.vocab_size, tokenizer.eot_id) == (LENGTH, known["vocab_size"], known["end_id"])
    # CLIP's vocabulary ends with begin and end.
    begin, end = known["vocab_size"] - 2, known["end_id"]
    assert tokenizer.null_tokens().tolist() == [begin] + [end] * (LENGTH - 1)
    assert tokenizer.null_tokens().dtype == np.int32
    rows = tokenizer(list(CAPTIONS.values()))
    assert (rows[:, 0] == begin).all()
    # Long captions are cut and still end.
    assert (rows == end).any(1).all()
    assert rows.min() >= 0
    assert rows.max() < tokenizer.vocab_size
    # A lone surrogate.
    np.testing.assert_array_equal(tokenizer(["\ud800 cat"]), tokenizer(["? cat"]))


def test_frozen_truncation_is_reported_once(clip_folder, caplog):
    with caplog.at_level(logging.WARNING):
        load_tokenizer(clip_folder)([CAPTIONS["as_long_as_a_row"], "<|endoftext|>" * 100])
        # Neither fills more than a row: spelled-out end tokens are dropped.
        assert not caplog.records
        load_tokenizer(clip_folder)(["y" * 10_000, CAPTIONS["10000_in_words"]])
        load_tokenizer(clip_folder, 12)(["y" * 100])
        ByteTokenizer(5)(["abcdef"])
    assert len(caplog.records) == 1
    assert "10000 tokens is cut to the 75 that a row of 77 tokens" in caplog.text


def test_eight_threads_make_the_rows_of_one(clip_folder):
    tokenizer = load_tokenizer(clip_folder, 24)
    # Sorted: iteration over a set differs between processes.
    words = sorted({w for c in CAPTIONS.values() for w in c[:200].split()})
    draw = random.Random(0)
    captions = [" ".join(draw.choices(words, k=draw.randrange(30))) for _ in range(100)]
    expected = tokenizer(captions)
    # All threads begin at once, each with another order of the captions.
    start = threading.Barrier(8)

    def tokenize_shifted(shift):
        start.wait()
        return [tokenizer(captions[shift:] + captions[:shift]) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for shift, found in zip(range(8), pool.map(tokenize_shifted, range(8)), strict=True):
            for rows in found:
                np.testing.assert_array_equal(rows, np.roll(expected, -shift, axis=0))


@pytest.fixture
def t5_folder(tmp_path):
    """The tokenizer of an encoder like T5: no begin token, and a pad token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "the": 3, "cat": 4}
    # Built here: no download, and five ids are easy to read.
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    return tmp_path


def test_frozen_without_a_begin_token(t5_folder, refused):
    import transformers

    # 8 > 5 ids: an embedding table may have more rows than there are ids.
    options = {"vocab_size": 8, "end_id": 1}
    tokenizer = FrozenTokenizer(t5_folder, 5, begins=False, **options)
    assert tokenizer(["the cat", "dog", "", "the the the the the"]).tolist() == [
        [3, 4, 1, 0, 0],
        [2, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [3, 3, 3, 3, 1],
    ]
    assert (tokenizer.pad_id, tokenizer.eot_id) == (0, 1)
    # transformers saves its last padding settings in the file. They must not matter.
    saved = transformers.AutoTokenizer.from_pretrained(t5_folder)
    saved(["the"], padding="max_length", max_length=4)
    saved.save_pretrained(t5_folder)
    assert json.loads((t5_folder / "tokenizer.json").read_text())["padding"] is not None
    assert FrozenTokenizer(t5_folder, 5, begins=False, **options)(["the"]).tolist() == [[3, 1, 0, 0, 0]]
    load = lambda: FrozenTokenizer(t5_folder, 5, begins=True, **options)
    refused(load, t5_folder, "no begin token", REMEDY)


def test_the_tokenizer_of_an_encoder(clip_folder):
    assert isinstance(make_tokenizer("bytes", 9), ByteTokenizer)
    assert isinstance(make_tokenizer("words", 9, vocab_size=100), WordTokenizer)
    tokenizer = make_tokenizer("clip", 9, folder=clip_folder, **token_ids(clip_folder))
    assert isinstance(tokenizer, FrozenTokenizer)
    assert tokenizer(["the cat"]).shape == (1, 9)


# ---------------------------------------------------------------- damaged and unfitting tokenizers


def test_a_folder_without_a_tokenizer(clip_folder, tmp_path, refused):
    # The weights without their tokenizer.
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, tmp_path)
    refused(
        lambda: FrozenTokenizer(tmp_path, LENGTH, **token_ids(tmp_path)),
        tmp_path,
        "no tokenizer",
        "tokenizer.json",
        REMEDY,
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
def test_a_damaged_tokenizer(folder_copy, damage, refused):
    file = folder_copy / "tokenizer.json"
    # Whatever the parser raises becomes one line for the user.
    file.write_bytes(damage(file.read_bytes()))
    is_pointer = file.read_bytes().startswith(b"version https://git-lfs")
    refused(lambda: load_tokenizer(folder_copy), folder_copy, "tokenizer", "git lfs pull" if is_pointer else REMEDY)


def test_a_vocabulary_without_its_merges(folder_copy, refused):
    """Without merges, words would be read letter by letter."""
    vocabulary = json.loads((folder_copy / "tokenizer.json").read_text())["model"]["vocab"]
    (folder_copy / "tokenizer.json").unlink()
    (folder_copy / "vocab.json").write_text(json.dumps(vocabulary))
    (folder_copy / "merges.txt").unlink(missing_ok=True)
    refused(lambda: load_tokenizer(folder_copy), folder_copy, "tokenizer", REMEDY)


def test_vocabulary_and_merges_are_a_tokenizer(folder_copy, clip_folder):
    """Older networks come with these two files."""
    model = json.loads((folder_copy / "tokenizer.json").read_text())["model"]
    (folder_copy / "tokenizer.json").unlink()
    (folder_copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    # Newer files store pairs, older ones "a b".
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder_copy / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    captions = [*CAPTIONS.values()]
    np.testing.assert_array_equal(load_tokenizer(folder_copy)(captions), load_tokenizer(clip_folder)(captions))


def test_settings_that_were_saved_with_a_tokenizer_do_not_matter(folder_copy, clip_folder):
    """transformers saves its last settings of truncation and padding in the file."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_copy)
    tokenizer(["x"], padding="max_length", truncation=True, max_length=5)
    tokenizer.save_pretrained(folder_copy)
    assert json.loads((folder_copy / "tokenizer.json").read_text())["truncation"]["max_length"] == 5
    captions = [*CAPTIONS.values()]
    np.testing.assert_array_equal(load_tokenizer(folder_copy)(captions), load_tokenizer(clip_folder)(captions))


def test_a_tokenizer_of_another_network(clip_folder, refused):
    known = token_ids(clip_folder)
    size, end = known["vocab_size"], known["end_id"]
    # The end token is one that was added, and has no row then.
    refused(
        lambda: load_tokenizer(clip_folder, vocab_size=size - 1), clip_folder, "added tokens", f"the {size - 1} rows"
    )
    message = refused(lambda: load_tokenizer(clip_folder, vocab_size=size - 9), clip_folder, "does not fit", REMEDY)
    assert f"{size} ids" in message
    assert f"the weights have {size - 9}" in message
    message = refused(lambda: load_tokenizer(clip_folder, end_id=end - 1), clip_folder, "does not fit", REMEDY)
    assert f"ends a text by {end}" in message
    assert f"expect {end - 1}" in message
    # A larger table fits.
    assert load_tokenizer(clip_folder, vocab_size=size + 4).vocab_size == size + 4


def test_a_row_without_room_for_text(clip_folder, refused):
    refused(lambda: load_tokenizer(clip_folder, 2), "config.text.length=2", "no room for text")
    known = token_ids(clip_folder)
    # The last id before the two special ones.
    word = known["vocab_size"] - 3
    assert load_tokenizer(clip_folder, 3)(["the cat"]).tolist() == [[word + 1, word, known["end_id"]]]

"""Classes of a model: a prompt means a class by its name or its number, or one line says which there are."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from gigagan_jax import cli
from gigagan_jax.config import (
    Config,
    class_label,
    class_labels,
    default,
    first_difference,
    flatten_fields,
    from_dict,
    needs_prompts,
    to_dict,
)
from gigagan_jax.config.serialization import parse_fields
from gigagan_jax.core.errors import UserError
from gigagan_jax.interop import model_card


def of_classes(*names, count=0):
    return dataclasses.replace(Config(), condition="class", num_classes=len(names) or count, class_names=names)


def refused(config, prompt):
    with pytest.raises(UserError) as e:
        class_label(config, prompt)
    return str(e.value)


def test_a_class_is_called_by_name_or_number():
    config = of_classes("chelsea", "Coffee cup", "flower")
    assert class_labels(config, ["chelsea", "coffee cup", " FLOWER ", "0", "2"]) == [0, 1, 2, 0, 2]
    message = "prompt 'cofee': gigagan has no such class; its 3 classes are chelsea, Coffee cup, flower, or give a number, 0 to 2"
    assert refused(config, "cofee") == message
    for prompt in ("3", "-1", "", "1.0", "²"):
        assert "no such class" in refused(config, prompt)


def test_case_tells_classes_apart_where_it_must():
    config = of_classes("Polish", "polish", "POLISH!")
    assert class_labels(config, ["Polish", "polish", "polish!"]) == [0, 1, 2]
    assert refused(config, "POLISH") == "prompt 'POLISH' may be class 0 or 1 of gigagan: give the number"


def test_a_number_is_a_name_where_classes_are_called_by_numbers():
    config = of_classes("1", "2", "10")
    assert class_labels(config, ["1", "2", "10"]) == [0, 1, 2]
    assert refused(config, "0") == "prompt '0': gigagan has no such class; its 3 classes are 1, 2, 10"


def test_classes_without_names_have_numbers():
    config = of_classes(count=7)
    assert class_labels(config, ["0", "06"]) == [0, 6]
    assert "its 7 classes have no names: give a number, 0 to 6" in refused(config, "cat")
    assert "0 to 6" in refused(config, "7")
    # Nobody has looked at the data yet.
    assert class_label(of_classes(count=0), "999") == 999


def test_of_many_classes_the_close_ones_are_named():
    config = of_classes(*(f"breed {i}" for i in range(198)), "Great Dane", "Dalmatian")
    message = refused(config, "dalmation")
    assert message.endswith("of its 200 classes, close ones are Dalmatian, or give a number, 0 to 199")
    assert "the first are breed 0, breed 1" in refused(config, "xxxxxxx")


def test_names_live_in_the_stored_config():
    config = from_dict(
        {"condition": "class", "num_classes": 2, "class_names": ["a", "b"], "snapshot": {"prompts": ["b"]}}
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    for values, message in (
        ({"class_names": ["a", "b"], "num_classes": 3}, "config.class_names has 2 names, config.num_classes=3"),
        ({"class_names": ["a", "b"], "num_classes": 2, "snapshot": {"prompts": ["c"]}}, "no such class"),
    ):
        with pytest.raises(UserError, match=message):
            from_dict({"condition": "class"} | values)


def test_the_first_difference_of_two_lists():
    assert first_difference(("a", "b"), ("a", "b")) == ""
    assert first_difference(("a", "b"), ("a", "c", "b")) == "class 1 was 'b' and is now 'c'"
    assert first_difference(("a",), ("a", "b")) == "class 1, 'b', is new"
    assert first_difference(("a", "b"), ("a",)) == "class 1 was 'b' and is now missing"


def test_who_needs_prompts():
    assert [needs_prompts(dataclasses.replace(Config(), condition=c)) for c in ("text", "class", "none")] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "text, prompts",
    [
        ("0,1,2", ("0", "1", "2")),
        ("7", ("7",)),
        ("007, 1e3", ("007", "1e3")),
        ("coffee", ("coffee",)),
        ("coffee,3", ("coffee", "3")),
        ('("0", "1")', ("0", "1")),
        ("(0, 1)", ("0", "1")),
        ("[0,]", ("0",)),
        ("('a, b', 'c')", ("a, b", "c")),
        ("'a, b'", ("a, b",)),
        ('a,"b"', ("a", "b")),
        ("True,None", ("True", "None")),
        ("", ()),
        ("()", ()),
    ],
)
def test_lists_of_texts_are_typed_as_users_write_them(text, prompts):
    values = default()
    cli.override_field(values, "snapshot.prompts", text)
    assert parse_fields(values).snapshot.prompts == prompts
    # Of every setting of that kind, in a config that was stored as JSON too.
    stored = ConfigDict(json.loads(json.dumps(to_dict(Config()))))
    for name in ("evaluators", "data.mixture", "data.caption_keys", "data.filters.nsfw", "vision_aided.augment"):
        cli.override_field(stored, name, text)
        assert flatten_fields(to_dict(parse_fields(stored)))[name] == list(prompts)


def test_the_card_and_the_folder_of_a_model_name_its_classes():
    config = of_classes("cat", "dog")
    assert "| conditioned on | 2 classes: cat, dog |" in model_card.write(config, 0, (), "safetensors")
    many = of_classes(*map(str, range(30)))
    assert "30 classes: 0, 1, 2" in model_card.write(many, 0, (), "safetensors")
    assert "29" not in model_card.write(many, 0, (), "safetensors")


def test_captions_of_a_file_are_no_classes():
    load = lambda *flags: cli.load_config("configs/shapes.py:tiny", ("--config.evaluators=", *flags))
    assert load().snapshot.prompts
    assert load("--config.condition=class").snapshot.prompts == ()
    assert load("--config.snapshot.prompts=1,2", "--config.condition=class").snapshot.prompts == ("1", "2")

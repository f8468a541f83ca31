"""Reading and checking of configs: what a user can get wrong, and what he is told."""

import ast
import dataclasses
import io
import json
import tokenize
from pathlib import Path

import pytest

from configs import laion
from gigagan_jax import config as settings
from gigagan_jax.config import Config, comparison, fixed_differences, from_dict, to_dict
from gigagan_jax.core.errors import UserError


def changed_values(**values):
    """The tiny text-to-image config as nested dicts, with dotted fields (`__` for the dot) set."""
    out = to_dict(from_dict(laion.get_config("tiny")))
    for name, value in values.items():
        # Keyword names cannot have dots.
        *groups, field = name.split("__")
        group = out
        for g in groups:
            group = group[g]
        group[field] = value
    return out


def error_message(values):
    with pytest.raises(UserError) as error:
        from_dict(values)
    text = str(error.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- reading


def test_empty_is_the_default():
    assert from_dict({}) == Config()
    assert from_dict(settings.default()) == Config()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"resolutoin": 64}, "unknown config key config.resolutoin; did you mean config.resolution?"),
        ({"generator": {"zdim": 8}}, "unknown config key config.generator.zdim; did you mean config.generator.z_dim?"),
        (
            {"generator": {"attention": {"head": 8}}},
            "unknown config key config.generator.attention.head; did you mean config.generator.attention.heads?",
        ),
        (
            {"mesh": {"qqqqqq": 8}},
            "unknown config key config.mesh.qqqqqq; known: data, fsdp, shard_optimizer, slices, tensor",
        ),
    ],
)
def test_unknown_key_says_the_nearest_known_one(values, message):
    assert error_message(values) == message


@pytest.mark.parametrize(
    "values, message",
    [
        ({"seed": "0"}, "config.seed: expected int, got str '0'"),
        ({"seed": 0.5}, "config.seed: expected int, got float 0.5"),
        # bool is a subclass of int in Python.
        ({"seed": True}, "config.seed: expected int, got bool True"),
        ({"batch_size": None}, "config.batch_size: expected int, got NoneType None"),
        ({"total_kimg": "many"}, "config.total_kimg: expected float, got str 'many'"),
        ({"total_kimg": True}, "config.total_kimg: expected float, got bool True"),
        ({"remat": 1}, "config.remat: expected bool, got int 1"),
        ({"name": 3}, "config.name: expected str, got int 3"),
        ({"generator": 3}, "config.generator: expected a group of settings, got 3"),
        ({"rules": {"batch": 8}}, "config.rules.batch: expected str, got int 8"),
        ({"generator": {"bank": 2}}, "config.generator.bank: expected a tuple like (1, 2), got 2"),
        ({"generator": {"bank": (1, "2")}}, "config.generator.bank[1]: expected int, got str '2'"),
        ({"snapshot": {"prompts": "a cat"}}, "config.snapshot.prompts: expected a tuple like ('a', 'b'), got 'a cat'"),
        ({"loss": {"r1_gamma": (1.0, 2.0, 3.0)}}, "config.loss.r1_gamma: expected 2 values, got 3"),
        ({"loss": {"r1_gamma": (1.0,)}}, "config.loss.r1_gamma: expected 2 values, got 1"),
    ],
)
def test_wrong_type_says_where_and_what(values, message):
    assert error_message(values) == message


def test_whole_numbers_will_do_for_floats():
    config = from_dict({"total_kimg": 5, "loss": {"r1_gamma": [1, 2]}})
    assert config.total_kimg == 5.0
    assert isinstance(config.total_kimg, float)
    assert config.loss.r1_gamma == (1.0, 2.0)
    # Configs that differ in type only would have other digests.
    assert all(isinstance(x, float) for x in config.loss.r1_gamma)


def test_there_and_back_through_json():
    config = from_dict(changed_values(total_kimg=12, loss__level_weights=(3.0, 2.0, 1.0), evaluators=("digits",)))
    # JSON turns tuples into lists; from_dict turns them back.
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert isinstance(again.generator.blocks, tuple)
    assert settings.config_digest(again) == settings.config_digest(config)
    assert settings.config_digest(config) != settings.config_digest(dataclasses.replace(config, seed=1))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_configs_do_not_share_their_rules():
    one, other = Config(), Config()
    assert one.rules == other.rules == settings.DEFAULT_RULES
    assert one.rules is not other.rules
    assert one.rules is not settings.DEFAULT_RULES


@pytest.mark.parametrize("resolution, sides", [(8, (4, 8)), (64, (4, 8, 16, 32, 64))])
def test_resolutions(resolution, sides):
    assert dataclasses.replace(Config(), resolution=resolution).resolutions == sides


# ---------------------------------------------------------------- checking


@pytest.mark.parametrize("resolution", [-16, 0, 1, 2, 4, 12, 48, 63, 65])
def test_resolution_is_a_power_of_two_of_at_least_8(resolution):
    message = error_message(changed_values(resolution=resolution))
    assert message.startswith(f"config.resolution={resolution}: must be a power of two")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"generator__blocks": (1, 1)}, "config.generator.blocks has 2 entries; resolution 16 has 3 levels (4, 8, 16)"),
        ({"discriminator__attention_depth": (0,) * 4}, "config.discriminator.attention_depth has 4 entries"),
        ({"generator__bank": (1, 0, 1)}, "config.generator.bank=(1, 0, 1): every entry must be at least 1"),
        ({"generator__attention_depth": (0, -1, 0)}, "config.generator.attention_depth=(0, -1, 0)"),
        ({"micro_batches": 3}, "config.batch_size=16 does not divide into config.micro_batches=3"),
        (
            {"micro_batches": 2, "discriminator__minibatch_std": 16},
            "config.discriminator.minibatch_std=16 does not divide a micro-batch of 8 images",
        ),
        ({"discriminator__minibatch_std": 1}, "config.discriminator.minibatch_std=1: a group of one has no deviation"),
        ({"condition": "txt"}, "config.condition='txt': must be one of 'text', 'class', 'none'"),
        ({"dtype": "float16"}, "config.dtype='float16'"),
        ({"data__crop": "centre"}, "config.data.crop='centre': must be one of 'center', 'random'"),
        ({"data__captions": "maybe"}, "config.data.captions='maybe'"),
        ({"data__resize_filter": "magic"}, "config.data.resize_filter='magic'"),
        ({"discriminator__head": "two"}, "config.discriminator.head='two'"),
        ({"generator__adaptive_form": "fast"}, "config.generator.adaptive_form='fast'"),
        ({"loss__r1_levels": "some"}, "config.loss.r1_levels='some'"),
        ({"generator__attention__kind": "l1"}, "config.generator.attention.kind='l1'"),
        ({"discriminator__attention__norm": "batch"}, "config.discriminator.attention.norm='batch'"),
        ({"discriminator__text__heads": 3}, "config.discriminator.text.width=32 does not divide into 3 heads"),
        ({"evaluators": ("fid", "digits")}, "config.evaluators='fid': must be one of 'digits'"),
        ({"text__encoder": "clip"}, "config.text.path is not set: text.encoder='clip' needs"),
        ({"text__encoder": "bert"}, "config.text.encoder='bert': must be one of"),
        ({"loss__clip": (0.0, -1.0)}, "config.loss.clip=(0.0, -1.0): weights must not be negative"),
        ({"vision_aided__layers": (2, 1)}, "config.vision_aided.layers=(2, 1): numbers of blocks"),
        ({"condition": "class", "num_classes": 1}, "config.num_classes=1: condition='class' needs at least 2"),
        ({"loss__match_d_form": "contrastive"}, "it needs config.discriminator.head='projection'"),
        ({"loss__match_g_form": "contrastive"}, "needs config.loss.match_d_form='contrastive'"),
        (
            {
                "loss__match_d_form": "contrastive",
                "discriminator__head": "projection",
                "loss__match_relativistic": True,
            },
            "contrastive form has it built in",
        ),
        ({"text__encoder": "words", "text__buckets": 0}, "config.text.buckets=0"),
        ({"text__encoder": "words", "text__buckets": 1}, "config.text.buckets=1: must be at least 2"),
        ({"data__caption_dropout": 1.5}, "config.data.caption_dropout"),
        ({"data__max_bad_fraction": -0.1}, "config.data.max_bad_fraction"),
        ({"data__threads": -1}, "config.data.threads=-1"),
        ({"generator__pyramid": False}, "config.generator.pyramid and config.discriminator.multi_scale_input must be"),
        ({"loss__level_weights": (1.0, 1.0)}, "config.loss.level_weights needs 3 entries, one a level"),
        ({"total_kimg": 5e6}, "config.total_kimg=5000000.0: must be below 4294967"),
    ],
)
def test_settings_that_do_not_fit(values, message):
    assert message in error_message(changed_values(**values))


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "field",
    [
        "batch_size",
        "micro_batches",
        "total_kimg",
        "checkpoint_kimg",
        "snapshot_kimg",
        "log_kimg",
        "loss__r1_interval",
        "text__length",
        "text__width",
        "checkpoint__keep",
        "ema__half_life_kimg",
        "generator__z_dim",
        "generator__w_dim",
        "generator__mapping_depth",
        "generator__mapping_lr_mul",
        "generator__channel_base",
        "generator__channel_max",
        "generator__text__width",
        "generator__text__heads",
        "generator__attention__heads",
        "generator__attention__head_dim",
        "discriminator__channel_base",
        "discriminator__channel_max",
        "discriminator__head_depth",
        "discriminator__head_width",
        "discriminator__text__width",
        "discriminator__text__heads",
        "discriminator__attention__heads",
        "discriminator__attention__head_dim",
        "snapshot__seeds",
    ],
)
def test_sizes_are_positive(field, value):
    """A size that is not must be refused by name, here: later it is a traceback from inside a layer."""
    assert f"config.{field.replace('__', '.')}" in error_message(changed_values(**{field: value}))


@pytest.mark.parametrize(
    "field",
    [
        "generator__text__depth",
        "discriminator__text__depth",
        "discriminator__class_mapping_depth",
        "discriminator__minibatch_std",
        "ema__rampup",
        "g_optimizer__learning_rate",
        "d_optimizer__weight_decay",
        "d_optimizer__warmup_kimg",
        "g_optimizer__decay_kimg",
    ],
)
def test_what_may_be_zero_is_not_negative(field):
    # 0 switches these off.
    from_dict(changed_values(**{field: 0}))
    assert f"config.{field.replace('__', '.')}" in error_message(changed_values(**{field: -1}))


def test_channels_do_not_vanish_at_the_resolution():
    """channels = base / resolution: a base below it leaves none."""
    assert "config.generator.channel_base" in error_message(changed_values(generator__channel_base=8))
    assert "config.discriminator.channel_base" in error_message(changed_values(discriminator__channel_base=8))


# ---------------------------------------------------------------- comparing


def test_differences_name_what_changed():
    stored = changed_values()
    current = from_dict(changed_values(seed=3, generator__bank=(1, 1, 1), loss__r1_gamma=(1.0, 1.0)))
    assert [str(c) for c in fixed_differences(json.loads(json.dumps(stored)), current)] == [
        "generator.bank: [1, 2, 4] -> [1, 1, 1]",
        "loss.r1_gamma: [0.2048, 2.048] -> [1.0, 1.0]",
        "seed: 0 -> 3",
    ]
    # Lists of the JSON equal the tuples of the config.
    assert fixed_differences(json.loads(json.dumps(stored)), from_dict(stored)) == []


def test_differences_with_fields_of_another_version():
    stored = changed_values()
    del stored["generator"]["z_dim"]
    # A field of an older version that no longer exists.
    stored["ancient"] = 1
    assert [str(c) for c in fixed_differences(stored, from_dict(changed_values()))] == [
        "ancient: 1 -> (absent)",
        "generator.z_dim: (absent) -> 16",
    ]


def test_differences_pass_over_what_may_change():
    # One field of each group in FREE_FIELDS.
    current = changed_values(
        total_kimg=9,
        batch_size=32,
        checkpoint_kimg=1,
        snapshot_kimg=1,
        log_kimg=1,
        micro_batches=2,
        remat=False,
        mesh__fsdp=4,
        rules__channels="tensor",
        data__path="elsewhere",
        data__threads=2,
        generator__adaptive_form="shift",
        checkpoint__keep=1,
        snapshot__prompts=("a dog",),
    )
    assert fixed_differences(changed_values(), from_dict(current)) == []


@pytest.mark.parametrize(
    "fields, flag",
    [
        ({"g_optimizer__learning_rate": 0.1}, "settings"),
        ({"loss__r1_gamma": (1.0, 1.0)}, "settings"),
        ({"ema__half_life_kimg": 1.0}, "settings"),
        ({"data__flip": True}, "settings"),
        ({"data__filters__min_width": 8}, "data"),
        ({"data__mixture": ("1:a", "2:b")}, "data"),
        ({"seed": 3}, None),
        # The first moment is stored where beta1 is not zero.
        ({"d_optimizer__beta1": 0.5}, None),
        ({"generator__z_dim": 8}, None),
    ],
)
def test_what_a_flag_lets_change(fields, flag):
    stored, current = changed_values(), from_dict(changed_values(**fields))
    (change,) = fixed_differences(stored, current)
    assert change.flag == flag
    for accept in settings.ACCEPTED:
        assert (fixed_differences(stored, current, [accept]) == []) == (accept == flag)
    text = settings.explain_differences([change])
    assert text.startswith(f"({change}): ")
    assert (f"--accept={flag} goes on" in text) if flag else "--accept" not in text


def test_what_no_flag_lets_change_is_named():
    changes = fixed_differences(changed_values(), from_dict(changed_values(seed=3, loss__match_d=2.0)))
    assert "no flag lets seed change" in settings.explain_differences(changes)
    both = fixed_differences(changed_values(), from_dict(changed_values(data__split="all", loss__match_d=2.0)))
    assert "--accept=data,settings goes on" in settings.explain_differences(both)


def test_fields_of_these_lists_exist():
    known = settings.flatten_fields(to_dict(Config()))
    for field in (*settings.FREE_FIELDS, *comparison.SAFE_FIELDS, *comparison.DATA_FIELDS):
        assert any(k == field or k.startswith(field + ".") for k in known), field


# ---------------------------------------------------------------- the documentation of the fields


def test_every_field_says_what_it_is():
    """A comment on the field's line, above it, or within it; groups have the docstring of their class."""
    groups = {c.__name__ for c in vars(settings).values() if dataclasses.is_dataclass(c)}
    fields, silent = 0, []
    for file in Path(settings.__file__).parent.glob("*.py"):
        source = file.read_text(encoding="utf-8")
        # ast drops comments, so they come from the tokens.
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef) or node.name not in groups:
                continue
            assert ast.get_docstring(node), node.name
            for field in node.body:
                if not isinstance(field, ast.AnnAssign):
                    continue
                fields += 1
                lines = range(field.lineno - 1, field.end_lineno + 1)
                documented = any(len(comments.get(n, "#").strip("# ")) > 1 for n in lines)
                if ast.unparse(field.annotation) not in groups and not documented:
                    silent.append(f"{node.name}.{ast.unparse(field.target)}")
    # Guards against a selection that finds no fields.
    assert fields > 90
    assert silent == []

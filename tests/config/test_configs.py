"""Every config file and variant: it validates, and its whole train step passes abstract evaluation at no cost."""

import importlib
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import ablation, scale
from gigagan_jax.config import from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import is_spec
from gigagan_jax.training.batch import abstract_batch
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

FILES = (
    "digits",
    "shapes",
    "emoji",
    "emoji_upsampler",
    "photos",
    "own",
    "laion",
    "laion_upsampler",
    "imagenet",
    "ablation",
    "scale",
)
VARIANTS = [
    ("digits", ""),
    ("digits", "tiny"),
    *(("shapes", arg) for arg in ("", "16", "scenes", "64", "tiny")),
    *(("emoji", arg) for arg in ("", "all", "tiny")),
    ("laion", ""),
    ("laion", "tiny"),
    ("laion", "bytes"),
    ("laion", "paper"),
    ("laion", "small"),
    *(("laion", arg) for arg in ("unconditional", "unconditional-tiny")),
    ("imagenet", ""),
    ("imagenet", "tiny"),
    *(("imagenet", arg) for arg in ("upsampler", "sr", "upsampler-tiny", "sr-tiny")),
    *(("imagenet", arg) for arg in ("unconditional", "unconditional-tiny")),
    *(("laion_upsampler", arg) for arg in ("", "1024", "bytes", "tiny")),
    *(("photos", arg) for arg in ("", "tiny")),
    *(("own", arg) for arg in ("", "tiny", "class-mini-32", "unconditional-large-256")),
    *(("emoji_upsampler", arg) for arg in ("", "none", "clean", "tiny")),
    *(("ablation", row) for row in ablation.ROWS),
    *(("scale", size) for size in scale.SIZES),
]
ids = lambda v: ":".join(filter(None, v))


def config_module(name):
    return importlib.import_module(f"configs.{name}")


def test_no_config_file_is_forgotten():
    found = {p.stem for p in Path(config_module("digits").__file__).parent.glob("*.py")} - {"__init__"}
    assert found == set(FILES)


def assert_same(out, given):
    assert jax.tree.structure(out) == jax.tree.structure(given)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(given), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert not a.weak_type  # a state that is weak where it came in strong would be traced again


# Every file but those whose variants have no part of their own: the ablation's rows are the paper's, the sizes are wider ones.
TABLES = ("ablation", "scale", "shapes", "emoji", "laion_upsampler", "photos", "emoji_upsampler", "own")
TINY = (
    ("shapes", "tiny"),
    ("laion_upsampler", "tiny"),
    ("photos", "tiny"),
    ("emoji_upsampler", "tiny"),
    ("own", "tiny"),
)
LARGE = (("laion", "small"), ("laion", "paper"), ("imagenet", "upsampler"), ("imagenet", "sr"))
LARGE += tuple((name, arg) for name in ("laion", "imagenet") for arg in ("unconditional", "unconditional-tiny"))
DEFAULT = [v for v in VARIANTS if v in TINY or (v[0] not in TABLES and v not in LARGE)]


@pytest.mark.parametrize(
    "variant", [v if v in DEFAULT else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS], ids=ids
)
def test_whole_step(variant):
    name, arg = variant
    config = from_dict(config_module(name).get_config(arg) if arg else config_module(name).get_config())
    networks = Networks(config)
    step = TrainStep(networks)
    state, batch, key = networks.abstract(), abstract_batch(config), jax.eval_shape(lambda: jax.random.key(0))
    # Shapes of the frozen networks: no weights are read.
    frozen = networks.frozen.abstract()
    # Shapes only: the largest configs have billions of parameters.
    out, metrics = jax.eval_shape(lambda *a: step(*a, with_r1=True), state, batch, key, frozen)
    assert_same(out, state)
    assert "loss/r1" in metrics
    assert {"loss/d", "loss/g", "grad_norm/d", "grad_norm/g"} <= metrics.keys()
    assert ("loss/clip" in metrics) == (max(config.loss.clip) > 0)
    assert ("loss/v" in metrics) == ("loss/g_v" in metrics) == (config.loss.vision_aided > 0)
    assert ("loss/d_match" in metrics) == (config.condition == "text" and config.loss.match_d > 0)
    assert metrics.pop("health").shape == (len(step.health_vector.names),)
    assert all(m.shape == () and m.dtype == "float32" for m in metrics.values())

    if arg == "tiny":  # without R1 a step does less of the same
        out, without = jax.eval_shape(lambda *a: step(*a, with_r1=False), state, batch, key, frozen)
        assert_same(out, state)
        assert "loss/r1" not in without


@pytest.mark.parametrize("name", FILES)
def test_docstring_is_the_command(name):
    docstring = config_module(name).__doc__
    command = re.search(r"python -m gigagan_jax\.train .*", docstring)
    assert command, docstring
    config = re.search(rf"--config=configs/{name}\.py(:[A-Za-z0-9-]+)?( |$)", command.group())
    assert config
    assert "--workdir=" in command.group()
    variant = (config.group(1) or ":")[1:]
    # The docstring of the ablation has a placeholder.
    if variant and variant != "ROW":
        from_dict(config_module(name).get_config(variant))
    data = from_dict(config_module(name).get_config()).data
    needs_path = data.source not in ("digits", "shapes") and not data.path
    assert ("--config.data.path=" in command.group()) == needs_path
    assert config_module(name).get_config.__doc__


@pytest.mark.parametrize("name", FILES)
def test_unknown_variant(name):
    sizes = "1b, 3b, 10b, 1b-bytes, 3b-bytes, 10b-bytes, 1b-paper, 3b-paper, 10b-paper"
    known = {
        "ablation": ", ".join(ablation.ROWS),
        "laion": "paper, tiny, bytes, paper-bytes, small, unconditional, unconditional-tiny",
        "scale": sizes,
    }
    known |= {
        "laion_upsampler": "1024, bytes, tiny",
        "imagenet": "tiny, upsampler, upsampler-tiny, sr, sr-tiny, unconditional, unconditional-tiny",
    }
    known |= {"emoji_upsampler": "none, clean, tiny"}
    words = "text, class, unconditional, mini, small, medium, large, 32, 64, 128, 256"
    known |= {"own": f"tiny, and words joined by '-': {words}"}
    known |= {"shapes": "16, scenes, 64, tiny", "emoji": "all, tiny"}
    with pytest.raises(
        (ValueError, UserError),
        match=rf"configs/{name}\.py has no (variant|row) 'tinny'; known: {known.get(name, 'tiny')}$",
    ):
        config_module(name).get_config("tinny")


def test_names_tell_runs_apart():
    # The name is part of folders and of metadata.
    names = [
        from_dict(config_module(name).get_config(arg)).name
        for name, arg in VARIANTS
        if (name, arg) != ("digits", "tiny")
    ]
    assert len(set(names)) == len(names)


def test_each_ablation_row_adds_its_part():
    rows = {row: from_dict(ablation.get_config(row)) for row in ablation.ROWS}
    has = {
        "attention": lambda c: max(c.generator.attention_depth) > 0 and max(c.discriminator.attention_depth) > 0,
        "matching": lambda c: c.loss.match_d > 0 and c.loss.match_g > 0,
        "adaptive": lambda c: max(c.generator.bank) > 1,
        "deeper": lambda c: max(c.generator.blocks) > 1 and max(c.discriminator.blocks) > 1,
        "multiscale": lambda c: (
            c.generator.pyramid and c.discriminator.multi_scale_input and c.discriminator.multi_scale_output
        ),
        "clip": lambda c: max(c.loss.clip) > 0,
        "vision": lambda c: c.loss.vision_aided > 0,
    }
    for i, row in enumerate(ablation.ROWS):
        # Each row has its own part and those of all rows before it.
        for part, test in has.items():
            assert test(rows[row]) == (ablation.ROWS.index(part) <= i), (row, part)
    assert from_dict(ablation.get_config()) == rows["vision"]


# Table A2: 652.5M and 381.4M for text to image, 209.5M and 76.7M for ImageNet.
@pytest.mark.parametrize("name, g, d", [("laion", 652.5e6, 381.4e6), ("imagenet", 209.5e6, 76.7e6)])
def test_sizes_are_the_papers(name, g, d):
    networks = Networks(from_dict(config_module(name).get_config()))
    assert networks.g.count() == pytest.approx(g, rel=0.05)
    assert networks.d.count() == pytest.approx(d, rel=0.05)


def test_residual_gains_fall_with_the_depth():
    base = from_dict(config_module("laion").get_config())
    gains = lambda c: np.array(
        [
            *(c.generator.residual_gain, c.generator.attention_gain, c.generator.text.residual_gain),
            *(c.discriminator.residual_gain, c.discriminator.attention_gain, c.discriminator.text.residual_gain),
        ]
    )
    for size, m in scale.SIZES.items():
        got = from_dict(scale.get_config(size))
        np.testing.assert_allclose(gains(got) * m**0.5, gains(base))
        # The heads of V stand on a transformer of no layers.
        assert got.vision_aided == base.vision_aided
        # m times the branches of variance gain^2 have the variance of before, but for the rounding of depths.
        sums = lambda c: sum(c.generator.blocks) * c.generator.residual_gain**2
        assert sums(got) == pytest.approx(sums(base), rel=0.1)
        # The first image's share of what leaves D's blocks: 1 / (1 + gain^2) a block.
        share = lambda c: sum(c.discriminator.blocks) * math.log1p(c.discriminator.residual_gain**2)
        assert share(got) == pytest.approx(share(base), rel=0.25)


@pytest.mark.parametrize("size, g", [("1b", 1e9), ("3b", 3e9), ("10b", 10e9)])
def test_sizes_past_the_papers(size, g):
    """G has what its name says and D the paper's share; widths fill matrix units, the learning rate falls with m."""
    config = from_dict(scale.get_config(size))
    networks = Networks(config)
    assert networks.g.count() == pytest.approx(g, rel=0.05)
    assert networks.d.count() / networks.g.count() == pytest.approx(381.4 / 652.5, rel=0.05)
    for module_ in (networks.g, networks.d):
        # Matrix units of TPUs work on tiles of 128.
        for s in jax.tree.leaves(module_.specs, is_leaf=is_spec):
            assert all(n % 128 == 0 for n in s.shape if n > 128), s
    assert config.g_optimizer.learning_rate * scale.SIZES[size] == pytest.approx(0.0025)
    assert config.d_optimizer.learning_rate == config.g_optimizer.learning_rate
    assert from_dict(scale.get_config(f"{size}-bytes")).generator == config.generator


@pytest.mark.parametrize("size, g", [("mini", 0.8e6), ("small", 5e6), ("medium", 30e6), ("large", 120e6)])
def test_the_ladder_of_own_pictures(size, g):
    """G has what docs/your_images.md says at every side."""
    for side in (32, 256):
        config = from_dict(config_module("own").get_config(f"text-{size}-{side}"))
        assert config.resolution == side
        networks = Networks(config)
        assert networks.g.count() == pytest.approx(g, rel=0.05)
        assert 0.25 < networks.d.count() / networks.g.count() < 1

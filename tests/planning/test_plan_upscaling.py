"""Plans of an upsampler's inference on one chip that is not there."""

import json

import pytest

from configs import digits, laion_upsampler
from gigagan_jax.config import from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.build import build_generator
from gigagan_jax.planning.compile import CompileSettings
from gigagan_jax.planning.topology import parse_topology
from gigagan_jax.planning.upscaling import plan_upscaling
from tools import plan_upscaling as tool


@pytest.mark.slow
def test_a_plan_has_the_weights_and_a_time(tmp_path, capsys):
    lines = tmp_path / "plans.jsonl"
    flags = ["--config=configs/laion_upsampler.py:tiny", "--topology=v5p:2x2x1", f"--json={lines}"]
    assert tool.verb([*flags, "--size=8x16", "--batch=2"]) == 0
    (plan,) = map(json.loads, lines.read_text().splitlines())
    assert plan["output"] == [32, 64]
    assert plan["fits"]
    assert plan["seconds"] > 0
    count = build_generator(from_dict(laion_upsampler.get_config("tiny"))).count()
    assert plan["memory"]["parameters"] == 4 * count
    assert "2 of 32x64 px" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size=7x8"], r"--size=7x8: sides must be multiples of 2"),
        (["--size=8"], "write HEIGHTxWIDTH"),
        (["--batch=0"], "must be at least 1"),
        (["--topology=h100:8"], "only TPUs have a compiler here"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError, match=message):
        tool.verb(["--config=configs/laion_upsampler.py:tiny", "--topology=v5p:2x2x1", *flags])


def test_base_models_have_another_planner():
    config = from_dict(digits.get_config("tiny"))
    with pytest.raises(UserError, match=r"is a base model: tools/plan\.py plans its training"):
        plan_upscaling(config, parse_topology("v5p:2x2x1"), CompileSettings(), size=(8, 8), batch=1)

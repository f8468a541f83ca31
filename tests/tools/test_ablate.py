"""tools/ablate.py: what it trains next, its table and picture, earlier code as an arm, and bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from gigagan_jax.config import from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.shapes import ShapesSource
from gigagan_jax.data.sources.tar import TarSource
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

import ablate
import ablate_checkout
import ablate_report

TINY = """
seeds = [0, 1]
[tables.settings]
title = "Settings"
config = "configs/shapes.py:tiny"
flags = ["--config.total_kimg=0.032"]
[[arms]]
name = "baseline"
table = "settings"
title = "as it is"
[[arms]]
name = "sum"
table = "settings"
title = "R1 of the sum"
flags = ["--config.loss.r1_exits=sum"]
"""


@pytest.fixture
def arms(tmp_path):
    file = tmp_path / "arms.toml"
    file.write_text(TINY)
    return ablate.read_arms(file)[0]


def result(arm, seed, **metrics):
    return {"arm": arm, "seed": seed, "metrics": {f"shapes/{k.replace('__', '/')}": v for k, v in metrics.items()}}


def test_an_arm_in_two_tables_is_trained_once(tmp_path):
    again = '\n[[arms]]\nname = "small"\ntable = "settings"\ntitle = "again"\nresults_of = "NAME"\n'
    file = tmp_path / "two.toml"
    file.write_text(TINY + again.replace("NAME", "baseline"))
    arms, seeds = ablate.read_arms(file)
    missing = ablate.missing_runs(arms, seeds, tmp_path / "none.jsonl")
    assert [(arm.name, seed) for arm, seed in missing] == [("baseline", 0), ("sum", 0), ("baseline", 1), ("sum", 1)]
    table = ablate_report.format_tables(arms, [result("baseline", 0, seen__shape=0.75)])
    assert [line.split(" | ")[:3] for line in table.splitlines()[4:]] == [
        ["| as it is", "1", "0.75"],
        ["| again", "1", "0.75"],
    ]
    for other in ("sum", "nothing", "small"):
        file.write_text(TINY + again.replace("NAME", other))
        with pytest.raises(UserError, match="results_of of small must name an arm with the same settings"):
            ablate.read_arms(file)


def test_the_arms_of_the_project_are_configs():
    arms, seeds = ablate.read_arms()
    assert len({arm.name for arm in arms}) == len(arms)
    assert len(seeds) == 3
    configs = {arm.name: ablate.load_config(arm.config, arm.flags) for arm in arms}
    # No two arms train the same thing, but the baseline stands in both tables.
    settings = {str(c) for name, c in configs.items() if not {a.name: a.checkout for a in arms}[name]}
    assert len(settings) == len(arms) - 2
    assert all(c.evaluators == ("shapes",) for c in configs.values())


def test_what_is_missing_comes_seed_by_seed(arms, tmp_path):
    results = tmp_path / "runs.jsonl"
    missing = ablate.missing_runs(arms, (0, 1), results)
    arm, seed = next(missing)
    assert (arm.name, seed) == ("baseline", 0)
    # Another process has ended this one in the meantime.
    results.write_text(json.dumps(result("sum", 0)) + "\n")
    arm, seed = next(missing)
    assert (arm.name, seed) == ("baseline", 1)
    results.write_text("".join(json.dumps(result(a.name, s)) + "\n" for a in arms for s in (0, 1)))
    assert list(missing) == []


def test_table_has_mean_and_spread(arms):
    runs = [result("baseline", s, seen__pair=v) for s, v in enumerate((0.8, 0.9, 1.0))]
    table = ablate_report.format_tables(arms, runs)
    title, _, head, _, row = table.split("\n")
    assert title == "### Settings"
    column = head.split(" | ").index("shape and color")
    assert row.split(" | ")[column] == "0.90 (0.20)"
    assert row.startswith("| as it is | 3 |")
    one = ablate_report.format_tables(arms, [result("sum", 0, frechet=3.14159)])
    assert "| R1 of the sum | 1 |" in one
    assert "| 3.1 |" in one


def test_bold_is_what_no_seed_of_the_first_row_reaches(arms):
    first = [result("baseline", s, seen__pair=v, frechet=20 + v) for s, v in enumerate((0.8, 0.9, 1.0))]
    for values, bold in (
        ((0.5, 0.6, 0.79), True),
        ((1.01, 1.1, 1.2), True),
        ((0.5, 0.6, 0.8), False),
        ((0.5, 0.6), False),
    ):
        runs = first + [result("sum", s, seen__pair=v, frechet=21) for s, v in enumerate(values)]
        assert (ablate_report.format_tables(arms, runs).count("**") == 2) == bold, values


def test_picture_has_every_seed(arms):
    runs = [result("baseline", s, seen__pair=v, frechet=v) for s, v in enumerate((0.5, 0.75, 1.0))]
    picture = np.asarray(ablate_report.draw_picture(arms, runs))
    blue = (picture == ablate_report._POINT).all(axis=2)
    # Two panels with three points each, as far apart as the values are.
    columns = np.flatnonzero(blue.any(axis=0))
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    # The bar of the mean lies over the point in the middle and parts it.
    centres = [g.mean() for g in groups]
    assert len(groups) == 8
    panel = [centres[0], (centres[1] + centres[2]) / 2, centres[3]]
    assert panel[1] - panel[0] == pytest.approx(panel[2] - panel[1], abs=2)


def test_earlier_code_gets_the_same_scenes_and_settings(arms, tmp_path, monkeypatch):
    config = ablate.load_config(arms[1].config, arms[1].flags)
    arm = ablate.Arm("old", "settings", "old", arms[1].config, arms[1].flags, "f7546c6")
    (tmp_path / "checkout-f7546c6").mkdir()
    (tmp_path / "checkout-f7546c6.done").touch()
    monkeypatch.setattr(ablate_checkout, "_SCENES", 30)
    root, file = ablate_checkout.prepare(arm, config, tmp_path, ROOT)
    assert root == tmp_path / "checkout-f7546c6"
    # Here the present code stands for the earlier one: nothing may be lost.
    again = ablate.load_config(str(file), ())
    assert again.data.source == "tar"
    assert again.generator == config.generator
    assert again.discriminator == config.discriminator
    assert again.loss == config.loss
    assert (again.evaluators, again.total_kimg) == ((), 0.032)
    tars = sorted(Path(again.data.path).parent.glob("*.tar"))
    assert [p.name for p in tars] == ["00000.tar"]
    # The runs of other seeds find them.
    written = tars[0].stat().st_mtime_ns
    assert ablate_checkout.prepare(arm, config, tmp_path, ROOT) == (root, file)
    assert tars[0].stat().st_mtime_ns == written
    read, drawn = TarSource(again.data.path), ShapesSource(config.data.shapes)
    assert len(read) == 30
    for i in (0, 7, 29):
        example = read[i]
        assert example.captions == drawn.captions(i)
        np.testing.assert_array_equal(example.image, drawn[i].image)


def test_fields_that_earlier_code_lacks_are_left_out():
    text = ablate_checkout._CONFIG.format(config="x", values={"seed": 7, "generator.future": 1, "future.group.key": 2})
    scope = {}
    exec(text, scope)
    assert from_dict(scope["get_config"]()).seed == 7


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run"], "run needs --workdir=DIR"),
        (["run", "--workdir=x", "--only=nothing"], "there is no arm nothing; known: baseline"),
        (["table", "--results=none.jsonl"], "none.jsonl has no results of these arms"),
        (["table", "--arms=none.toml"], "none.toml is no file of arms"),
    ],
)
def test_bad_input(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        ablate.verb(arguments)


def test_a_damaged_result_is_named(tmp_path):
    results = tmp_path / "runs.jsonl"
    results.write_text(json.dumps(result("sum", 0)) + "\n{}\n")
    with pytest.raises(UserError, match="line 2 is no result of a run; remove it"):
        ablate.read_results(results)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('flags = ["--config.loss.r1_exits=sum"]', 'flags = "--config.x=1"', "must be a list of --config.key=value"),
        ('name = "sum"', 'name = "baseline"', "two arms are called baseline"),
        ("title =", "heading =", "is no file of arms: KeyError"),
    ],
)
def test_arms_that_are_none(old, new, words, tmp_path):
    (tmp_path / "arms.toml").write_text(TINY.replace(old, new))
    with pytest.raises(UserError, match=words):
        ablate.read_arms(tmp_path / "arms.toml")


def test_output_that_cannot_be_written_is_found_first(tmp_path):
    results = tmp_path / "runs.jsonl"
    results.write_text(json.dumps(result("baseline", 0, frechet=1.0)) + "\n")
    for out, words in ((tmp_path / "x", "name a .png"), (tmp_path / "none" / "x.png", "cannot be written")):
        with pytest.raises(UserError, match=words):
            ablate.verb(["picture", f"--results={results}", f"--out={out}"])
    results.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        ablate.verb(["table", f"--results={results}"])


@pytest.mark.slow
def test_runs_are_trained_once(tmp_path, capsys):
    (tmp_path / "arms.toml").write_text(TINY)
    flags = [f"--arms={tmp_path / 'arms.toml'}", f"--results={tmp_path / 'runs.jsonl'}"]
    command = ["run", *flags, f"--workdir={tmp_path / 'runs'}"]
    assert ablate.verb([*command, "--only=sum"]) == 0
    runs = ablate.read_results(tmp_path / "runs.jsonl")
    assert [(run["arm"], run["seed"]) for run in runs] == [("sum", 0), ("sum", 1)]
    assert all(run["metrics"]["grad_norm/g"] > 0 for run in runs)
    trained = sorted(Path(tmp_path / "runs").iterdir())
    assert ablate.verb([*command, "--only=sum"]) == 0
    assert sorted(Path(tmp_path / "runs").iterdir()) == trained
    capsys.readouterr()
    assert ablate.verb(["table", *flags]) == 0
    assert "R1 of the sum | 2" in capsys.readouterr().out


def test_a_commit_that_is_not_here_is_named(arms, tmp_path):
    arm = ablate.Arm("old", "settings", "old", arms[0].config, arms[0].flags, "0" * 40)
    config = ablate.load_config(arm.config, arm.flags)
    with pytest.raises(UserError, match="arm old: git cannot check out 0000"):
        ablate_checkout.prepare(arm, config, tmp_path, ROOT)

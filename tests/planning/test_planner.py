"""The planner: names of machines, the compiler of a TPU that is not here, sweeps that go on, words for people."""

import copy
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gigagan_jax.core.errors import UserError
from gigagan_jax.planning import collectives, compile, html_report, sweep, text_report, topology
from gigagan_jax.planning.hlo import HloModule
from tools import plan as verb

DIGITS = "--config=configs/digits.py:tiny"


# ---------------------------------------------------------------- machines


@pytest.mark.parametrize(
    "text, name, chips",
    [
        ("v5p:4x4x8", "v5p:4x4x8", 128),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-16", "v5p:2x2x2", 8),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-512", "v5p:4x8x8", 256),
        ("v5p-8192", "v5p:16x16x16", 4096),
        ("v4-64", "v4:2x4x4", 32),
        ("v5e-8", "v5e:2x4", 8),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-16", "v5e:4x4", 16),
        ("V6E-256", "v6e:16x16", 256),
        ("h100:8x4", "h100:8x4", 32),
        ("gpu:h100x8", "h100x8", 8),
        ("a100:8", "a100:8", 8),
    ],
)
def test_names_of_machines(text, name, chips):
    found = topology.parse_topology(text)
    assert (found.name, found.chips) == (name, chips)
    assert found.is_tpu == text.lower().startswith("v")


@pytest.mark.parametrize(
    "text, words",
    [
        ("v5p", "write v5p:4x4x8"),
        ("v7x:2x2", "unknown chip 'v7x'"),
        ("v5p-96", "two a chip"),
        ("v5p-7", "powers of two"),
        ("v5e-0", "every size is positive"),
        ("h100:8x4x2", "GPUs a node x nodes"),
    ],
)
def test_names_that_are_none(refused, text, words):
    refused(lambda: topology.parse_topology(text), text, words)


def test_slices(refused):
    assert topology.parse_topology("v5p-128", 4).chips == 256
    assert topology.parse_topology("v5p-128", 4).title == "4 slices of v5p:4x4x4"
    refused(lambda: topology.parse_topology("v5p-128", 0), "--slices=0")
    refused(lambda: topology.parse_topology("h100:8", 2), "h100:8x2")


# ---------------------------------------------------------------- the real compiler


def compile_program(function, *args):
    with compile._jax_options(**compile.NO_CACHE_OPTIONS):
        return jax.jit(function).lower(*args).compile()


@pytest.fixture(scope="module")
def scanned():
    """A product of eight matrices, sharded as fsdp does, compiled for four v5e chips."""
    where = topology.topology_devices(topology.parse_topology("v5e:2x2"))
    mesh = Mesh(np.array(where), ("fsdp",))

    def spec(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def products(x, stack):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]

    return compile_program(products, spec((4096, 1024), "fsdp"), spec((8, 1024, 1024), None, "fsdp"))


def test_loops_and_exchanges_of_a_real_program(scanned):
    module = HloModule(scanned.as_text())
    runs = list(module.executed_instructions())
    assert module.unknown_loops == []
    (loop,) = (r for r in runs if r.instruction.opcode == "while")
    assert module.trip_count(loop.computation, loop.instruction) == 8
    (gather,) = collectives.find_collectives(module, [0] * 4)
    assert (gather.kind, gather.group_size, gather.times) == ("all-gather", 4, 8)
    assert gather.bytes_sent == 0.75 * 1024 * 1024 * 2
    # The compiler's estimate is within what the matrix units can do, and not far from it.
    products = sum(
        r.instruction.estimated_cycles * r.times
        for r in runs
        if r.instruction.uses_matrix_units and r.instruction.estimated_cycles
    )
    at_peak = 8 * 2 * 1024**3 / 197e12
    assert 1.0 < products / 1.5e9 / at_peak < 2.0


def test_the_compiler_itself_counts_a_body_once(scanned):
    """Why its own figures are not the headline; a release that mends this should be noticed."""
    assert scanned.cost_analysis()["flops"] == pytest.approx(2 * 1024**3, rel=0.05)


def test_the_compilers_answers_to_impossible_slices(refused):
    refused(lambda: topology.topology_devices(topology.parse_topology("v5p:9x9x9")), "v5p:9x9x9", "knows no such slice")


def test_a_program_that_does_not_fit():
    """The compiler's words for it are read; a release with other words should be noticed."""
    device = topology.topology_devices(topology.parse_topology("v5e:2x2"))[0]
    x = jax.ShapeDtypeStruct((65536, 65536), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        compile_program(lambda x: x @ x.T, x)
    assert compile._required_bytes(" ".join(str(caught.value).split()), {"parameters": 2**30}) == 33 * 2**30
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 120.50G of 94.75G hbm. Exceeded"
    assert compile._required_bytes(older, {"parameters": 1}) == int(120.5 * 2**30)
    assert compile._required_bytes("something else", {}) is None
    assert topology.parse_topology("v5e-8").usable_bytes == int(15.75 * 2**30)


# ---------------------------------------------------------------- sweeps


def test_a_grid(refused):
    assert sweep.parse_grid("mesh.fsdp:1,8; config.batch_size:64") == [
        {"mesh.fsdp": "1", "batch_size": "64"},
        {"mesh.fsdp": "8", "batch_size": "64"},
    ]
    for text in ("mesh.fsdp", "mesh.fsdp:", ":1", ";", "a:1;a:2"):
        refused(lambda text=text: sweep.parse_grid(text), "mesh.fsdp" if text != "a:1;a:2" else "a comes twice")


def make_row(speed, fits=True):
    step = {"memory": {"total": 2**30}}
    return {
        "fits": fits,
        "seconds": 1 / speed,
        "share_of_peak": 0.5,
        "images_per_second_per_chip": speed,
        "bytes_sent": 1,
    } | {"steps": {"without_r1": step}}


def test_an_interrupted_sweep_goes_on(tmp_path):
    file, done, interrupted = tmp_path / "sweep.json", [], []

    def run(point):
        n = int(point["n"])

        def work():
            if n == 3 and not interrupted:
                interrupted.append(n)
                raise KeyboardInterrupt
            done.append(n)
            return make_row(speed=[4.0, 9.0, 5.0, 1.0][n], fits=n != 1)

        if n == 4:
            raise UserError("no such mesh")
        return f"key{n}", work

    points = sweep.parse_grid("n:0,1,2,3,4")
    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(points, run, file)
    assert done == [0, 1, 2]
    rows = sweep.run_sweep(points, run, file)
    assert done == [0, 1, 2, 3]
    text = sweep.format_sweep(rows)
    assert "best: --config.n=2 (5.00 images/s a chip" in text  # the fastest does not fit
    assert "no such mesh" in text
    assert [r["key"] for r in json.loads(file.read_text())["sweep"]] == ["key0", "key1", "key2", "key3"]


def test_a_key_knows_what_a_plan_depends_on(tiny):
    where, settings = topology.parse_topology("v5e-16"), compile.CompileSettings()
    key = sweep.plan_key(tiny, where, settings)
    assert key == sweep.plan_key(copy.deepcopy(tiny), where, settings)
    assert key != sweep.plan_key(dataclasses.replace(tiny, batch_size=32), where, settings)
    assert key != sweep.plan_key(tiny, topology.parse_topology("v5e-16", 2), settings)
    assert key != sweep.plan_key(tiny, where, dataclasses.replace(settings, with_r1=True))


def test_a_file_that_is_no_sweep(refused, tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    refused(lambda: sweep.read_plans(tmp_path / "x.json"), "x.json", "not the result of a sweep")


# ---------------------------------------------------------------- what people see


@pytest.fixture
def made(tiny):
    """A plan with both steps, of made-up figures."""

    def step(seconds, exchanges):
        return {
            "flops": 4.59e12,
            "seconds_at_peak": 0.01,
            "fits": True,
            "memory": {"parameters": 3 * 2**30, "temporary": 5 * 2**30, "total": 8 * 2**30},
            "seconds": seconds,
            "seconds_of_operations": seconds - 0.002,
            "seconds_by_cycles": seconds + 0.001,
            "seconds_of_matrix_units": seconds / 2,
            "seconds_of_communication": 0.003,
            "seconds_hidden": 0.001,
            "seconds_optimal": None,
            "share_of_peak": 0.01 / seconds,
            "bytes_accessed": 1e9,
            "loops_of_unknown_length": 0,
            "collectives": exchanges,
            "modules": [
                {"module": "generator/<4px>", "seconds": 0.02, "share": 0.4, "forward": 0.02, "recomputed": 0.0}
            ]
            + [
                {"module": f"other{n}", "seconds": 0.01, "share": 0.1, "forward": 0.01, "recomputed": 0.0}
                for n in range(20)
            ],
            "parts": {"clip_loss": seconds},
            "seconds_to_trace": 1.0,
            "seconds_to_compile": 90.0,
        }

    exchange = {"kind": "all-reduce", "network": "inside a slice", "bytes_sent": 1.8e9, "bytes_overlapped": 0.6e9}
    exchange |= {"exchanges": 7, "largest_group": 4, "seconds": 0.003, "seconds_overlapped": 0.001}
    steps = {"without_r1": step(0.05, [exchange]), "with_r1": step(0.21, [exchange])}
    for s in steps.values():
        for m in s["modules"]:
            m["backward"] = 0.0
    where = topology.parse_topology("v5p-8")
    about = {"config": "made", "topology": where.title, "asked": "v5p-8", "chip": "v5p", "chips": 4, "slices": 1}
    about |= {
        "mesh": {"data": 4, "fsdp": 1},
        "batch_size": 16,
        "micro_batches": 1,
        "jax": "0",
        "libtpu": "0",
        "effort": -1.0,
    }
    about |= {"parameters": {"generator": 10**6}, "bytes_of_chip": 95 * 2**30, "compiled": True, "steps": steps}
    return about | compile._combine_steps(tiny, where, steps)


def test_steps_with_and_without_r1_in_their_proportion(made):
    assert made["r1_interval"] == 16
    assert made["seconds"] == pytest.approx((15 * 0.05 + 0.21) / 16)
    assert made["images_per_second_per_chip"] == pytest.approx(16 / made["seconds"] / 4)
    assert made["images_per_day"] == pytest.approx(16 / made["seconds"] * 86400)
    assert made["seconds_to_compile"] == 180.0


def test_a_run_with_r1_in_each_step_has_no_other_step(tiny, made):
    each = dataclasses.replace(tiny, loss=dataclasses.replace(tiny.loss, r1_interval=1))
    headline = compile._combine_steps(each, topology.parse_topology("v5p-8"), {"with_r1": made["steps"]["with_r1"]})
    assert headline["seconds"] == pytest.approx(0.21)
    assert headline["bytes_sent"] == 1.8e9
    text = text_report.format_plan(made | headline | {"steps": {"with_r1": made["steps"]["with_r1"]}})
    assert "The step with R1 (one in 1)" in text


def test_the_report(made):
    text = text_report.format_plan(made)
    for part in (
        "8.000",
        "8.42 %",
        "all-reduce",
        "1,800.0",
        "33.3 %",
        "generator/<4px>",
        "fits: 8.00 GiB of 95.00 GiB",
    ):
        assert part in text
    assert "compiled in 90 s at effort -1" in text
    assert "other8" in text
    assert "other9" not in text  # ten in all
    del made["steps"]["with_r1"]
    assert "--with-r1 adds it" in text_report.format_plan(made)


def test_a_step_that_found_no_room(made, tiny):
    lost = {"flops": 1e12, "seconds_at_peak": 0.1, "fits": False, "memory": {"total": 2**37}, "why": "Used 128G of 95G"}
    made["steps"] = {"without_r1": lost}
    made = {k: v for k, v in made.items() if k not in ("seconds", "share_of_peak", "seconds_to_compile")}
    made |= compile._combine_steps(tiny, topology.parse_topology("v5p-8"), made["steps"])
    assert not made["fits"]
    assert "DOES NOT FIT: 128.00 GiB of 95.00 GiB" in text_report.format_plan(made)
    assert "**does not fit**<br>128.0 of 95 GiB" in text_report.markdown_table([made])
    assert "Used 128G of 95G" in html_report.render_page(made)


def test_the_page(made):
    text = html_report.render_page(made)
    assert "generator/&lt;4px&gt;" in text
    assert "<4px>" not in text
    assert "http" not in text
    for part in ("5.00 GiB", "1,800 MB", "40.0 %", "with R1"):
        assert part in text


def test_the_table_is_made_from_files(made, tmp_path, capsys):
    other = made | {"asked": "v5e-16", "topology": "v5e:4x4"}
    (tmp_path / "a.json").write_text(json.dumps(made))
    (tmp_path / "b.json").write_text(json.dumps({"sweep": [other]}))
    assert verb.verb(["table", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    head, rule, line = capsys.readouterr().out.splitlines()
    assert head == "| config | v5p-8 (2x2x1) | v5e-16 (4x4) |"
    assert rule == "| --- | --- | --- |"
    assert line.startswith(
        "| `made` | fits<br>8.0 of 95 GiB<br>60 ms<br>16.7 % of peak<br>compiled in 3.0 min<br>batch 16, data=4 |"
    )


def test_plans_of_one_place_share_a_cell(made):
    other = made | {"asked": "v5p:4x4x4" if made["asked"] != "v5p:4x4x4" else "v5p-128", "mesh": {"data": 2, "fsdp": 2}}
    table = text_report.markdown_table([made, other]).splitlines()
    assert len(table) == 3
    assert table[0].count("|") == 3
    assert "<br>or<br>" in table[2]
    assert "data=2 fsdp=2" in table[2]


def test_the_tables_of_the_docs_are_those_of_the_plans():
    root = Path(__file__).parents[2]
    plans = lambda name: [json.loads(line) for line in (root / "docs" / name).read_text().splitlines()]
    page = (root / "docs" / "planning.md").read_text()
    assert text_report.markdown_table(plans("plans.jsonl")) in page
    assert text_report.scaling_table(plans("plans_scaling.jsonl")) in page


def test_compact_lines_give_the_same_tables(made, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(made))
    assert verb.verb(["compact", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    (tmp_path / "a.jsonl").write_text(capsys.readouterr().out)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2
    assert "generator/<4px>" not in (tmp_path / "a.jsonl").read_text()
    tables = []
    for files in (["a.json", "a.json"], ["a.jsonl"]):
        assert verb.verb(["table", *(str(tmp_path / name) for name in files)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


def test_the_table_of_more_and_more_chips(made, tmp_path, capsys):
    more = made | {"asked": "v5p-16", "topology": "v5p:2x2x2", "chips": 8, "seconds": made["seconds"] * 1.1}
    for name, plan in (("a", made), ("b", more)):
        (tmp_path / f"{name}.json").write_text(json.dumps(plan))
    assert verb.verb(["table", "--scaling", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert "| 4 | 16 | 8.00 GiB | 1,800 MB (+0.0 %) | 60 ms (+0.0 %) |" in first
    assert "| 8 | 16 | 8.00 GiB | 1,800 MB (+0.0 %) | 66 ms (+10.0 %) |" in second


# ---------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The digits' step, compiled for four v5e chips by the verb: (its result, the folder of its files)."""
    folder = tmp_path_factory.mktemp("plan")
    files = [f"--json={folder / 'plan.json'}", f"--html={folder / 'plan.html'}"]
    assert verb.verb([DIGITS, "--topology=v5e-4", *files]) == 0
    return json.loads((folder / "plan.json").read_text()), folder


@pytest.mark.slow
def test_a_tpu_is_planned(planned):
    found, folder = planned
    assert (found["topology"], found["asked"], found["chips"]) == ("v5e:2x2", "v5e-4", 4)
    step = found["steps"]["without_r1"]
    assert found["fits"]
    assert step["memory"]["parameters"] == 4 * sum(found["parameters"].values())
    # beta1 is 0: one moment a parameter, whole or cut over the chips, and two counters.
    assert 0.25 <= step["memory"]["optimizer"] / step["memory"]["parameters"] < 1.01
    assert step["memory"]["total"] == sum(v for k, v in step["memory"].items() if k != "total")
    assert step["loops_of_unknown_length"] == 0
    # Gradients of all parameters are summed over the chips, in float32 or less.
    sent = sum(row["bytes_sent"] for row in step["collectives"])
    assert 0.5 < sent / (1.5 * step["memory"]["parameters"]) < 2.0
    names = {row["module"].split("/")[0] for row in step["modules"]}
    assert {"generator", "discriminator", "step"} <= names
    assert any(row["module"].startswith("generator/8px/SynthesisBlock") for row in step["modules"])
    assert sum(row["seconds"] for row in step["modules"]) == pytest.approx(step["seconds_of_operations"])
    assert any(row["backward"] > row["forward"] > 0 for row in step["modules"])
    assert "of peak" in text_report.format_plan(found)
    assert "generator/8px" in (folder / "plan.html").read_text()


def test_gpus_are_planned_as_far_as_is_possible(capsys, tmp_path):
    file, html = tmp_path / "plan.json", tmp_path / "plan.html"
    arguments = [DIGITS, "--topology=h100:8", "--batch=32", f"--json={file}", f"--html={html}"]
    assert verb.verb(arguments) == 0
    out = capsys.readouterr()
    assert "Not known without the GPU" in out.out
    assert "tracing the step ..." in out.err
    found = json.loads(file.read_text())
    assert (found["batch_size"], found["chips"], found["compiled"]) == (32, 8, False)
    assert found["steps"]["without_r1"]["flops"] > 0
    assert found["steps"]["without_r1"]["memory"]["parameters"] > 0
    assert "Not known without the GPU" in html.read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([DIGITS, "--topology=v5p"], "write v5p:4x4x8"),
        ([DIGITS, "--topology=h100:8", "--batch=12"], "does not divide over 8 devices"),
        ([DIGITS, "--topology=h100:8", "--effort=2"], "--effort=2: from -1"),
        ([DIGITS, "--topology=h100:8", "--sweep=batch_size"], "write FIELD:VALUE"),
        ([DIGITS, "--topology=h100:8", "--sweep=batch_size:32", "--html=x.html"], "--html is of one plan"),
        ([DIGITS, "--topology=h100:8", "--json=no/such/folder/x.json"], "cannot be written"),
        ([DIGITS, "--topology=h100:8", "--r1"], "unknown argument --r1"),
        (["table", "no_such_file.json"], "no_such_file.json is not a result of plan.py"),
    ],
)
def test_bad_input(refused, arguments, words):
    refused(lambda: verb.verb(arguments), words)


def test_a_sweep_says_which_points_are_none(capsys, tmp_path):
    arguments = [DIGITS, "--topology=h100:8", "--sweep=batch_size:12,16", f"--json={tmp_path / 's.json'}"]
    assert verb.verb(arguments) == 0
    out = capsys.readouterr()
    assert "does not divide over 8 devices" in out.out
    assert verb.verb(arguments) == 0
    assert "as found before" in capsys.readouterr().err


@pytest.mark.parametrize("effort", [-1.0, -0.5, -0.3, -0.25, -0.1, 0.0, 0.5])
def test_a_level_searches_for_windows_where_its_effort_does(monkeypatch, effort):
    """jax 0.11 has levels in the place of efforts; those from O2 on search."""
    monkeypatch.setattr(compile.jax, "config", type("Config", (), {"jax_optimization_level": "UNKNOWN"})())
    (name, level), *_ = compile._effort_option("exec_time_optimization", effort).items()
    assert name == "jax_optimization_level"
    assert (level >= "O2") == compile.CompileSettings(effort=effort).searches_windows

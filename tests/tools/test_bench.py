"""tools/bench.py: what it feeds the step, its budget, a kill, memory that runs out, and the whole of it at toy size."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigagan_jax.cli import load_config
from gigagan_jax.parallel import sharding
from gigagan_jax.training.batch import abstract_batch, batch_shardings
from gigagan_jax.training.mismatched_captions import draw_wrong_captions

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))  # as for a script there

import bench_inputs  # noqa: E402
import bench_measure  # noqa: E402
import bench_output  # noqa: E402

SCRIPT = ROOT / "tools" / "bench.py"
# What a lent machine has: jax, flax, optax, orbax, torch, transformers, ml_collections.
ABSENT = (
    "grain",
    "tensorflow",
    "tensorflow_datasets",
    "PIL",
    "sklearn",
    "skimage",
    "pyarrow",
    "array_record",
    "tensorboardX",
    "fsspec",
    "webdataset",
)


@pytest.fixture
def toy(tmp_path):
    """A config with a toy CLIP without weights, and the mesh of one device."""
    path = bench_inputs.write_tiny_clip(tmp_path)
    config = load_config(str(ROOT / "configs/laion.py:tiny"), [f"--config.text.path={path}"])
    return config, sharding.make_mesh(config.mesh, jax.devices()[:1])


def batch_of(config, mesh):
    return bench_inputs.synthetic_batch(config, batch_shardings(config, mesh))


def agrees(batch, config):
    """The batch is what the step expects."""
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}
    assert shapes == abstract_batch(config)


@pytest.mark.parametrize("encoder", ["bytes", "clip"])
def test_every_caption_of_a_synthetic_batch_has_a_valid_wrong_one(toy, encoder):
    config, mesh = toy
    if encoder == "bytes":
        config = load_config(str(ROOT / "configs/laion.py:tiny"), [])
    batch = batch_of(config, mesh)
    agrees(batch, config)
    t = jax.random.normal(jax.random.key(0), (config.batch_size, 5))
    group = config.loss.mismatch_group
    wrong, valid = draw_wrong_captions(jax.random.key(1), t, batch["tokens"], batch["label"], group)
    assert valid.all()
    assert (jnp.abs(wrong - t).max(axis=1) > 0).all()


def test_stored_embeddings_are_floats_in_the_precision_of_the_step(toy):
    config, mesh = toy
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, embeddings="anywhere"), dtype="bfloat16")
    batch = batch_of(config, mesh)
    agrees(batch, config)
    assert batch["features"].dtype == jnp.bfloat16
    assert batch["clip_text"].dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(batch["clip_text"], axis=1), 1.0, rtol=1e-5)
    assert float(jnp.std(batch["features"].astype(jnp.float32))) > 0.5


def test_a_class_conditional_batch_has_classes(toy):
    config = load_config(str(ROOT / "configs/imagenet.py:tiny"), [])
    batch = batch_of(config, toy[1])
    agrees(batch, config)
    assert 0 <= batch["label"].min() <= batch["label"].max() < config.class_count


def test_random_frozen_networks_are_finite_and_placed(toy):
    from gigagan_jax.models.pretrained.frozen import FrozenNetworks

    config, mesh = toy
    frozen = FrozenNetworks(config)
    params = bench_inputs.random_frozen(frozen, mesh)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(params) == shapes(frozen.abstract())
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, params, frozen.shardings(mesh))))
    batch = batch_of(config, mesh)
    said = jax.jit(frozen.encode_captions)(params, batch["tokens"])
    assert all(jnp.isfinite(x).all() and float(jnp.std(x.astype(jnp.float32))) > 0 for x in said.values())


def test_laion_is_known_without_a_download(monkeypatch, tmp_path):
    from gigagan_jax.models.pretrained.frozen import FrozenNetworks

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    frozen = FrozenNetworks(load_config(str(ROOT / "configs/laion.py"), []))
    assert bench_inputs.without_files(frozen) == ["openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"]
    counts = {role: tower.module.count() for role, tower in frozen.towers.items()}
    # Of the published weights: ViT-L/14's text and vision towers with their projections, ViT-B/32's vision tower.
    assert counts["text"] == 123_650_304
    assert counts["clip_image"] == 303_966_209
    assert counts["vision_aided"] == 87_849_217


def test_discs_are_captioned():
    # Bytes, which can be read back.
    config = load_config(str(ROOT / "configs/digits.py"), ["--config.text.encoder=bytes", "--config.text.length=40"])
    (first, again) = bench_inputs.discs(config, 1), bench_inputs.discs(config, 1)
    agrees({k: jnp.asarray(x) for k, x in first[0].items()}, config)
    assert all((first[0][k] == again[0][k]).all() for k in first[0])
    text = bytes(int(t) - 3 for t in first[0]["tokens"][0] if t > 2).decode()
    _, _, disc, _, _, ground = text.split()
    image = first[0]["image"][0]
    assert tuple(image[0, 0]) == bench_inputs.COLOURS[ground]
    assert (image == np.uint8(bench_inputs.COLOURS[disc])).all(-1).any()


# ---------------------------------------------------------------- measuring


def program(name, run):
    return bench_measure.Program(name, run, 1, 0, [], {})


def test_programs_take_turns():
    order = []
    programs = [program(name, lambda name=name: order.append(name)) for name in "AB"]
    times = bench_measure.take_turns(dict(zip(programs, (2, 1), strict=True)), 3)
    assert "".join(order) == "AB" + "AAB" * 3  # each once to warm up
    assert [len(v) for v in times.values()] == [3, 3]


def test_turns_end_when_the_budget_does():
    times = bench_measure.take_turns({program("A", lambda: None): 1}, 100, lambda longest: longest > 0)
    assert len(times["A"]) == 1


def test_a_run_takes_a_second():
    quick, slow = program("quick", lambda: None), program("slow", lambda: time.sleep(0.2))
    assert bench_measure.calls_of_a_run(quick) == 20
    assert 3 <= bench_measure.calls_of_a_run(slow) <= 5


def test_a_spread_has_quartiles():
    assert bench_output.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "median": 3.0,
        "min": 1.0,
        "max": 5.0,
        "quartiles": [2.0, 4.0],
        "runs": 5,
    }
    assert bench_output.spread([2.0])["quartiles"] == [2.0, 2.0]


def test_compiling_is_split_up():
    compiled, seconds = bench_measure.compile_split(
        lambda: jax.jit(lambda x: jnp.tanh(x) @ x).lower(jnp.ones((8, 8))).compile()
    )
    assert compiled(jnp.ones((8, 8))).shape == (8, 8)
    assert set(seconds) == {"tracing", "lowering", "compiling"}
    assert min(seconds.values()) > 0


def exhausted(size):
    """What a device raises for more memory than there is: really asked for."""
    return jax.block_until_ready(jax.jit(lambda: jnp.ones((size, 2**50), jnp.int8))())


def test_a_device_without_enough_memory_is_known():
    with pytest.raises(Exception) as caught:  # noqa: PT011  (of JAX's own type, or a MemoryError)
        exhausted(4)
    assert bench_measure.out_of_memory(caught.value)
    assert not bench_measure.out_of_memory(RuntimeError("INVALID_ARGUMENT: shapes"))


def test_out_of_memory_halves_the_batch_once():
    cleaned = []
    job = lambda batch: "done" if batch <= 4 else exhausted(batch)
    done = bench_measure.with_memory(job, 8, 1, lambda: cleaned.append(1))
    assert (done.result, done.batch, len(done.notes), len(cleaned)) == ("done", 4, 1, 1)
    assert "out of memory at batch 8" in done.notes[0]

    given_up = bench_measure.with_memory(job, 32, 1, lambda: cleaned.append(1))
    assert given_up.result is None
    assert [n.split(":")[0] for n in given_up.notes] == ["out of memory at batch 32", "out of memory at batch 16"]

    uneven = bench_measure.with_memory(job, 10, 2, lambda: None)
    assert uneven.result is None
    assert uneven.notes[-1] == "batch 5 does not divide over the devices"


def test_other_errors_are_not_taken_for_memory():
    def job(batch):
        raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        bench_measure.with_memory(job, 8, 1, lambda: None)


def test_a_budget_admits_what_fits():
    now = [0.0]
    budget = bench_measure.Budget(10.0, lambda: now[0])
    now[0] = 4.0
    assert (budget.left, budget.fits(6.0), budget.fits(6.1)) == (6.0, True, False)
    assert bench_measure.Budget(None).fits(1e9)


# ---------------------------------------------------------------- the command


def command(*arguments, cwd=ROOT, before=(), **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, *before, str(SCRIPT), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "--config"),
        (("--config=configs/nowhere.py",), "there is no file"),
        (("--dry", "--steps=0"), "--steps=0"),
        (("--dry", "--budget=-1"), "--budget"),
        (("--dry", "--budget=nan"), "--budget"),
        (("--dry", "--config=configs/digits.py"), "--dry"),
        (("--config=configs/digits.py", "--pin"), "--against"),
        (("--config=configs/digits.py", "--against=nowhere"), "no checkout"),
        (("--config=configs/digits.py", "--train=configs/imagenet.py:tiny", "--budget=9"), "bytes or words"),
        (("--config=configs/digits.py", "--train=configs/digits.py"), "no end"),
        (("--config=configs/digits.py", "--no_such_flag"), "unknown argument"),
        (("--dry", "--json=/nowhere/x.jsonl"), "cannot be written"),
    ],
)
def test_bad_flags_are_one_line(arguments, words, capsys, monkeypatch):
    import bench

    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        bench.cli.main(bench.verb, arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


REFUSE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: not on a lent machine", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = {argv!r}
sys.path.insert(0, {tools!r})
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_dry_runs_every_job_where_only_jax_and_flax_are(tmp_path):
    file = tmp_path / "bench.jsonl"
    argv = [str(SCRIPT), "--dry", "--repeats=3", f"--json={file}"]
    text = REFUSE.format(absent=ABSENT, argv=argv, tools=str(SCRIPT.parent), script=str(SCRIPT))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = {row["job"]: row for row in lines(file)}
    assert list(rows)[:5] == ["facts", "ceilings", "step", "sampling", "step_with_r1"]
    assert list(rows)[5:] == ["turns", "kernels", "training/progress", "training", "end"]
    assert rows["end"]["left_out"] == rows["end"]["failed"] == []

    facts = rows["facts"]
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["frozen"] == "random"
    assert "--xla_backend_optimization_level=0" in facts["flags"]["XLA_FLAGS"]
    assert {"name", "digest", "dtype", "batch"} == set(facts["config"])
    assert rows["ceilings"]["products"]["float32"]["flops_per_second"]["median"] > 0
    for name in ("step", "sampling", "step_with_r1"):
        assert rows[name]["compile_seconds"]["tracing"] > 0
        assert rows[name]["program_bytes"]["arguments"] > 0
    for row in rows["turns"]["results"].values():
        s = row["seconds"]
        assert s["runs"] == 3
        assert s["min"] <= s["quartiles"][0] <= s["median"] <= s["quartiles"][1] <= s["max"]
        assert row["share_of_ceiling"] > 0
    assert rows["turns"]["results"]["step_with_r1"]["flops"] > rows["turns"]["results"]["step"]["flops"]
    for table in rows["kernels"]["results"].values():
        modules = [m["module"] for m in table["modules"]]
        assert any(m.startswith("generator/") for m in modules)
        assert any(m.startswith("discriminator/") for m in modules)
        assert sum(m["share"] for m in table["modules"]) <= 1.001
    assert rows["training"]["steps"] > 1
    assert rows["training"]["finite"]


def test_what_does_not_fit_is_left_out_and_named(tmp_path):
    file = tmp_path / "bench.jsonl"
    process = command("--dry", "--budget=5", f"--json={file}")
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    rows = lines(file)
    left_out = [row["job"] for row in rows if "left_out" in row and row["job"] != "end"]
    assert {"step", "sampling", "step_with_r1", "turns", "kernels", "training"} <= set(left_out)
    assert rows[-1]["left_out"] == left_out
    assert "left out: " in out.splitlines()[-1]


def test_a_killed_bench_keeps_what_was_finished(tmp_path):
    file = tmp_path / "bench.jsonl"
    process = command("--dry", f"--json={file}")
    try:
        while not (file.exists() and file.read_text().count("\n") >= 2):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert [row["job"] for row in lines(file)][:2] == ["facts", "ceilings"]

"""tools/convert_checkpoint.py: what it writes runs with torch alone, in shards or whole, and bad input is one line."""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import laion
from gigagan_jax.checkpoint.manager import Checkpoints, states_equal, with_shardings
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.config import MeshConfig, from_dict, with_fields
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.latents import z_of_seed
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.interop import model_folder
from gigagan_jax.interop.checkpoint_arrays import CheckpointArrays, open_original
from gigagan_jax.interop.torch_check import Check
from gigagan_jax.parallel import sharding
from gigagan_jax.training.state import Networks
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

import convert_checkpoint

RUN = ROOT / "tests" / "fixtures" / "digits"
ALL = "--what=optimizer"


def convert(out, *flags):
    return convert_checkpoint.verb([f"--workdir={RUN}", "--to=pytorch", f"--out={out}", *flags])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "digits"
    assert convert(out, ALL) == 0
    return out


def read(folder, name="model.safetensors"):
    return safetensors.numpy.load_file(folder / name)


def test_the_folder_draws_what_sample_draws_with_torch_and_safetensors_alone(converted):
    model = TextToImage.from_workdir(RUN)
    prompts, seeds = ["the digit 3", "a handwritten seven"], [5, 6]
    expected = model(prompts, seeds)
    np.savez(
        converted.parent / "given.npz",
        z=z_of_seed(np.array(seeds, np.uint32), model.config.generator.z_dim),
    )
    # The lines of the model card, in a process that finds neither jax nor this package.
    (code,) = re.findall(r"```python\n(.*?)```", (converted / "README.md").read_text(), re.DOTALL)
    code = code.replace("torch.randn(1, generator.z_dim)", "torch.from_numpy(given['z'])")
    code = code.replace('["..."]', repr(prompts))
    program = f"""
import sys
sys.modules["jax"] = sys.modules["gigagan_jax"] = None
import numpy as np, torch
given = np.load("../given.npz")
{code}
np.save("../drawn.npy", images[-1].detach().numpy())
"""
    subprocess.run([sys.executable, "-c", program], cwd=converted, check=True)
    drawn = np.moveaxis(np.load(converted.parent / "drawn.npy"), 1, -1)
    drawn = np.clip(np.rint((drawn + 1) * 127.5), 0, 255).astype(int)
    assert np.abs(drawn - expected).max() <= 1
    assert expected.std() > 5


def test_shards_hold_what_one_file_holds(converted, tmp_path):
    assert convert(tmp_path / "cut", "--shard=0.00002", "--memory=1e-9") == 0
    names = sorted(f.name for f in (tmp_path / "cut").glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    whole = read(converted)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    cut = {key: read(tmp_path / "cut", name)[key] for key, name in index["weight_map"].items()}
    assert cut.keys() == whole.keys()
    for key, x in whole.items():
        np.testing.assert_array_equal(cut[key], x)
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "all tensors of the generator are equal" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "cut", check=True)


def test_moments_have_the_names_of_torchs_adam(converted):
    networks = read(converted, "training/discriminator.safetensors")
    moments = read(converted, "training/discriminator_optimizer.safetensors")
    assert {key.removeprefix("exp_avg_sq.") for key in moments} == set(networks)
    assert all(moments[f"exp_avg_sq.{key}"].shape == x.shape for key, x in networks.items())
    counts = json.loads((converted / "training" / "training.json").read_text())
    assert (counts["step"], counts["images"]) == (15, 240)
    assert counts["optimizer_steps"] == {"generator": 15, "discriminator": 15}


def test_a_transposed_tensor_of_the_right_shape_is_seen(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "folder")
    tensors = read(converted)
    key = next(key for key, x in tensors.items() if x.ndim == 2 and x.shape[0] == x.shape[1])
    tensors[key] = np.ascontiguousarray(tensors[key].T)
    safetensors.numpy.save_file(tensors, tmp_path / "folder" / "model.safetensors")
    original = open_original(RUN)
    for memory, message in ((8e9, "differ by"), (0, "is not what the checkpoint has")):
        with pytest.raises(UserError, match=message):
            Check(original, ["average"], "pytorch", memory)(tmp_path / "folder")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--what=weights"], "invalid choice: 'weights'"),
        (["--vision_path=x"], "--vision_path has no meaning with --to"),
        (["--shard=nan"], "--shard=nan must be a positive number"),
        (["--workdir=missing"], "missing"),
        ([f"--input={RUN}"], "needs --workdir=DIR, and no --input"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path):
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), f"--workdir={RUN}", "--to=pytorch"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(converted, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="exists: name a new folder"):
        convert(tmp_path / "mine")
    # A parent that cannot be a folder.
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        convert(tmp_path / "file" / "out")


def test_published_weights_are_converted_too(tmp_path):
    command = [f"--workdir={PUBLISHED}", "--to=pytorch"]
    assert convert_checkpoint.verb([*command, f"--out={tmp_path / 'out'}"]) == 0
    assert "outputs of the generator agree" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="average of G alone"):
        convert_checkpoint.verb([*command, f"--out={tmp_path / 'more'}", "--what=training"])


def test_nothing_half_written_stays_where_the_check_fails(tmp_path):
    def refuse(folder):
        assert (folder / "model.safetensors").exists()
        raise UserError("differs")

    with pytest.raises(UserError, match="differs"):
        model_folder.write_folder(tmp_path / "out", open_original(RUN), ["average"], "pytorch", check=refuse)
    assert not list(tmp_path.iterdir())


PUBLISHED = ROOT / "docs" / "weights" / "digits"


def damage(tmp_path, change, metadata=None):
    """A copy of published weights with changed tensors."""
    folder = tmp_path / "damaged"
    shutil.copytree(PUBLISHED, folder)
    tensors = read(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata=metadata or {"step": "1"})
    return folder


BIAS = "levels/2/entry/conv0/bias"


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t: t.pop(BIAS), None, f"has no {BIAS}"),
        (lambda t: t.pop("w_avg"), None, "has no w_avg"),
        (lambda t: t.update(foo=t[BIAS]), None, "has an unknown foo"),
        (lambda t: t.update({BIAS: t[BIAS][1:]}), None, f"{BIAS} is "),
        (lambda t: t[BIAS].fill(np.nan), None, "differ by nan"),
        (lambda t: None, {"step": "abc"}, "its metadata are damaged"),
        (lambda t: None, {"frozen": "[1]"}, "its metadata are damaged"),
    ],
)
def test_damaged_published_weights_are_one_line(change, metadata, message, tmp_path):
    folder = damage(tmp_path, change, metadata)
    with pytest.raises(UserError, match=re.escape(message)):
        convert_checkpoint.verb([f"--workdir={folder}", "--to=pytorch", f"--out={tmp_path / 'out'}"])
    assert [f.name for f in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("generator.safetensors", "has no generator.safetensors"),
        ("discriminator.safetensors", "has no discriminator.safetensors"),
        ("discriminator_optimizer.safetensors", "has no discriminator_optimizer.safetensors"),
        ("training.json", "has moments and no training.json"),
    ],
)
def test_a_half_copied_folder_is_refused(lost, message, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "folder")
    (tmp_path / "folder" / "training" / lost).unlink()
    with pytest.raises(UserError, match=re.escape(message)):
        back(tmp_path / "folder", tmp_path / "run")


@pytest.mark.parametrize(
    "counts", [{"step": 2**40}, {"images": True}, {"data": 5}, {"frozen": [1]}, {"frozen": {"text": 1}}]
)
def test_counts_that_are_none_are_refused(counts, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "folder")
    file = tmp_path / "folder" / "training" / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | counts))
    with pytest.raises(UserError, match=r"training\.json cannot be read"):
        back(tmp_path / "folder", tmp_path / "run")


def test_tensors_that_are_not_finite_are_refused_on_the_way_back(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "folder")
    tensors = read(converted)
    tensors["mapping.layers.0.bias"][0] = np.inf
    safetensors.numpy.save_file(tensors, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UserError, match=r"mapping\.layers\.0\.bias has values that are not finite"):
        back(tmp_path / "folder", tmp_path / "run")


def test_export_weights_leaves_a_converted_folder_alone(converted):
    before = read(converted)
    with pytest.raises(UserError, match="holds something else"):
        TextToImage.from_pretrained(PUBLISHED).save_pretrained(converted)
    np.testing.assert_array_equal(before["w_avg"], read(converted)["w_avg"])


def test_sigterm_leaves_nothing_half_written(tmp_path):
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT / "tools")!r}, {str(ROOT)!r}]
import convert_checkpoint
from gigagan_jax import cli
from gigagan_jax.interop import model_folder
write = model_folder.write_tensors
def stop(*args, **kwargs):
    yield from write(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGTERM)
model_folder.write_tensors = stop
cli.main(convert_checkpoint.verb, ["--workdir={RUN}", "--to=pytorch", "--out={tmp_path / "out"}"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (143, "stopped by SIGTERM")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointArrays, "read", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        convert(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- and back


def back(folder, out):
    return convert_checkpoint.verb(["--from=pytorch", f"--input={folder}", f"--out={out}"])


def restore(workdir):
    checkpoints = Checkpoints(workdir)
    step = checkpoints.require_valid_step()
    networks = Networks(checkpoints.read_config(step))
    where = networks.shardings(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    state, data = checkpoints.restore(step, with_shardings(networks.abstract(), where))
    return step, state, data


def test_there_and_back_is_the_same_state(converted, tmp_path):
    assert back(converted, tmp_path / "run") == 0
    (step, state, data), (_, expected, position) = restore(tmp_path / "run"), restore(RUN)
    assert (step, data) == (15, position)
    assert states_equal(state, expected)
    assert Checkpoints(tmp_path / "run").read_config(15) == Checkpoints(RUN).read_config(15)
    images = TextToImage.from_workdir(tmp_path / "run")(["the digit 3"], [1])
    np.testing.assert_array_equal(images, TextToImage.from_workdir(RUN)(["the digit 3"], [1]))


@pytest.mark.slow
def test_a_frozen_text_encoder_is_named_and_found_again(tmp_path, clip_folder):
    """Its features are an input in torch; the way back is told where it lies."""
    config = from_dict(laion.get_config("tiny"))
    config = with_fields(
        config,
        {"text.encoder": "clip", "text.path": str(clip_folder), "loss.vision_aided": 0.0, "loss.clip": (0.0, 0.0)},
    )
    networks = Networks(config)
    state = networks.init(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    open_workdir(tmp_path / "run", config)
    checkpoints = Checkpoints(tmp_path / "run", config)
    checkpoints.save(0, state, {}, config, {"text": "0" * 64})
    checkpoints.close()
    folder = tmp_path / "torch"
    assert convert_checkpoint.verb([f"--workdir={tmp_path / 'run'}", "--to=pytorch", f"--out={folder}", ALL]) == 0
    text = json.loads((folder / "config.json").read_text())["text"]
    assert (text["path"], text["encoder_width"]) == ("", 32)
    card = (folder / "README.md").read_text()
    assert "features=features" in card
    assert "outputs of the generator agree" in card
    with pytest.raises(UserError, match=r"text\.path"):
        back(folder, tmp_path / "again")
    command = ["--from=pytorch", f"--input={folder}", f"--out={tmp_path / 'again'}", f"--text_path={clip_folder}"]
    assert convert_checkpoint.verb(command) == 0
    again = Checkpoints(tmp_path / "again")
    assert again.read_config(0).text == config.text
    assert again.frozen_identities(0) == {"text": "0" * 64}


def test_in_this_projects_own_names(tmp_path):
    """There and back, and the folder samples as it is."""
    command = [f"--workdir={RUN}", "--to=safetensors", f"--out={tmp_path / 'own'}", ALL, "--shard=0.00002"]
    assert convert_checkpoint.verb(command) == 0
    assert not list((tmp_path / "own").glob("*.py"))
    assert "all tensors of the generator are equal;" in (tmp_path / "own" / "README.md").read_text()
    images = TextToImage.from_workdir(RUN)(["the digit 3"], [1])
    np.testing.assert_array_equal(TextToImage.from_pretrained(tmp_path / "own")(["the digit 3"], [1]), images)
    out = tmp_path / "run"
    assert convert_checkpoint.verb(["--from=safetensors", f"--input={tmp_path / 'own'}", f"--out={out}"]) == 0
    (step, state, data), (_, expected, position) = restore(out), restore(RUN)
    assert (step, data) == (15, position)
    assert states_equal(state, expected)
    # The other way's folder is not this one's.
    with pytest.raises(UserError, match=r"has no .*: the weights are of another model"):
        convert_checkpoint.verb(["--from=pytorch", f"--input={tmp_path / 'own'}", f"--out={tmp_path / 'no'}"])


def test_the_average_alone_starts_a_run_of_it(tmp_path):
    assert convert(tmp_path / "average") == 0
    assert back(tmp_path / "average", tmp_path / "run") == 0
    (step, state, data), (_, expected, _) = restore(tmp_path / "run"), restore(RUN)
    assert (step, int(state.images), data) == (0, 0, {})
    assert states_equal(state.g.params, expected.g_ema)
    assert states_equal(state.g_ema, expected.g_ema)
    assert all(not np.any(x) for x in jax.tree.leaves((state.g.opt, state.d.opt)))
    assert not states_equal(state.d.params, expected.d.params)


def spoil(folder, change):
    tensors = read(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def rewrite_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_a_pickle(folder):
    shutil.rmtree(folder / "training")
    (folder / "model.safetensors").rename(folder / "model.pt")


def spoil_moments(folder):
    name = "training/generator_optimizer.safetensors"
    tensors = read(folder, name)
    tensors.pop(next(iter(tensors)))
    safetensors.numpy.save_file(tensors, folder / name)


DAMAGE = {
    "moments": (spoil_moments, r"exp_avg_sq.\* of the generator. has no"),
    "missing": (lambda f: spoil(f, lambda t: t.pop("constant")), "has no constant"),
    "extra": (lambda f: spoil(f, lambda t: t.update(more=np.zeros(1, np.float32))), "has an unknown more"),
    "shape": (
        lambda f: spoil(f, lambda t: t.update(constant=np.zeros((1, 4, 4), np.float32))),
        "constant is .1, 4, 4.",
    ),
    "cut": (cut_short, "damaged or cut short"),
    "pickle": (only_a_pickle, "is a pickle"),
    "newer": (lambda f: rewrite_config(f, lambda c: c.update(format=999)), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (
        lambda f: [shutil.rmtree(f / "training"), (f / "model.safetensors").unlink()],
        "holds no model.safetensors",
    ),
    "counts": (lambda f: (f / "training" / "training.json").write_text("[]"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line_and_leaves_nothing(damage, converted, tmp_path):
    spoil_it, message = DAMAGE[damage]
    shutil.copytree(converted, tmp_path / "folder")
    spoil_it(tmp_path / "folder")
    with pytest.raises(UserError, match=message) as error:
        back(tmp_path / "folder", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]

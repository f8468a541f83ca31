"""tools/convert_checkpoint.py and tools/export_weights.py of an upsampler's run: PyTorch, safetensors, and back."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import laion_upsampler
from gigagan_jax.checkpoint.manager import Checkpoints, states_equal, with_shardings
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.config import MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.latents import z_of_seed
from gigagan_jax.inference.upscaler import Upscaler
from gigagan_jax.interop.torch_training import Training
from gigagan_jax.parallel import sharding
from gigagan_jax.training.state import Networks
from tests.interop.test_torch_upsampler import small
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

import convert_checkpoint
import export_weights

ALL = "--what=optimizer"
# 8 to 16 px, for speed.
SMALL = {
    "resolution": 16,
    "generator__blocks": (2, 1, 1),
    "generator__bank": (1, 2, 2),
    "generator__attention_depth": (1, 0, 0),
    "discriminator__blocks": (1, 1, 1),
    "discriminator__attention_depth": (0, 1, 0),
    "discriminator__input_levels": 1,
    "discriminator__output_levels": 2,
    "loss__level_weights": (),
}
PROMPT = "a cat"


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def save_run(folder, config):
    """A workdir whose parameters, averages and moments are all of their own."""
    networks = Networks(config)
    rng = np.random.default_rng(0)
    draw = lambda x: (
        rng.standard_normal(x.shape).astype(x.dtype) if x.dtype == np.float32 else np.full(x.shape, 7, x.dtype)
    )
    state = jax.tree.map(draw, networks.abstract())
    open_workdir(folder, config)
    checkpoints = Checkpoints(folder, config)
    checkpoints.save(7, state, {"epoch": 1}, config, {}, images=7)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run") / "run", small(laion_upsampler, "tiny", **SMALL))


def convert(run, out, form, *flags):
    assert convert_checkpoint.verb([f"--workdir={run}", f"--to={form}", f"--out={out}", *flags]) == 0
    return out


def back(folder, out, form):
    assert convert_checkpoint.verb([f"--input={folder}", f"--from={form}", f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def converted(run, tmp_path_factory):
    return convert(run, tmp_path_factory.mktemp("converted") / "torch", "pytorch", ALL)


def restore(workdir):
    checkpoints = Checkpoints(workdir)
    step = checkpoints.require_valid_step()
    config = checkpoints.read_config(step)
    networks = Networks(config)
    state, data = checkpoints.restore(step, with_shardings(networks.abstract(), networks.shardings(one_device())))
    return step, state, data, config


def assert_same_runs(a, b):
    (step, state, data, config), (again, other, position, same) = restore(a), restore(b)
    assert (step, data, config) == (again, position, same)
    assert states_equal(state, other)


def test_the_verdict_is_of_outputs(converted):
    card = (converted / "README.md").read_text()
    for network in ("generator", "discriminator"):
        assert re.search(rf"outputs of the {network} agree to \d", card)
    assert "tags: [gigagan, super-resolution]" in card
    assert "What trains\nan upsampler is not in `torch_training.py`." in card
    with pytest.raises(NotImplementedError, match=r"upsampler\.input_resolution"):
        Training.load(converted)


def test_there_and_back_is_the_same_state(run, converted, tmp_path):
    assert_same_runs(back(converted, tmp_path / "again", "pytorch"), run)


def test_the_folder_enlarges_with_torch_and_safetensors_alone(run, converted, tmp_path):
    upscaler = Upscaler.from_workdir(run, mesh=one_device())
    low = np.random.default_rng(1).uniform(-1, 1, (1, 8, 12, 3)).astype(np.float32)
    expected = upscaler.tile_model(prompt=PROMPT, seed=5)(low)
    z = np.asarray(z_of_seed(np.array([5], np.uint32), upscaler.config.generator.z_dim))
    np.savez(tmp_path / "given.npz", z=z, low=np.moveaxis(low, -1, 1))
    # The lines of the model card, in a process that finds neither jax nor this package.
    (code,) = re.findall(r"```python\n(.*?)```", (converted / "README.md").read_text(), re.DOTALL)
    assert "sides are multiples of 2\n" in code
    code = code.replace("torch.randn(1, upsampler.z_dim)", "torch.from_numpy(given['z'])").replace("...", PROMPT)
    code = code.replace("torch.rand(1, 3, 8, 8) * 2 - 1", "torch.from_numpy(given['low'])")
    program = f"""
import sys
sys.modules["jax"] = sys.modules["gigagan_jax"] = None
import numpy as np, torch
given = np.load({str(tmp_path / "given.npz")!r})
{code}
np.save({str(tmp_path / "drawn.npy")!r}, images[-1].detach().numpy())
"""
    subprocess.run([sys.executable, "-c", program], cwd=converted, check=True)
    drawn = np.moveaxis(np.load(tmp_path / "drawn.npy"), 1, -1)
    assert drawn.shape == (1, 16, 24, 3)
    np.testing.assert_allclose(drawn, expected, atol=1e-4 * np.abs(expected).max())


def test_in_this_projects_own_names(run, tmp_path):
    """There and back, and the folder enlarges as it is."""
    folder = convert(run, tmp_path / "own", "safetensors", ALL)
    assert 'large = upscaler(image, scale=2, prompt="...")' in (folder / "README.md").read_text()
    ours, own = (Upscaler.from_pretrained(place, mesh=one_device()) for place in (run, folder))
    assert (own.step, own.config.upsampler) == (7, ours.config.upsampler)
    jax.tree.map(np.testing.assert_array_equal, ours.params, own.params)
    assert_same_runs(back(folder, tmp_path / "again", "safetensors"), run)


@pytest.mark.slow
def test_weights_are_published_and_converted(run, tmp_path):
    assert export_weights.verb([f"--workdir={run}", f"--out={tmp_path / 'weights'}", "--dtype=float32"]) == 0
    ours, published = (Upscaler.from_pretrained(place, mesh=one_device()) for place in (run, tmp_path / "weights"))
    jax.tree.map(np.testing.assert_array_equal, ours.params, published.params)
    folder = convert(tmp_path / "weights", tmp_path / "torch", "pytorch", "--memory=1e-9")
    table = safetensors.numpy.load_file(folder / "model.safetensors")
    for key in ("encoder.stem.weight", "encoder.stages.0.0.conv1.weight", "levels.2.to_rgb.filters"):
        assert key in table


@pytest.mark.slow
def test_the_network_of_the_perceptual_loss_is_told_on_the_way_back(tmp_path):
    frozen = {"loss__perceptual": 1.0, "perceptual__path": str(tmp_path / "vgg16.pth")}
    config = small(laion_upsampler, "tiny", **SMALL, **frozen)
    run = save_run(tmp_path / "run", config)
    folder = convert(run, tmp_path / "torch", "pytorch", ALL, "--memory=1e-9")
    assert "vgg16" not in (folder / "config.json").read_text()
    with pytest.raises(UserError, match=r"config\.perceptual\.path is not set"):
        back(folder, tmp_path / "again", "pytorch")
    flags = [f"--input={folder}", "--from=pytorch", f"--perceptual_path={tmp_path / 'vgg16.pth'}"]
    assert convert_checkpoint.verb([*flags, f"--out={tmp_path / 'again'}"]) == 0
    assert_same_runs(tmp_path / "again", run)
    with pytest.raises(UserError, match="--perceptual_path has no meaning with --to"):
        convert(run, tmp_path / "more", "pytorch", "--perceptual_path=x")

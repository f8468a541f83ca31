"""tools/convert_checkpoint.py: what it writes runs with torch alone, in shards or whole, and bad input is one line."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.latents import z_of_seed
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.interop import pytorch
from gigagan_jax.interop.checkpoint_arrays import CheckpointArrays
from gigagan_jax.interop.torch_check import Check
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

import convert_checkpoint

RUN = ROOT / "tests" / "fixtures" / "digits"
ALL = "--what=average,training,optimizer"


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
        tokens=model.sampler.tokenizer(prompts),
    )
    # The lines of the model card, in a process that finds neither jax nor this package.
    (code,) = re.findall(r"```python\n(.*?)```", (converted / "README.md").read_text(), re.DOTALL)
    code = code.replace("torch.randn(1, generator.z_dim)", "torch.from_numpy(given['z'])")
    program = f"""
import sys
sys.modules["jax"] = sys.modules["gigagan_jax"] = None
import numpy as np, torch
given = np.load("../given.npz")
tokens = torch.from_numpy(given["tokens"]).long()
{code}
np.save("../drawn.npy", images[-1].detach().numpy())
"""
    subprocess.run([sys.executable, "-c", program], cwd=converted, check=True)
    drawn = np.moveaxis(np.load(converted.parent / "drawn.npy"), 1, -1)
    drawn = np.clip(np.rint((drawn + 1) * 127.5), 0, 255).astype(int)
    assert np.abs(drawn - expected).max() <= 1
    assert expected.std() > 5


def test_shards_hold_what_one_file_holds(converted, tmp_path):
    assert convert(tmp_path / "cut", "--shard=0.00002", "--memory=0") == 0
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
    assert "all tensors of the generator are equal" in (tmp_path / "cut" / "README.md").read_text()


def test_moments_have_the_names_of_torchs_adam(converted):
    networks = read(converted, "training/discriminator.safetensors")
    moments = read(converted, "training/discriminator_optimizer.safetensors")
    assert {key.removeprefix("exp_avg_sq.") for key in moments} == set(networks)
    assert all(moments[f"exp_avg_sq.{key}"].shape == x.shape for key, x in networks.items())
    counts = json.loads((converted / "training" / "training.json").read_text())
    assert counts == {"step": 15, "images": 240, "optimizer_steps": {"generator": 15, "discriminator": 15}}


def test_a_transposed_tensor_of_the_right_shape_is_seen(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "folder")
    tensors = read(converted)
    key = next(key for key, x in tensors.items() if x.ndim == 2 and x.shape[0] == x.shape[1])
    tensors[key] = np.ascontiguousarray(tensors[key].T)
    safetensors.numpy.save_file(tensors, tmp_path / "folder" / "model.safetensors")
    checkpoints = Checkpoints(RUN)
    for memory, message in ((8e9, "differ by"), (0, "is not what the checkpoint has")):
        with pytest.raises(UserError, match=message):
            Check(checkpoints, 15, ["average"], memory)(tmp_path / "folder")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--what=weights"], "choose of average"),
        (["--what="], "choose of average"),
        (["--workdir=missing"], "missing"),
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


def test_nothing_half_written_stays_where_the_check_fails(tmp_path):
    def refuse(folder):
        assert (folder / "model.safetensors").exists()
        raise UserError("differs")

    checkpoints = Checkpoints(RUN)
    with pytest.raises(UserError, match="differs"):
        pytorch.write_folder(tmp_path / "out", checkpoints, 15, ["average"], check=refuse)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointArrays, "read", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        convert(tmp_path / "out")
    assert not list(tmp_path.iterdir())

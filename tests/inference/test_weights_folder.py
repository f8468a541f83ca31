"""Published weights: the pictures of the run they come from, and one line where they are damaged."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gigagan_jax import sample
from gigagan_jax.checkpoint.consistency import check_same_frozen
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.cli import load_config
from gigagan_jax.config import MeshConfig
from gigagan_jax.config.migrations import FORMAT
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.sampler import Sampler
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.interop import weights
from gigagan_jax.parallel import sharding
from tests.runs import ROOT, small
from tools import export_weights

# A run of digits:tiny by the code of an earlier day.
RUN = ROOT / "tests" / "fixtures" / "digits"
PROMPTS = ["the digit 3", "a handwritten seven"] * 2


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "digits"
    assert export_weights.verb([f"--workdir={RUN}", f"--out={folder}"]) == 0
    return folder


@pytest.fixture
def copy(published, tmp_path):
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def draw(folder):
    # Both means take part: that of the prompt, and w_avg of the file.
    return TextToImage.from_workdir(folder)(PROMPTS, range(4), truncation=0.9, global_truncation=0.2).astype(int)


def test_the_pictures_are_those_of_the_run(published, tmp_path):
    of_run, of_weights = draw(RUN), draw(published)
    assert np.abs(of_run - of_weights).max() <= 2
    assert of_run.std() > 5
    export_weights.verb([f"--workdir={RUN}", f"--out={tmp_path}", "--dtype=float32"])
    assert (draw(tmp_path) == of_run).all()


def test_one_image_is_that_of_a_batch_and_three_lines_suffice(published, tmp_path):
    model = TextToImage.from_pretrained(published)
    one = model("the digit 3", seed=2)
    assert one.shape == (1, 8, 8, 3)
    batch = model(["the digit 3"] * 3, seed=1)
    # Two programs: equal but for rounding.
    assert np.abs(one.astype(int) - batch[1:2]).max() <= 1
    np.testing.assert_array_equal(batch, model(["the digit 3"] * 3, [1, 2, 3]))
    model.save_pretrained(tmp_path / "again")
    again = TextToImage.from_pretrained(tmp_path / "again")("the digit 3", seed=2)
    np.testing.assert_array_equal(again, one)
    with pytest.raises(UserError, match="no such folder"):
        TextToImage.from_pretrained(tmp_path / "missing")


def test_two_files_without_places_of_the_machine(published):
    assert sorted(f.name for f in published.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((published / "config.json").read_text())
    assert config["format"] == FORMAT
    assert config["data"]["path"] == config["text"]["path"] == config["vision_aided"]["path"] == ""
    assert all(x.dtype == np.float16 for x in load_file(published / "model.safetensors").values())


def test_sample_takes_the_folder(published, tmp_path, capsys):
    out = tmp_path / "x.png"
    assert sample.verb([f"--workdir={published}", "--prompt=the digit 3", "--num=2", f"--out={out}"]) == 0
    assert out.stat().st_size > 100


def test_weights_of_an_earlier_format(copy):
    """A parameter that has moved since is found by its place of then."""
    wanted = draw(copy)
    config = json.loads((copy / "config.json").read_text())
    tensors = load_file(copy / "model.safetensors")
    old = {"entry": "entry/{}", "blocks": "rest/{}", "attention": "attention/{}", "to_rgb": "to_rgb/{}"}

    def before(name):
        parts = name.split("/")
        if parts[0] != "levels":
            return name
        return "/".join([old[parts[2]].format(parts[1]), *parts[3:]])

    save_file({before(name): x for name, x in tensors.items()}, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config | {"format": 1}))
    assert (draw(copy) == wanted).all()


def change(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in (tensors | changes).items() if v is not None}, folder / "model.safetensors")


def test_damage_is_named(copy):
    def fails(words):
        with pytest.raises(UserError, match=words):
            TextToImage.from_workdir(copy)

    first = sorted(load_file(copy / "model.safetensors"))[0]
    value = load_file(copy / "model.safetensors")[first]
    change(copy, **{first: None})
    fails(rf"tensors 1 \({first}\) missing; is it a network of another architecture")
    change(copy, **{first: np.zeros((1, 2, 3), np.float16)})
    fails(rf"{first} has shape \(1, 2, 3\), which does not give")
    change(copy, **{first: value, "unheard_of": value})
    fails(r"tensors 1 \(unheard_of\) left over")
    change(copy, unheard_of=None, w_avg=np.zeros(3, np.float16))
    fails(r"w_avg is \[3\], not")
    change(copy, w_avg=None)
    fails(r"w_avg is \[0\], not")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    fails("model.safetensors is damaged or cut short")
    (copy / "config.json").unlink()
    fails(r"config.json cannot be read as JSON")


def test_values_past_half_precision_are_refused(tmp_path):
    model = TextToImage.from_workdir(RUN)
    with pytest.raises(UserError, match="w_avg has values that float16 does not hold: export with --dtype=float32"):
        weights.save_weights(tmp_path, model.config, model.params, np.full(3, 1e6), step=1)


def test_other_frozen_networks_are_refused():
    check_same_frozen({"text": "a" * 64}, {"text": "a" * 64}, "x")
    check_same_frozen({}, {"text": "a" * 64}, "x")
    with pytest.raises(UserError, match="x was trained with other weights of the frozen network 'text'"):
        check_same_frozen({"text": "a" * 64}, {"text": "b" * 64}, "x")


def test_out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: name a folder"):
        export_weights.verb([f"--workdir={RUN}", f"--out={tmp_path / 'file'}"])


@pytest.mark.slow
def test_a_model_with_a_frozen_encoder(tmp_path):
    """All its losses: sampling needs the text encoder alone, whose place is given by --text_path."""
    clip = ROOT / "tests" / "fixtures" / "trained" / "clip"
    paths = [f"--config.text.path={clip}", f"--config.vision_aided.path={clip}", "--config.text.encoder=clip"]
    config = load_config("configs/laion.py:tiny", [*paths, "--config.text.length=16"])
    sampler = Sampler(config, sharding.make_mesh(MeshConfig()))
    params = sampler.module.init(0, sampler.shardings)
    average = np.zeros(config.generator.w_dim, np.float32)
    weights.save_weights(tmp_path, config, params, average, step=3, identities=sampler.identities, dtype=np.float32)
    assert str(clip) not in (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"config.text.path is not set"):
        TextToImage.from_workdir(tmp_path)
    images = TextToImage.from_workdir(tmp_path, text_path=str(clip))(["a cat", "a ship"], [0, 1])
    assert (images == sampler(params, average, ["a cat", "a ship"], [0, 1])).all()


def test_a_run_and_weights_do_not_share_a_folder(copy, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "digits"
    shutil.copytree(RUN, run)
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds something else"):
        export_weights.verb([f"--workdir={run}", f"--out={run}"])
    assert (run / "config.json").read_bytes() == before
    before = (copy / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds published weights"):
        open_workdir(copy, small())
    assert (copy / "config.json").read_bytes() == before
    # Weights may be exported over older ones.
    assert export_weights.verb([f"--workdir={run}", f"--out={copy}"]) == 0


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / ".model.safetensors.part").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        export_weights.verb([f"--workdir={RUN}", f"--out={tmp_path}"])

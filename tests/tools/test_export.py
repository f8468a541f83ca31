"""tools/export.py: artefacts draw what `sample` draws, in programs without this package; bad input is one line."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs import imagenet, laion
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.latents import center_z, z_of_seed
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.interop import artefact, onnx_export, stablehlo
from gigagan_jax.interop.torch_table import to_torch
from gigagan_jax.models.build import build_generator
from tests.interop.test_torch_parity import draw_params, small
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

import export

# Trained for 15 steps: quick to export, at 8 px.
RUN = ROOT / "tests" / "fixtures" / "digits"
PROMPT, SEED = "a handwritten seven", 3


def run_export(out, form, *flags, workdir=RUN):
    return export.verb([f"--workdir={workdir}", f"--format={form}", f"--out={out}", *flags])


def draw(folder, without, z=None):
    """What run.py of the folder draws, in a process that lacks some modules."""
    program = (folder / "run.py").read_text()
    if z is not None:
        lines = [line for line in program.splitlines() if line.startswith('inputs["z"]')]
        program = program.replace(lines[0], f'inputs["z"] = np.array({z.tolist()}, np.float32)')
    hide = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    subprocess.run([sys.executable, "-c", hide + program, PROMPT, str(SEED)], cwd=folder, check=True)
    return np.asarray(Image.open(folder / "image.ppm"), int)


def test_stablehlo_draws_the_picture_of_sample_with_jax_and_flatbuffers(tmp_path):
    assert run_export(tmp_path / "out", "stablehlo") == 0
    expected = TextToImage.from_workdir(RUN)(PROMPT, seed=SEED)[0].astype(int)
    assert expected.std() > 5
    drawn = draw(tmp_path / "out", ("gigagan_jax", "flax", "optax", "orbax", "transformers", "safetensors", "torch"))
    assert np.abs(drawn - expected).max() <= 1
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "agree to" in readme
    assert "CPU, CUDA and TPU" in readme


@pytest.mark.slow
def test_weights_beside_are_published_weights_too(tmp_path):
    assert run_export(tmp_path / "out", "stablehlo", "--weights=beside") == 0
    expected = TextToImage.from_workdir(RUN)(PROMPT, seed=SEED)[0].astype(int)
    assert np.abs(draw(tmp_path / "out", ("gigagan_jax", "torch")) - expected).max() <= 1
    np.testing.assert_array_equal(TextToImage.from_pretrained(tmp_path / "out")(PROMPT, seed=SEED)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--weights=beside",)])
def test_onnx_draws_the_picture_of_sample_with_onnxruntime_alone(flags, tmp_path):
    assert run_export(tmp_path / "out", "onnx", *flags) == 0
    assert (tmp_path / "out" / "generator.onnx.data").exists() == bool(flags)
    expected = TextToImage.from_workdir(RUN)(PROMPT, seed=SEED)[0].astype(int)
    z = np.asarray(
        z_of_seed(np.array([SEED], np.uint32), json.loads((RUN / "config.json").read_text())["generator"]["z_dim"])
    )
    drawn = draw(tmp_path / "out", ("gigagan_jax", "jax", "torch", "onnx", "safetensors"), z)
    assert np.abs(drawn - expected).max() <= 1


# At 8 px: ONNX takes its time with every layer.
SMALL = {
    "resolution": 8,
    "generator__blocks": (1, 2),
    "generator__attention_depth": (0, 1),
    "generator__bank": (1, 2),
    "discriminator__blocks": (1, 1),
    "discriminator__attention_depth": (0, 0),
}
CONFIGS = {
    "words": lambda: small(laion, text__encoder="words", text__buckets=16, **SMALL),
    "class": lambda: small(imagenet, generator__attention__kind="dot", **SMALL),
    "none": lambda: small(laion, condition="none", generator__w_token=False, **SMALL),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"), [*((name, "stablehlo") for name in CONFIGS), ("words", "onnx"), ("class", "onnx")]
)
def test_every_condition(name, form, tmp_path):
    config = CONFIGS[name]()
    network = build_generator(config)
    params = draw_params(network, 0)
    w_avg = np.random.default_rng(1).standard_normal(config.generator.w_dim).astype(np.float32)
    centers = np.array(center_z(config.generator.z_dim))
    if form == "stablehlo":
        params = jax.tree.map(jax.numpy.asarray, params)
        data = stablehlo.export_generator(config, params, centers)
        run = lambda inputs: stablehlo.run_artefact(data, None, inputs)
    else:
        file = tmp_path / "generator.onnx"
        onnx_export.export_generator(config, to_torch(network, config, params), w_avg, centers, file)
        run = lambda inputs: onnx_export.run_artefact(file, inputs)
    reference = jax.jit(artefact.make_function(config, centers))
    for count in (1, 3):
        inputs = artefact.example_inputs(config, count, w_avg)
        expected = np.asarray(reference(params, inputs))
        assert expected.shape == (count, 8, 8, 3)
        np.testing.assert_allclose(run(inputs), expected, atol=1e-4 * np.abs(expected).max())


def test_the_program_of_each_condition_is_python():
    for name, make in CONFIGS.items():
        config = make()
        for program in (stablehlo.program(config, True), stablehlo.program(config, False), onnx_export.program(config)):
            compile(program, name, "exec")


def test_an_artefact_that_differs_is_not_written(tmp_path, monkeypatch):
    run = stablehlo.run_artefact
    monkeypatch.setattr(stablehlo, "run_artefact", lambda *args: run(*args) * 1.01)
    with pytest.raises(UserError, match=r"differ by .*; nothing was written"):
        run_export(tmp_path / "out", "stablehlo")
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="exists: name a new folder"):
        run_export(tmp_path / "mine", "stablehlo")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_export(tmp_path / "file" / "out", "stablehlo")
    with pytest.raises(UserError, match="no checkpoint"):
        run_export(tmp_path / "out", "stablehlo", workdir=tmp_path / "mine")
    monkeypatch.setitem(export.FORMATS, "stablehlo", (*export.FORMATS["stablehlo"][:3], 1))
    with pytest.raises(UserError, match="do not fit into one StableHLO file: --weights=beside"):
        run_export(tmp_path / "out", "stablehlo", "--weights=inside")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--format=onnx needs torch, onnxscript, onnxruntime: pip install"):
        run_export(tmp_path / "out", "onnx")

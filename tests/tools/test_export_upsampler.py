"""tools/export.py of upsamplers: artefacts enlarge as `Upscaler` does, without this package; bad input is one line."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image

from configs import laion_upsampler, photos
from gigagan_jax.config import MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.upscaler import Upscaler
from gigagan_jax.interop import artefact, onnx_export, stablehlo
from gigagan_jax.models.build import build_generator
from gigagan_jax.models.upsampler import grid_of
from gigagan_jax.parallel import sharding
from tests.interop.test_torch_parity import draw_params
from tests.interop.test_torch_upsampler import CONFIGS, TIERS, small
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

import export

SEED = 3


def publish(folder, config):
    """Weights away from where they start, in a folder."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    upscaler = Upscaler(config, mesh)
    upscaler.params = draw_params(upscaler.module, 1)
    upscaler.save_pretrained(folder, dtype=np.float32)
    return upscaler


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    publish(folder / "photos", small(photos, "tiny"))
    return folder / "photos"


def run_export(out, form, workdir, *flags):
    return export.verb([f"--workdir={workdir}", f"--format={form}", f"--out={out}", *flags])


def enlarge(folder, without, image, *arguments, z=None):
    """What run.py of the folder makes of an image, in a process that lacks some modules."""
    Image.fromarray(image).save(folder / "small.png")
    program = (folder / "run.py").read_text()
    if z is not None:
        (line,) = (line for line in program.splitlines() if line.startswith('inputs["z"]'))
        program = program.replace(line, f'inputs["z"] = np.array({z.tolist()}, np.float32)')
    hide = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    command = [sys.executable, "-c", hide + program, "small.png", *arguments, str(SEED)]
    subprocess.run(command, cwd=folder, check=True)
    return np.asarray(Image.open(folder / "image.png"), int)


def picture(height, width):
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[60 : 60 + height, 130 : 130 + width])


def test_stablehlo_is_the_network_at_any_size():
    config = small(photos, "tiny", generator__attention_depth=(1, 0, 0))
    params = jax.tree.map(jax.numpy.asarray, draw_params(build_generator(config), 1))
    data = stablehlo.export_generator(config, params, np.zeros(()), platforms=("cpu",))
    inputs = artefact.example_inputs(config, 2, np.zeros(0), (16, 24))
    expected = np.asarray(jax.jit(artefact.make_function(config, np.zeros(())))(params, inputs))
    assert expected.shape == (2, 32, 48, 3)
    found = stablehlo.run_artefact(data, None, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match="low"):
        stablehlo.run_artefact(data, None, inputs | {"low": inputs["low"][:, :12]})


@pytest.mark.slow
def test_stablehlo_enlarges_any_size_as_upscaler_does(weights, tmp_path):
    assert run_export(tmp_path / "out", "stablehlo", weights) == 0
    # Neither side is a multiple of the grid.
    image = picture(13, 21)
    expected = Upscaler.from_pretrained(weights)(image, seed=SEED).astype(int)
    assert expected.shape == (26, 42, 3)
    assert expected.std() > 5
    made = enlarge(tmp_path / "out", ("gigagan_jax", "flax", "orbax", "transformers", "safetensors", "torch"), image)
    assert np.abs(made - expected).max() <= 1
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "images of 2 batches agree to" in readme
    assert "any size whose sides are multiples of 8" in readme
    assert not (tmp_path / "out" / "w_avg.npy").exists()


@pytest.mark.parametrize("name", TIERS)
def test_every_upsampler_has_a_symbolic_size(name):
    config = CONFIGS[name]()
    network, grid = build_generator(config), grid_of(config.upsampler, config.generator)
    n, rows, columns = jax_export.symbolic_shape("n, rows, columns")
    sizes = {"n": n, "h": grid * rows, "w": grid * columns}
    inputs = {
        key: jax.ShapeDtypeStruct(tuple(sizes.get(s, s) for s in shape), dtype)
        for key, (shape, dtype) in artefact.input_shapes(config).items()
    }
    out = jax.eval_shape(artefact.make_function(config, np.zeros(())), network.abstract(), inputs)
    factor = config.resolution // config.upsampler.input_resolution
    assert out.shape == (n, factor * grid * rows, factor * grid * columns, 3)


def test_the_program_of_each_condition_is_python():
    for name, make in CONFIGS.items():
        config = make()
        for program in (
            stablehlo.program(config, True),
            stablehlo.program(config, False),
            onnx_export.program(config, (8, 16)),
        ):
            compile(program, name, "exec")
            assert artefact.program_arguments(config) in program


@pytest.mark.slow
def test_weights_beside_are_published_weights_too(tmp_path):
    config = small(laion_upsampler, "tiny", generator__blocks=(1, 1, 1, 1), upsampler__image_skip=True)
    publish(tmp_path / "weights", config)
    assert run_export(tmp_path / "out", "stablehlo", tmp_path / "weights", "--weights=beside") == 0
    image, prompt = picture(10, 17), "a cat"
    expected = Upscaler.from_pretrained(tmp_path / "out")(image, prompt=prompt, seed=SEED).astype(int)
    made = enlarge(tmp_path / "out", ("gigagan_jax", "torch"), image, prompt)
    assert made.shape == (40, 68, 3)
    assert np.abs(made - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (16, 24)])
def test_onnx_enlarges_one_size_with_onnxruntime_alone(size, weights, tmp_path):
    flags = () if size is None else (f"--input_size={size[1]}x{size[0]}",)
    assert run_export(tmp_path / "out", "onnx", weights, *flags) == 0
    image = picture(*(size or (8, 8)))
    upscaler = Upscaler.from_pretrained(weights)
    expected = upscaler(image, seed=SEED).astype(int)
    z = np.asarray(jax.random.normal(jax.random.key(SEED), (1, upscaler.config.generator.z_dim)))
    made = enlarge(tmp_path / "out", ("gigagan_jax", "jax", "torch", "onnx", "safetensors"), image, z=z)
    assert np.abs(made - expected).max() <= 1
    # Another size is one line.
    Image.fromarray(picture(9, 8)).save(tmp_path / "out" / "other.png")
    command = [sys.executable, "run.py", "other.png", "3"]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, check=False)
    assert done.stderr.startswith("other.png is 8 x 9 px: this file takes ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["words", "class", "none"])
def test_onnx_of_every_condition(name, tmp_path):
    from gigagan_jax.interop.torch_table import to_torch

    config = CONFIGS[name]()
    network = build_generator(config)
    params, w_avg = draw_params(network, 0), np.zeros(config.generator.w_dim, np.float32)
    size = (8, 16)
    tensors = to_torch(network, config, params)
    onnx_export.export_generator(config, tensors, w_avg, np.zeros((1, 1), np.float32), tmp_path / "a.onnx", size=size)
    reference = jax.jit(artefact.make_function(config, np.zeros(())))
    for count in (1, 3):
        inputs = artefact.example_inputs(config, count, w_avg, size)
        expected = np.asarray(reference(params, inputs))
        found = onnx_export.run_artefact(tmp_path / "a.onnx", inputs)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("form", "flag", "message"),
    [
        ("onnx", "--input_size=12", "multiples of 8"),
        ("onnx", "--input_size=8x8x8", "must be pixels a side, or WIDTHxHEIGHT"),
        ("onnx", "--input_size=0", "must be pixels a side"),
        ("onnx", "--input_size=-8", "must be pixels a side"),
        ("stablehlo", "--input_size=8", "StableHLO takes any size"),
    ],
)
def test_a_size_that_is_none_is_one_line(form, flag, message, weights, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        run_export(tmp_path / "out", form, weights, flag)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_base_model_takes_no_size(tmp_path):
    with pytest.raises(UserError, match="is a base model, which takes no image"):
        run_export(tmp_path / "out", "onnx", ROOT / "tests" / "fixtures" / "digits", "--input_size=8")
    assert not list(tmp_path.iterdir())


def test_an_artefact_that_differs_is_not_written(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo, "export_generator", lambda *args, **kwargs: b"")
    monkeypatch.setattr(stablehlo, "run_artefact", lambda data, weights, inputs: np.zeros((1, 1, 1, 3)))
    with pytest.raises(UserError, match=r"differ by .*; nothing was written"):
        run_export(tmp_path / "out", "stablehlo", weights)
    assert not list(tmp_path.iterdir())

"""What artefacts of a generator or an upsampler share: inputs, the function that they are checked against, their folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.models.build import build_generator
from gigagan_jax.models.network import Params
from gigagan_jax.models.pretrained.text_encoder import text_spec
from gigagan_jax.models.upsampler import grid_of

# Largest difference of an image, which lies in about [-1, 1]: a tenth of a grey level.
TOLERANCE = 2 / 255 / 10
PROGRAM_FILE, W_AVG_FILE = "run.py", "w_avg.npy"


# Of the small images of an upsampler; h and w are multiples of `grid_of`.
ANY_SIZE = ("n", "h", "w", 3)


def artefact_name(config: Config) -> str:
    """What the artefact is, and what its files are called."""
    return "upsampler" if config.is_upsampler else "generator"


def input_shapes(config: Config, low: tuple[str | int, ...] = ANY_SIZE) -> dict[str, tuple[tuple[str | int, ...], Any]]:
    """{input: (shape, dtype)} of an artefact; "n" is the batch.

    z; tokens, with features of a frozen text encoder, or labels. Of a generator, w_avg, truncation towards the mean of the
    prompt, and towards w_avg (docs/truncation.md). Of an upsampler, the small images and the level of their noise.

    Args:
      config: of the run.
      low: shape of the small images.
    """
    shapes: dict[str, tuple[tuple[str | int, ...], Any]] = {"z": (("n", config.generator.z_dim), np.float32)}
    if config.condition == "text":
        shapes["tokens"] = (("n", config.text.length), np.int32)
        if not config.text.is_trained:
            shapes["features"] = (("n", config.text.length, text_spec(config.text).width), np.float32)
    elif config.condition == "class":
        shapes["labels"] = (("n",), np.int32)
    if config.is_upsampler:
        return shapes | {"low": (low, np.float32), "noise_level": (("n",), np.float32)}
    shapes["w_avg"] = ((config.generator.w_dim,), np.float32)
    shapes |= {"truncation": ((), np.float32), "global_truncation": ((), np.float32)}
    return shapes


def example_inputs(
    config: Config, count: int, w_avg: np.ndarray, size: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Inputs of a check: random z and captions of several lengths, some truncation, small images of some noise.

    Args:
      config: of the run.
      count: examples.
      w_avg: float32 [w_dim].
      size: height and width of the small images of an upsampler; None for those of training.
    """
    z = np.random.default_rng(count).standard_normal((count, config.generator.z_dim)).astype(np.float32)
    inputs = {"z": z, "w_avg": w_avg, "truncation": np.float32(0.8), "global_truncation": np.float32(0.9)}
    inputs |= example_conditions(config, count)
    if config.is_upsampler:
        h, w = size or (config.upsampler.input_resolution,) * 2
        inputs["low"] = np.random.default_rng(count + 1).uniform(-1, 1, (count, h, w, 3)).astype(np.float32)
        inputs["noise_level"] = np.linspace(0.1, 0.9, count, dtype=np.float32)
    return {name: np.asarray(inputs[name]) for name in input_shapes(config)}


def example_conditions(config: Config, count: int) -> dict[str, np.ndarray]:
    """A fixed caption (tokens, and features of a frozen encoder) or class (labels) for each of `count` examples."""
    rng = np.random.default_rng(0)
    if config.condition == "class":
        return {"labels": rng.integers(0, config.class_count, count).astype(np.int32)}
    if config.condition != "text":
        return {}
    spec = text_spec(config.text)
    tokens = np.zeros((count, config.text.length), np.int32)
    for i, row in enumerate(tokens):
        # Lengths from the empty caption to half a row.
        length = i * max(1, (config.text.length - 2) // (2 * count))
        row[: length + 2] = (1, *rng.integers(3, min(spec.vocab_size, 1000), length), spec.end_id)
    if config.text.is_trained:
        return {"tokens": tokens}
    return {"tokens": tokens, "features": rng.standard_normal((*tokens.shape, spec.width)).astype(np.float32)}


def make_function(config: Config, centers: np.ndarray) -> Callable[[Params, dict[str, Any]], jax.Array]:
    """f(params, inputs) -> float32 images [N, R, R, 3] in about [-1, 1], computed in float32.

    Args:
      config: of the run.
      centers: float32 [K, z_dim], the z whose mean w is that of a prompt. An upsampler has no truncation and needs none.
    """
    network = build_generator(dataclasses.replace(config, dtype="float32", remat=False))

    def run(params: Params, inputs: dict[str, jax.Array]) -> jax.Array:
        generator = network.bind(params)
        condition = generator.condition(inputs.get("tokens"), inputs.get("labels"), inputs.get("features"))
        if config.is_upsampler:
            w = generator.map(inputs["z"], condition, inputs["noise_level"])
            return generator.synthesize(w, condition, inputs["low"])[-1]
        w = generator.map(inputs["z"], condition)
        mean = jnp.zeros_like(w)
        for z in centers:
            mean += generator.map(jnp.broadcast_to(z, inputs["z"].shape), condition) / len(centers)
        near = inputs["w_avg"] + inputs["global_truncation"] * (w - inputs["w_avg"])
        return generator.synthesize(mean + inputs["truncation"] * (near - mean), condition)[-1]

    return run


def write_program(
    config: Config, load: str, z: str, call: str, low: str = "low", size: tuple[int, int] | None = None
) -> str:
    """run.py: draws or enlarges one picture without this package.

    Args:
      config: of the run.
      load: lines that make the network, after the imports.
      z: expression of z [1, z_dim], of `seed`.
      call: expression of float images [1, R, R, 3], of `inputs`.
      low: expression of an upsampler's input, of `low` [1, h, w, 3].
      size: height and width of the only small image that an upsampler takes; None for any.
    """
    lines, given = _condition_lines(config)
    modules = [name for name in ("re", "zlib") if any(f"{name}." in line for line in lines)]
    imports = "".join(f"import {name}\n" for name in modules) + "import sys"
    body = "\n".join(lines + ([] if not lines else [""]))
    if config.is_upsampler:
        given += f'"noise_level": np.zeros(1, np.float32), "low": {low}'
        body += f'inputs = {{{given}}}\ninputs["z"] = {z}'
        return _upsampler_program(config, imports, load, body, call, size)
    side = config.resolution
    return f'''"""python run.py PROMPT SEED draws image.ppm."""
{imports}

{load}

if len(sys.argv) != 3 or not sys.argv[2].isdecimal():
    sys.exit("python run.py PROMPT SEED")
prompt, seed = sys.argv[1], int(sys.argv[2]) % 2**32
{body}inputs = {{{given}"w_avg": np.load("{W_AVG_FILE}")}}
inputs |= {{"truncation": np.array(1, np.float32), "global_truncation": np.array(1, np.float32)}}
inputs["z"] = {z}
image = {call}
pixels = np.clip(np.rint((image[0] + 1) * 127.5), 0, 255).astype(np.uint8)
open("image.ppm", "wb").write(b"P6 {side} {side} 255\\n" + pixels.tobytes())
'''


def program_arguments(config: Config) -> str:
    """Of run.py."""
    if not config.is_upsampler:
        return "PROMPT SEED"
    return {"text": "IMAGE PROMPT SEED", "class": "IMAGE CLASS SEED", "none": "IMAGE SEED"}[config.condition]


def _upsampler_program(
    config: Config, imports: str, load: str, body: str, call: str, size: tuple[int, int] | None
) -> str:
    usage, factor = program_arguments(config), config.resolution // config.upsampler.input_resolution
    count, grid = len(usage.split()) + 1, grid_of(config.upsampler, config.generator)
    prompt = "" if config.condition == "none" else "prompt = sys.argv[2]\n"
    fit = f"""# Sides are multiples of {grid}: what is added is cut off again.
low = np.pad(low, ((0, 0), (0, -h % {grid}), (0, -w % {grid}), (0, 0)), "reflect")"""
    if size is not None:
        fit = f"""if (h, w) != {size}:
    sys.exit(f"{{path}} is {{w}} x {{h}} px: this file takes {size[1]} x {size[0]}")"""
    return f'''"""python run.py {usage} writes image.png, {factor} times as large."""
{imports}

from PIL import Image
{load}

if len(sys.argv) != {count} or not sys.argv[-1].isdecimal():
    sys.exit("python run.py {usage}")
path, seed = sys.argv[1], int(sys.argv[-1]) % 2**32
{prompt}low = np.asarray(Image.open(path).convert("RGB"), np.float32)[None] / 127.5 - 1
h, w = low.shape[1:3]
{fit}
{body}
image = {call}[0, : h * {factor}, : w * {factor}]
Image.fromarray(np.clip(np.rint((image + 1) * 127.5), 0, 255).astype(np.uint8)).save("image.png")
'''


def _condition_lines(config: Config) -> tuple[list[str], str]:
    """(lines that make the conditions of `prompt`, items of `inputs`)"""
    text = config.text
    words = r're.findall(r"\w+", prompt.casefold())'
    hashed = f"3 + zlib.crc32(word.encode('utf-8', 'replace')) % {text.buckets**2 - 3} for word in {words}"
    ids = {"words": hashed, "bytes": "byte + 3 for byte in whole.encode()"}
    given = {"none": "", "class": '"labels": np.array([int(prompt)], np.int32), '}
    lines = []
    if config.condition == "text" and text.is_trained:
        length = text.length
        if text.encoder == "bytes":
            # A character that does not fit whole is left out.
            lines.append(f'whole = prompt.encode("utf-8", "replace")[:{length - 2}].decode("utf-8", "ignore")')
        lines.append(f"ids = [{ids[text.encoder]}][:{length - 2}]")
        lines.append(f"tokens = np.array([[1, *ids, 2, *[0] * ({length - 2} - len(ids))]], np.int32)")
        given["text"] = '"tokens": tokens, '
    elif config.condition == "text":
        lines.append("# Of the prompt, by transformers: docs/pytorch.md says which layer.")
        lines.append("tokens, features = np.load('tokens.npy'), np.load('features.npy')")
        given["text"] = '"tokens": tokens, "features": features, '
    elif config.condition == "class" and config.class_names:
        lines.append(f"classes = {list(config.class_names)!r}")
        lines.append("label = classes.index(prompt) if prompt in classes else int(prompt)")
        given["class"] = '"labels": np.array([label], np.int32), '
    return lines, given[config.condition]


def write_readme(
    config: Config, step: int, title: str, notes: str, verdict: str, low: tuple[str | int, ...] = ANY_SIZE
) -> str:
    """README.md of the folder.

    Args:
      config: of the run.
      step: of the checkpoint.
      title: of the format.
      notes: what holds for the format.
      verdict: of the check.
      low: shape of the small images of an upsampler.
    """
    kind, does = (
        f"GigaGAN generator (Kang et al., CVPR 2023, arXiv:2303.05511) of {config.resolution} px",
        "draws `image.ppm`",
    )
    if config.is_upsampler:
        kind = "GigaGAN upsampler (Kang et al., CVPR 2023, arXiv:2303.05511, sec. 3.4), "
        kind += f"{config.upsampler.input_resolution} to {config.resolution} px"
        does = f"writes `image.png`, {config.resolution // config.upsampler.input_resolution} times as large"
    rows = "\n".join(
        f"| `{name}` | {np.dtype(dtype).name} `[{', '.join(map(str, shape))}]` | {_MEANINGS[name]} |"
        for name, (shape, dtype) in input_shapes(config, low).items()
    )
    return f"""# {config.name} as {title}

A {kind}: the moving average of its run,
step {step}, in float32.
`python run.py {program_arguments(config)}` {does}. Licences of weights and data: [to be filled in].

| input | | |
|---|---|---|
{rows}

{notes}

Compared with `gigagan_jax`: {verdict}.
"""


_MEANINGS = {
    "z": "normal numbers",
    "tokens": "the caption: begin, words or bytes, end, zeros",
    "features": "of the frozen text encoder for these tokens",
    "labels": "classes",
    "w_avg": f"the mean w of all prompts, in `{W_AVG_FILE}`",
    "truncation": "0 (the mean picture of a prompt) to 1 (all variety)",
    "low": "small images in [-1, 1]",
    "noise_level": "0 to 1, of the noise that was added to them",
    "global_truncation": "0 (the mean w of all prompts) to 1; the paper's psi is both",
}

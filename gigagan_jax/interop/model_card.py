"""The README.md of a converted checkpoint: a model card with what the run knows, and blanks for what it does not."""

from __future__ import annotations

from collections.abc import Sequence

from gigagan_jax.config import Config
from gigagan_jax.models.pretrained.hub import is_hub_id
from gigagan_jax.models.upsampler import grid_of

# Stands for what only the person who publishes can say.
BLANK = "[to be filled in]"
# Data that this project makes or that comes with a package: what is known of its licence.
_KNOWN_DATA = {
    "digits": ("scikit-learn's handwritten digits (UCI Optical Recognition of Handwritten Digits)", "CC-BY-4.0"),
    "shapes": ("drawn shapes, made by gigagan_jax", "none: they are drawn by a program"),
}


def write(config: Config, step: int, choices: Sequence[str], form: str, verdict: str = "", shards: bool = False) -> str:
    """The card.

    Args:
      config: of the run.
      step: of the checkpoint.
      choices: what was converted.
      form: "pytorch", or "safetensors" in this project's names.
      verdict: of the comparison with the original.
      shards: model.safetensors is cut.
    """
    data, data_licence = _KNOWN_DATA.get(config.data.source, (BLANK, BLANK))
    source = "" if config.data.source in _KNOWN_DATA else f" (`data.source={config.data.source}`)"
    text = {"text": _text_encoder, "class": _classes, "none": lambda config: "nothing"}[config.condition](config)
    library, made, program = ("pytorch", " and converted to PyTorch", _torch_program(config, shards))
    if form != "pytorch":
        library, made, program = ("gigagan_jax", "", _own_program(config))
    training = ""
    if "training" in choices:
        training = _BOTH + (_UPSAMPLER_TRAINING if config.is_upsampler and form == "pytorch" else _TRAINING[form])
    kind, tag = f"GigaGAN (Kang et al., CVPR 2023, arXiv:2303.05511) of {config.resolution} px", "text-to-image"
    if config.is_upsampler:
        kind = "GigaGAN upsampler (Kang et al., CVPR 2023, arXiv:2303.05511, sec. 3.4), "
        kind += f"{config.upsampler.input_resolution} to {config.resolution} px"
        tag = "super-resolution"
    return f"""---
license: {BLANK}
library_name: {library}
tags: [gigagan, {tag}]
---

# {config.name}

A {kind}, trained with gigagan_jax{made}.

| | |
|---|---|
| step | {step} |
| conditioned on | {text} |
| training data | {data}{source} |
| licence of the data | {data_licence} |
| licence of the weights | {BLANK} |
| intended use, and limits | {BLANK} |
| compared with the original | {verdict or "no"} |

{program}{training}"""


def _torch_program(config: Config, shards: bool) -> str:
    words = config.condition == "text" and config.text.is_trained
    tokens = 'tokens = tokenize(["..."], config["text"])\n' if words else ""
    call = {
        "text": "tokens" if config.text.is_trained else "tokens, features=features",
        "class": "labels=torch.tensor([0])",
        "none": "",
    }[config.condition]
    imports, load = "import safetensors.torch, torch", 'safetensors.torch.load_file("model.safetensors")'
    if shards:
        imports = "from pathlib import Path\nimport torch\nfrom torch_training import read_tensors"
        load = 'read_tensors(Path("."), "model.safetensors")'
    name, given = "generator", ""
    result = f"images = generator(torch.randn(1, generator.z_dim){', ' if call else ''}{call})"
    result += "  # low to high, [N, 3, R, R] in [-1, 1]"
    if config.is_upsampler:
        name, side = "upsampler", config.upsampler.input_resolution
        given = f"low = torch.rand(1, 3, {side}, {side}) * 2 - 1  # your image in [-1, 1]; "
        given += f"sides are multiples of {grid_of(config.upsampler, config.generator)}\n"
        given += "noise_level = torch.zeros(1)  # of the noise that was added to it\n"
        result = f"images = upsampler(torch.randn(1, upsampler.z_dim), low, noise_level{', ' if call else ''}{call})"
        result += f"  # the last is {config.resolution // side} times as large"
    return f"""`torch_gigagan.py` needs torch only. `model.safetensors` is the moving average of the {name}.

```python
import json
{imports}
from torch_gigagan import {name.capitalize()}{", tokenize" if words else ""}

config = json.load(open("config.json"))
{name} = {name.capitalize()}(config)
{name}.load_state_dict({load})
{tokens}{given}{result}
```
"""


def _classes(config: Config) -> str:
    # A card is read by people: config.json has the rest of a long list.
    shown = ", ".join(config.class_names[:20]) + (", ..." if len(config.class_names) > 20 else "")
    return f"{config.class_count} classes" + (f": {shown}" if shown else "")


def _text_encoder(config: Config) -> str:
    if config.text.is_trained:
        return f"captions, by an encoder of {config.text.encoder} that is part of the model"
    name = config.text.path if is_hub_id(config.text.path) else BLANK
    return (
        f"captions, by the frozen {config.text.encoder} encoder {name}, layer {config.text.layer}: its features go in"
    )


def _own_program(config: Config) -> str:
    if not config.is_upsampler:
        return _OWN_PROGRAM
    factor = config.resolution // config.upsampler.input_resolution
    more = {"text": ', prompt="..."', "class": ", label=0", "none": ""}[config.condition]
    return f"""`model.safetensors` is the moving average of the upsampler, under the paths of its parameters.

```python
from gigagan_jax.inference.upscaler import Upscaler

upscaler = Upscaler.from_pretrained(".")
large = upscaler(image, scale={factor}{more})  # a PIL image of any size
```
"""


_OWN_PROGRAM = """`model.safetensors` is the moving average of the generator, under the paths of its parameters.

```python
from gigagan_jax.inference.text_to_image import TextToImage

model = TextToImage.from_pretrained(".")
images = model("...", seed=3)  # uint8 [1, R, R, 3]
```
"""
_BOTH = """
`training/` has the networks as they were trained, and `training.json` the counts of steps and images. """
_UPSAMPLER_TRAINING = """What trains
an upsampler is not in `torch_training.py`.
"""
_TRAINING = {
    "pytorch": """`torch_training.py` goes on
from them: `Training.load(".")`.
""",
    "safetensors": """
`tools/convert_checkpoint.py --from=safetensors` makes a run of them.
""",
}

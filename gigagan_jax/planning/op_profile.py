"""Estimated time by module of the model, split into the forward, the recomputed and the backward pass."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from gigagan_jax.planning.hlo import HloModule, InstructionRun

# Named scopes of the losses and encoders in training/objectives.py.
LOSS_SCOPES = ("clip_loss", "vision_aided", "text_encoder")
_DIRECTIONS = ("forward", "recomputed", "backward")
# Containers that say no more than the network and the resolution do.
_SKIPPED_CLASSES = {
    "ScannedLayers",
    "SynthesisLevel",
    "DiscriminatorLevel",
    "call_with_remat",
    "Generator",
    "Discriminator",
    "VisionAided",
}
# Files of layers that several networks share: they name a layer, but no network.
_LAYER_FILES = {"equalized", "adaptive_conv", "attention", "resample", "transformer", "vit"}
# Functions in these files name an operation outside all networks.
_TRAINING_FILES = {"step", "objectives", "losses", "optimizer", "mismatched_captions", "diff_augment"}
# Frames that every operation of the step has above it.
_STEP_FUNCTIONS = {
    "TrainStep",
    "run",
    "lower",
    "gradients",
    "g_gradients",
    "d_gradients",
    "r1_gradients",
}
# The first of these files on the stack is the network.
_NETWORK_FILES = {
    "generator",
    "discriminator",
    "upsampler",
    "vision_aided",
    "conditioning",
    "clip",
    "dino",
    "t5",
    "vgg",
    "inception",
}


def module_name(op_name: str, stack: Sequence[tuple[str, str]]) -> str:
    """The module of an operation, such as 'generator/64px/SynthesisBlock/AdaptiveConv/demodulation'.

    Args:
      op_name: JAX's name; its named scopes contain the loss and the resolution.
      stack: frames of the code, outermost first; see HloModule.call_stack.
    """
    # Autodiff wraps scopes in "jvp(...)" and "transpose(...)", hence the search for a substring.
    part = next((p for p in LOSS_SCOPES if p in op_name), "")
    resolution = re.search(r"\b(\d+px)\b", op_name)
    network, step = "", ""
    names: list[str] = []
    for file, function in stack:
        name = function.removesuffix(".__call__")
        if "<" in name:
            # "<lambda>" and "f.<locals>.g" name no module.
            continue
        if file in _NETWORK_FILES:
            network = network or file
        if file in _TRAINING_FILES:
            last = name.split(".")[-1].strip("_")
            step = step if last in _STEP_FUNCTIONS else last
        elif (
            (file in _NETWORK_FILES or file in _LAYER_FILES)
            and name.split(".")[0] not in _SKIPPED_CLASSES
            and name not in names
        ):
            names.append(name)
    names = [n for n in names if not n.startswith("_")]
    # The outermost and the two innermost names identify a layer; a longer path does not fit a row.
    inner = [names[0], *names[-2:]] if len(names) > 3 else names
    if not network:
        inner = [f"step/{step}"] if step else inner or ["other"]
    return "/".join(x for x in (part, network, resolution[1] if resolution else "", *inner) if x)


def pass_direction(op_name: str) -> str:
    """'forward', 'recomputed' or 'backward'."""
    # Recomputed operations are within a transpose too, so this test comes first.
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"


def seconds_by_module(module: HloModule, runs: Iterable[tuple[InstructionRun, float]]) -> list[dict]:
    """Seconds of one step by module, slowest first, with the seconds of each direction.

    Args:
      runs: operations, each with its seconds in one step.
    """
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_DIRECTIONS, 0.0))
    total = 0.0
    for run, spent in runs:
        i = run.instruction
        seconds[module_name(i.op_name, module.call_stack(i.stack_frame))][pass_direction(i.op_name)] += spent
        total += spent
    rows = [
        {
            "module": name,
            "seconds": sum(ways.values()),
            "share": sum(ways.values()) / total,
            **ways,
        }
        for name, ways in seconds.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def seconds_by_loss(runs: Iterable[tuple[InstructionRun, float]]) -> dict[str, float]:
    """Seconds of one step by loss: each named scope of the step, and the rest."""
    seconds: dict[str, float] = defaultdict(float)
    for run, spent in runs:
        part = next((p for p in LOSS_SCOPES if p in run.instruction.op_name), "G, D and the rest")
        seconds[part] += spent
    return dict(sorted(seconds.items(), key=lambda row: -row[1]))

"""Where the compiler expects the time to go: estimated cycles by module of the model, forward, recomputed and backward."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from gigagan_jax.planning.hlo import Module, Run

# Named scopes of the losses in training/step.py.
PARTS = ("clip_loss", "vision_aided", "text_encoder")
_WAYS = ("forward", "recomputed", "backward")
_SKIPPED = {"Stack", "Stage", "run", "Generator", "Discriminator", "VisionAided"}
_SHARED = {"equalized", "adaptive_conv", "attention", "resample", "layers", "vit"}  # what networks are made of
_TRAINING = {"step", "losses", "optim", "mismatch", "augment"}
# The way to what is done.
_STEP = {
    "TrainStep",
    "run",
    "lower",
    "gradients",
    "g_gradients",
    "d_gradients",
    "r1_gradients",
}
_NETWORKS = {
    "generator",
    "discriminator",
    "upsampler",
    "vision_aided",
    "text",
    "clip",
    "dino",
    "t5",
    "vgg",
    "inception",
}


def module_name(op_name: str, stack: Sequence[tuple[str, str]]) -> str:
    """The module of an operation, such as 'generator/64px/SynthesisBlock/AdaptiveConv/demodulation'.

    Args:
      op_name: JAX's name, whose named scopes say the loss and the resolution.
      stack: of the code, outermost first; see Module.stack.
    """
    part = next((p for p in PARTS if p in op_name), "")
    resolution = re.search(r"\b(\d+px)\b", op_name)
    network, step = "", ""
    names: list[str] = []
    for file, function in stack:
        name = function.removesuffix(".__call__")
        if "<" in name:
            continue  # lambdas and inner functions
        if file in _NETWORKS:
            network = network or file
        if file in _TRAINING:
            last = name.split(".")[-1].strip("_")
            step = step if last in _STEP else last
        elif (file in _NETWORKS or file in _SHARED) and name.split(".")[0] not in _SKIPPED and name not in names:
            names.append(name)
    names = [n for n in names if not n.startswith("_")]
    inner = [names[0], *names[-2:]] if len(names) > 3 else names
    if not network:
        inner = [f"step/{step}"] if step else inner or ["other"]
    return "/".join(x for x in (part, network, resolution[1] if resolution else "", *inner) if x)


def way(op_name: str) -> str:
    """'forward', 'recomputed' or 'backward'."""
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"


def by_module(module: Module, runs: Iterable[tuple[Run, float]]) -> list[dict]:
    """Seconds of one step by module, slowest first, with each direction's share of them.

    Args:
      runs: operations, each with its seconds in one step.
    """
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_WAYS, 0.0))
    total = 0.0
    for run, spent in runs:
        i = run.instruction
        seconds[module_name(i.op_name, module.stack(i.frame))][way(i.op_name)] += spent
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


def by_part(runs: Iterable[tuple[Run, float]]) -> dict[str, float]:
    """Seconds of one step by loss: the named scopes of the step, and the rest."""
    out: dict[str, float] = defaultdict(float)
    for run, spent in runs:
        part = next((p for p in PARTS if p in run.instruction.op_name), "G, D and the rest")
        out[part] += spent
    return dict(sorted(out.items(), key=lambda row: -row[1]))

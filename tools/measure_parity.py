"""Compares a network with its PyTorch form at any size: outputs, predictions, and the gradients by images that R1 uses.

    python tools/measure_parity.py --config=configs/laion.py:paper --network=generator
    python tools/measure_parity.py --config=configs/laion.py:paper --network=discriminator [--batch=1]
    python tools/measure_parity.py --config=configs/laion_upsampler.py:bytes --network=generator

Parameters are drawn away from where they start, so that none is zero. A difference is the largest one over the largest value,
and in brackets that of the norms. `--double` compares both sides with PyTorch in float64 too: what both of them differ by is
rounding, and no other formula.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import resource
from collections.abc import Sequence

import jax
import numpy as np

from gigagan_jax import cli
from gigagan_jax.cli.config_file import load_config
from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.interop import torch_check
from gigagan_jax.interop.checkpoint_arrays import state_networks
from gigagan_jax.interop.torch_table import to_torch
from gigagan_jax.models.network import Network, Params, is_spec

NETWORKS = {"generator": "g", "discriminator": "d", "vision_aided": "v"}


def draw_params(network: Network, seed: int) -> Params:
    """Values of every parameter away from its start: none is zero or one."""
    rng = np.random.default_rng(seed)
    draw = lambda spec: (
        np.float32(spec.mean) + np.float32(spec.std or 0.3) * rng.standard_normal(spec.shape, dtype=np.float32)
    )
    return jax.tree.map(draw, network.specs, is_leaf=is_spec)


def format_difference(a: np.ndarray, b: np.ndarray) -> str:
    """The largest difference over the largest value, and that of the norms."""
    return f"{torch_check.difference(a, b):.1e} ({float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-12):.1e})"


def measure(config: Config, name: str, batch: int, double: bool) -> list[tuple[str, ...]]:
    """Rows: what was compared, its shape, the difference of both sides; with `double`, torch's float32 from its float64."""
    import torch

    short = NETWORKS[name]
    network = state_networks(config)[short]
    params = draw_params(network, 0)
    # Without its own values, which would be a third copy.
    with torch.device("meta"):
        module = torch_check.make_module(config, short)
    tensors = {key: torch.from_numpy(np.array(x)) for key, x in to_torch(network, config, params)}
    if name == "generator":
        tensors["w_avg"] = torch.zeros(config.generator.w_dim)
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)
    del tensors
    gc.collect()
    runs = (torch_check.RUN[short], *((torch_check.run_gradients,) if short == "d" else ()))
    compare = lambda: [pair for run in runs for pair in run(config, network, params, module, batch)]
    single = compare()
    rows = [[label, str(list(a.shape)), format_difference(a, b)] for label, a, b in single]
    if double:
        module.double()
        for row, (_, a, b), (_, _, own) in zip(rows, compare(), single, strict=True):
            row += [format_difference(a, b), format_difference(own, b)]
    return [tuple(row) for row in rows]


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="as for train; --config.KEY=VALUE changes it")
    parser.add_argument("--network", choices=sorted(NETWORKS), required=True)
    parser.add_argument(
        "--batch", type=int, default=1, help="examples (1); a multiple of the discriminator's minibatch_std"
    )
    parser.add_argument("--double", action="store_true", help="compares with float64 too")
    args, overrides = parser.parse_known_args(argv)
    config = dataclasses.replace(load_config(args.config, overrides), dtype="float32", remat=False)
    group = config.discriminator.minibatch_std or 1
    if args.batch < 1 or (args.network == "discriminator" and args.batch % group):
        raise UserError(f"--batch={args.batch} must be a positive multiple of {group}")
    if NETWORKS[args.network] not in state_networks(config):
        raise UserError(f"--config={args.config} trains no {args.network}: --config.loss.vision_aided=1 does")
    network = state_networks(config)[NETWORKS[args.network]]
    print(
        f"{args.network} of {config.name}: {network.count() / 1e6:.1f}M parameters, float32, batch {args.batch}",
        flush=True,
    )
    rows = measure(config, args.network, args.batch, args.double)
    more = ("here, from float64", "torch, from float64") if args.double else ()
    print(format_table(rows, ("compared", "shape", "largest (norm)", *more)))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    return 0


if __name__ == "__main__":
    cli.main(verb)

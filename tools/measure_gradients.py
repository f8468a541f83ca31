"""Measures the gradients of a trained model, on one batch of its data: what D's exits do to R1, and what bfloat16 does to all.

    python tools/measure_gradients.py --workdir=DIR [--precision]

By level: R1 of the last exit alone, of the other exits' sum and of the sum of all, and the cosine between the first two.
A cosine near -1 says that the exits pay for each other: R1 of the sum is small and that of the last exit large.
`--precision` adds the cosine between the gradients of each network in bfloat16 and in float32. The exit code is 1 where a
cosine between exits is below -0.3, or the penalty that is paid is not within a factor of 2 of the last exit's own.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import jax

from gigagan_jax import cli
from gigagan_jax.checkpoint.run_folder import workdir_argument
from gigagan_jax.core.formatting import format_table
from gigagan_jax.evaluation import gradients
from gigagan_jax.training.objectives import GanObjective

MIN_COSINE, MAX_FACTOR = -0.3, 2.0
EXAMPLES = 128


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=workdir_argument, required=True, help="of the training run")
    parser.add_argument("--precision", action="store_true", help="compare bfloat16 with float32 too")
    args = parser.parse_args(argv)
    mesh = gradients.single_device_mesh()
    networks, state = gradients.restore_parameters(args.workdir, mesh)
    config = dataclasses.replace(networks.config, batch_size=EXAMPLES, micro_batches=1)
    batch = gradients.read_batch(config, mesh)
    frozen = networks.frozen.load(mesh)[0] if args.precision or "text" in networks.frozen.users else {}
    objective = GanObjective(networks)
    encoded = objective.encode_captions(batch, frozen)
    exits = gradients.measure_exits(objective, state.d.params, encoded)
    print(f"step {int(state.step)}, {EXAMPLES} real images; mean of the squared norm of the gradient by the image")
    rows = [
        (f"{e.resolution} px", *(f"{x:.3g}" for x in (e.last, e.others, e.plain_sum)), f"{e.cosine:+.2f}")
        for e in exits
    ]
    print(format_table(rows, ("level", "last exit", "other exits", "all exits", "cosine")))
    own = gradients.last_exit_penalty(objective, exits)
    paid = gradients.mean_penalty(objective, state.d.params, encoded, jax.random.key(0))
    print(f"R1 that is paid: {paid:.3g}; that of the last exits alone: {own:.3g}")
    if args.precision:
        small = {k: x[: networks.config.batch_size] for k, x in batch.items()}
        cosines = gradients.compare_precisions(config, state, small, jax.random.key(0), frozen)
        for name, cosine in cosines.items():
            print(f"gradient of {name}: cosine of bfloat16 and float32 {cosine:.4f}")
    evaded = min(e.cosine for e in exits) < MIN_COSINE or not 1 / MAX_FACTOR <= paid / own <= MAX_FACTOR
    print("the penalty is evaded" if evaded else "no exit pays for another")
    return 1 if evaded else 0


if __name__ == "__main__":
    cli.main(verb)

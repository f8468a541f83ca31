"""Plans inference of an upsampler on one TPU chip that you do not own: seconds and memory, as the compiler estimates them.

    python tools/plan_upscaling.py --config=configs/laion_upsampler.py --topology=v5p:2x2x1 [--size=64x64] [--batch=1]

One pass of the network over a batch of images, or of tiles of one image: a 4096 px image by 64 to 512 px is 64 tiles and their
overlaps. The text encoder and the mapping network run once an image and are not counted.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from gigagan_jax import cli
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.planning import compile, topology
from gigagan_jax.planning.upscaling import plan_upscaling


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", required=True, help="a slice of that chip: v5p:2x2x1, v6e:2x2; one chip is used")
    parser.add_argument("--size", default="", help="HEIGHTxWIDTH of the small image (the size of training)")
    parser.add_argument("--batch", type=int, default=1, help="images or tiles of one pass (1)")
    parser.add_argument("--effort", type=float, default=-1.0, help="of the compiler for a fast program, -1 to 1")
    parser.add_argument("--json", type=Path, help="file to which one JSON line is added")
    args, unknown = parser.parse_known_args(argv)
    topology.prepare_environment()
    config = cli.load_config(args.config, cli.collect_overrides(unknown))
    side = config.upsampler.input_resolution
    found = re.fullmatch(r"(\d+)x(\d+)", args.size or f"{side}x{side}")
    if not found:
        raise UserError(f"--size={args.size}: write HEIGHTxWIDTH, such as 64x64")
    if args.batch < 1:
        raise UserError(f"--batch={args.batch}: must be at least 1")
    where = topology.parse_topology(args.topology)
    if not where.is_tpu:
        raise UserError(f"--topology={args.topology}: only TPUs have a compiler here; name v5p:2x2x1 or v6e:2x2")
    settings = compile.CompileSettings(effort=args.effort)
    size = (int(found[1]), int(found[2]))
    plan = plan_upscaling(config, where, settings, size=size, batch=args.batch)
    rows = [
        ("output of one pass", f"{args.batch} of {plan['output'][0]}x{plan['output'][1]} px"),
        ("memory, GiB", f"{(plan['memory']['total'] or 0) / 2**30:.2f} of {where.usable_bytes / 2**30:.2f}"),
        ("fits", str(plan["fits"])),
        ("ms a pass, estimated", f"{1e3 * plan['seconds']:.1f}" if "seconds" in plan else "-"),
        ("of the peak", f"{100 * plan['share_of_peak']:.1f} %" if plan.get("share_of_peak") else "-"),
    ]
    print(format_table(rows, (config.name, f"one {where.kind} chip")))
    if args.json:
        kept = {k: v for k, v in plan.items() if k not in ("collectives", "modules", "parts")}
        with args.json.open("a") as out:
            out.write(json.dumps(kept) + "\n")
    return 0


if __name__ == "__main__":
    cli.main(verb)

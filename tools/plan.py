"""Compiles the real train step for a TPU pod that is not here, and says what the compiler makes of it.

    python tools/plan.py --config=configs/laion.py --topology=v5p:4x4x4 [--config.key=value] [--r1] [--json=FILE]

Needs the libtpu of `pip install "gigagan-jax[tpu]"`, and no TPU. Every time it prints is the compiler's estimate.
"""

import argparse
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run on a TPU: no lock file is needed

import jax
from jax.experimental import topologies

from gigagan_jax import cli, sharding
from gigagan_jax.errors import UserError
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import CompiledStep, TrainStep

# Named scopes of training/step.py.
PARTS = ("clip_loss", "vision_aided", "text_encoder")
# bf16 peak, memory and clock of one chip (public documents of Google Cloud; the clock from the compiler's own figures).
CHIPS = {
    "v5e": (197e12, 16, 1.5e9),
    "v5p": (459e12, 95, 1.75e9),
    "v6e": (918e12, 32, 1.75e9),
    "v4": (275e12, 32, 1.05e9),
}


def plan(config_path: str, overrides: list[str], topology: str, *, with_r1: bool) -> dict:
    """Compiles one variant of the step; sizes in bytes, times in seconds."""
    config = cli.load_config(config_path, overrides)
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise UserError(f"--topology={topology}: unknown chip {name!r}; known: {', '.join(CHIPS)}")
    peak, hbm, clock = CHIPS[name]
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as e:
        # libtpu raises whatever it meets: not installed, no such topology.
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"--topology={topology}: {why}; is libtpu installed (pip install 'gigagan-jax[tpu]')?") from e
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh, config.rules)
    step = CompiledStep(TrainStep(Networks(config)), mesh)
    start = time.time()
    lowered = step.lower(with_r1=with_r1)
    traced = time.time()
    print(f"traced and lowered in {traced - start:.0f} s; compiling ...", flush=True)
    compiled = lowered.compile()
    done = time.time()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    flops = step.flops(with_r1=with_r1) / len(devices)
    text = compiled.as_text()
    operations = _cycles(text)
    cycles, slowest, parts = sum(operations.values()), _grouped(operations, _module), _grouped(operations, _part)
    arguments, outputs, alias = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
    )
    need = arguments + outputs - alias + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return {
        "config": config.name,
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "with_r1": with_r1,
        "seconds_to_trace": round(traced - start, 1),
        "seconds_to_compile": round(done - traced, 1),
        "bytes_state_and_batch": arguments,
        "bytes_temporary": memory.temp_size_in_bytes,
        "bytes_per_chip": need,
        "fits": need < hbm * 2**30,
        "hbm_gib": hbm,
        "flops_per_chip": flops,
        "estimated_optimal_seconds": cost.get("optimal_seconds", math.nan),
        "estimated_cycle_seconds": cycles / clock,
        "estimated_share_of_peak": flops / peak / (cycles / clock) if cycles else math.nan,
        "parts_ms": [(where, n / clock * 1e3) for where, n in parts],
        "slowest_ms": [(where, n / clock * 1e3) for where, n in slowest[:12]],
    }


def _cycles(text: str) -> Counter:
    """The compiler's `estimated_cycles` by the name of the operation, loops counted by their trips."""
    per_computation: dict[str, Counter] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head and not line.startswith(" "):
            current = head.group(2)
            entry = current if head.group(1) else entry
            per_computation[current], calls[current] = Counter(), []
            continue
        found = re.search(r'"?estimated_cycles"?:"?(\d+)', line)
        # The compiler writes the largest unsigned number where it has no estimate.
        if found and current and int(found.group(1)) < 2**62:
            op = re.search(r'op_name="([^"]*)"', line)
            per_computation[current][op.group(1) if op else "?"] += int(found.group(1))
        loop = re.search(r" while\(.*body=%?([\w.\-]+)", line)
        if loop and current:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            calls[current].append((loop.group(1), int(trips.group(1)) if trips else 1))

    def total(name: str) -> Counter:
        out = Counter(per_computation.get(name, ()))
        for body, trips in calls.get(name, ()):
            for k, v in total(body).items():
                out[k] += v * trips
        return out

    return total(entry)


def _grouped(operations: Counter, name: Callable[[str], str]) -> list[tuple[str, int]]:
    """Cycles summed by name(operation), largest first."""
    out: Counter = Counter()
    for op, n in operations.items():
        out[name(op)] += n
    return out.most_common()


def _part(op_name: str) -> str:
    """Which of the losses (named scopes of the step) an operation belongs to."""
    return next((part for part in PARTS if part in op_name), "G, D and the rest")


def _module(op_name: str) -> str:
    parts = [p for p in op_name.split("/") if not p.startswith("jit(")]
    return "/".join(parts[:2] + parts[-1:]) if len(parts) > 3 else "/".join(parts)


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", required=True, help="e.g. v5p:4x4x4, v5e:16x16")
    parser.add_argument("--r1", action="store_true", help="the variant with R1 (every 16th step)")
    parser.add_argument("--json", type=Path)
    args, unknown = parser.parse_known_args(argv)
    cli.writable(args.json)
    out = plan(args.config, cli.config_overrides(unknown), args.topology, with_r1=args.r1)
    gib = lambda n: f"{n / 2**30:.2f} GiB"
    print(f"{out['config']} on {out['chips']} chips {out['topology']}, mesh {out['mesh']}, batch {out['batch_size']}")
    print(f"compiled in {out['seconds_to_compile'] / 60:.1f} minutes (jax {jax.__version__})")
    fits = "fits" if out["fits"] else "DOES NOT FIT"
    print(f"memory of a chip: {gib(out['bytes_per_chip'])} of {out['hbm_gib']} GiB: {fits}")
    print(f"  state and batch {gib(out['bytes_state_and_batch'])}, temporary {gib(out['bytes_temporary'])}")
    print(f"FLOPs a chip: {out['flops_per_chip'] / 1e12:.2f} T")
    print(f"estimated by the compiler: {out['estimated_cycle_seconds'] * 1e3:.0f} ms a step by summed cycles, ", end="")
    print(
        f"{out['estimated_optimal_seconds'] * 1e3:.0f} ms by optimal_seconds, {out['estimated_share_of_peak']:.1%} of peak"
    )
    print("by part (cycles): " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in out["parts_ms"]))
    for name, ms in out["slowest_ms"]:
        print(f"  {ms:9.2f} ms  {name}")
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))
    return 0


if __name__ == "__main__":
    cli.main(verb)

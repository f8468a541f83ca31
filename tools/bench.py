"""Times the train step (with and without R1), sampling and training of a config on the devices that are here.

    python tools/bench.py --config=configs/laion.py --batch=32 --budget=480 --json=bench.jsonl
    python tools/bench.py --config=configs/digits.py [--config.key=value] [--steps=20] [--repeats=7]
    python tools/bench.py --dry                  (every job at toy size, on a CPU)
    python tools/bench.py --against=DIR --config=configs/laion.py:small --pairs=7 --pin      (another checkout, on CPUs)
    python tools/bench.py data [--json=FILE]     (reading tars; see tools/bench_data.py)

Jobs run in order of worth; one that is not expected to fit in what is left of the budget is left out and named. Each job's
JSON line is on the disk before the next begins. Frozen networks that are not here get random weights. See docs/bench.md.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gigagan_jax import cli
from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError

# Of the small model that is trained at the end: configs/laion.py:small in bfloat16, of 30M parameters.
TRAIN, TRAIN_OVERRIDES = (
    "configs/laion.py:small",
    (
        "dtype=bfloat16",
        "batch_size=64",
        "generator.channel_base=2560",
        "generator.channel_max=320",
        "discriminator.channel_base=2560",
        "discriminator.channel_max=320",
    ),
)
DRY, DRY_TRAIN = "configs/laion.py:tiny", "configs/digits.py:tiny"
# Compiling is most of a dry run: few blocks, and little optimisation.
DRY_OVERRIDES = (
    "resolution=8",
    "batch_size=4",
    "dtype=float32",
    "remat=false",
    "generator.blocks=(1,1)",
    "generator.bank=(1,2)",
    "generator.attention_depth=(0,1)",
    "generator.mapping_depth=2",
    "generator.text.depth=1",
    "discriminator.blocks=(1,1)",
    "discriminator.attention_depth=(1,0)",
    "discriminator.head_depth=2",
    "discriminator.text.depth=1",
    "vision_aided.layers=(1,)",
    "vision_aided.head_depth=1",
)
DRY_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
DRY_FLAGS_BEFORE_0_11 = "--xla_cpu_use_fusion_emitters=false"  # unknown to later compilers
DRY_TRAIN_SECONDS, OWN_SECONDS = 2.0, 5.0
REPEATS = 7
ROOT = Path(__file__).resolve().parents[1]


def flags() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config")
    parser.add_argument("--batch", type=int, help="global batch: short for --config.batch_size")
    parser.add_argument("--budget", type=float, help="seconds that all of it may take (as many as it needs)")
    parser.add_argument("--json", type=Path, help="file of JSON lines, begun anew")
    parser.add_argument(
        "--steps",
        type=int,
        help="calls of a run, which is one measurement (what takes a second, 20 at most; 1 with --against)",
    )
    parser.add_argument("--repeats", type=int, help=f"runs of each program, which take turns ({REPEATS})")
    parser.add_argument("--sample_batch", type=int, help="images that a device samples at once (1)")
    parser.add_argument(
        "--random_frozen", action="store_true", help="random weights for all frozen networks, also for those here"
    )
    parser.add_argument(
        "--train", help=f"config of the model that trains at the end ({TRAIN} with 30M parameters), or off"
    )
    parser.add_argument("--train_seconds", type=float, help="that it trains at most (what is left of the budget)")
    parser.add_argument("--commit", help="of this code, for the record where there is no git")
    parser.add_argument("--dry", action="store_true", help="all jobs at toy size on a CPU")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another checkout to compare the train step with, on CPUs"
    )
    parser.add_argument("--pairs", type=int, help=f"--against: pairs of measurements ({REPEATS})")
    parser.add_argument("--pin", action="store_true", help="--against: both on one core each")
    parser.add_argument("--with_r1", action="store_true", help="--against: compare the step with R1")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that make no bench."""
    for name in ("steps", "repeats", "sample_batch", "pairs", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")
    for name in ("budget", "train_seconds"):
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise UserError(f"--{name}={value}: must be a number of seconds, 0 or more")
    if args.dry and (args.config or args.against):
        raise UserError("--dry has a config of its own: leave --config and --against out")
    if not args.dry and not args.config:
        raise UserError("--config is missing: for example --config=configs/digits.py, or --dry (see --help)")
    alone = ("budget", "repeats", "sample_batch", "random_frozen", "train", "train_seconds")
    for names, go, there in (
        (("pairs", "pin", "with_r1"), "go with --against=DIR", args.against is not None),
        (alone, "do not go with --against", args.against is None),
    ):
        if not there and any(getattr(args, name) not in (None, False) for name in names):
            raise UserError(f"{', '.join('--' + name for name in names)} {go}")
    cli.check_writable(args.json)


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if argv[:1] == ["data"]:
        import bench_data

        return bench_data.verb(argv[1:])
    args, unknown = flags().parse_known_args(argv)
    check_flags(args)
    overrides = cli.collect_overrides(unknown)
    if args.batch is not None:
        overrides.append(f"--config.batch_size={args.batch}")
    if args.against is not None:
        return against(args, overrides)
    if not args.dry:
        config = cli.load_config(args.config, overrides)
        return run(args, config, training_config(args, TRAIN_OVERRIDES))
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    fast = DRY_FLAGS if jax.version.__version_info__ >= (0, 11) else f"{DRY_FLAGS} {DRY_FLAGS_BEFORE_0_11}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()
    jax.config.update("jax_platforms", "cpu")
    from bench_inputs import write_tiny_clip

    with tempfile.TemporaryDirectory() as place:
        path = write_tiny_clip(Path(place))
        toy = [f"--config.{x}" for x in (*DRY_OVERRIDES, f"text.path={path}")]
        config = cli.load_config(str(ROOT / DRY), [*toy, *overrides])
        args.steps, args.random_frozen = args.steps or 1, True
        args.train = args.train or str(ROOT / DRY_TRAIN)
        args.train_seconds = DRY_TRAIN_SECONDS if args.train_seconds is None else args.train_seconds
        return run(args, config, training_config(args, ()))


def training_config(args: argparse.Namespace, overrides: Sequence[str]) -> Config | None:
    """The config of the job that trains; None where there is to be none.

    Raises:
      UserError: it cannot be read or trained here, or would train without end.
    """
    endless = args.budget is None and args.train_seconds is None
    if args.train == "off" or args.train_seconds == 0 or (args.train is None and endless):
        return None
    if endless:
        raise UserError("--train would have no end: give --budget or --train_seconds")
    from bench_training import check

    # Whoever names a config gets it as it is.
    config = cli.load_config(
        args.train or str(ROOT / TRAIN), [] if args.train else [f"--config.{x}" for x in overrides]
    )
    check(config)
    return config


def against(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The comparison with another checkout."""
    from bench_against import compare
    from bench_output import Lines, facts

    config = cli.load_config(args.config, overrides)
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    # Two processes that measure do not share an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")
    lines = Lines(args.json)
    lines.write(facts(config, args.commit) | {"against": str(args.against)})
    compare(
        args.against,
        args.config,
        overrides,
        lines,
        pairs=args.pairs or REPEATS,
        steps=args.steps or 1,
        with_r1=args.with_r1,
        pinned=args.pin,
    )
    return 0


def run(args: argparse.Namespace, config: Config, trained: Config | None) -> int:
    """All jobs that fit. Exit code 1 where one failed for another reason than memory."""
    from bench_inputs import without_files
    from bench_jobs import Bench, Sizes, guess
    from bench_measure import Budget
    from bench_output import Lines, facts
    from bench_report import closing, headline, one_job

    from gigagan_jax.training.state import Networks

    budget = Budget(args.budget)
    sizes = Sizes(args.steps, args.repeats or REPEATS, args.sample_batch or 1, *((128, 2**20) if args.dry else (0, 0)))
    bench = Bench(config, budget, sizes, random=args.random_frozen)
    lines = Lines(args.json)
    absent = without_files(bench.networks.frozen)
    bench.random = bench.random or bool(absent)
    first = facts(config, args.commit) | {
        "mesh": dict(bench.mesh.shape),
        "parameters": [bench.networks.g.count(), bench.networks.d.count()],
        "frozen": "random" if bench.random and bench.networks.frozen.towers else "read",
        "not_in_the_cache": absent,
        "budget": args.budget,
    }
    lines.write(first)
    print(headline(first), flush=True)

    took: dict[str, float] = {}
    results: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    left_out: list[str] = []

    def training() -> dict[str, Any]:
        from bench_training import train

        bench.close()
        assert trained is not None
        started: list[float] = []

        def left() -> float:
            rest = budget.left - OWN_SECONDS
            if args.train_seconds is None:
                return rest
            started.append(budget.spent)  # the first is after compiling
            return min(started[0] + args.train_seconds - budget.spent, rest)

        return train(trained, left, lines.write)

    jobs: list[tuple[str, Callable[[], dict[str, Any]], Callable[[], float]]] = [
        ("ceilings", bench.ceiling_job, lambda: 10.0),
        ("step", lambda: bench.step_job("step", False), bench.compile_guess),
        ("sampling", bench.sampling_job, lambda: 0.4 * took.get("step", bench.compile_guess())),
        (
            "step_with_r1",
            lambda: bench.step_job("step_with_r1", True),
            lambda: 1.5 * took.get("step", bench.compile_guess()),
        ),
        ("turns", bench.turns_job, lambda: 3 * bench.turn_seconds()),
        ("kernels", bench.kernels_job, lambda: 10 + 2 * bench.turn_seconds()),
    ]
    if trained is not None:
        size = Networks(trained)
        jobs.append(("training", training, lambda: 2 * guess(size) + OWN_SECONDS))
    for name, job, expected in jobs:
        needs_programs = name in ("turns", "kernels")
        if needs_programs and not bench.programs:
            lines.write({"job": name, "left_out": "no program was compiled"})
            left_out.append(name)
            continue
        seconds = expected()
        if not budget.fits(seconds):
            why = f"expected {seconds:.0f} s, {max(budget.left, 0):.0f} s left"
            lines.write({"job": name, "left_out": why})
            print(f"{name}: left out ({why})", flush=True)
            left_out.append(name)
            continue
        print(f"{name} ...", flush=True)
        start = budget.spent
        try:
            results[name] = attempt(name, job, bench)
        except UserError:
            raise
        except Exception as e:  # the next job may well run; a lent machine is not there tomorrow
            message = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:300]}"
            results[name] = {"error": message}
            failed.append(name)
            bench.forget_state()
        took[name] = budget.spent - start
        lines.write({"job": name, "took": took[name], "at": budget.spent, **results[name]})
        print(one_job(name, results[name], took[name]), flush=True)
    lines.write({"job": "end", "took": budget.spent, "left_out": left_out, "failed": failed})
    print(closing(results, left_out, failed, budget.spent))
    return 1 if failed else 0


def attempt(name: str, job: Callable[[], dict[str, Any]], bench: Any) -> dict[str, Any]:
    """The result of a job, or the line that says that memory ran out where the job itself has no smaller batch to try."""
    from bench_measure import out_of_memory

    try:
        return job()
    except Exception as e:
        if not out_of_memory(e):
            raise
        bench.forget_state()
        return {"out_of_memory": True, "notes": [(str(e).strip().splitlines() or [type(e).__name__])[0][:200]]}


if __name__ == "__main__":
    cli.main(verb)

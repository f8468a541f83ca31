"""Trains a model: `python -m gigagan_jax.train --config=configs/digits.py --workdir=DIR [--config.key=value] [--dry_run]`.

The same command again goes on from the newest checkpoint.
"""

import logging
import signal
from collections.abc import Sequence

import jax

from gigagan_jax import cli
from gigagan_jax.checkpoint.workdir import as_begun
from gigagan_jax.core.errors import UserError
from gigagan_jax.evaluation.hooks import EVALUATORS, snapshot_hook
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.parallel import cluster, compilation_cache, preemption, watchdog
from gigagan_jax.parallel.signals import Interrupted
from gigagan_jax.planning import dry_run
from gigagan_jax.reporting import run_report
from gigagan_jax.telemetry.console import configure
from gigagan_jax.telemetry.goodput import process_began
from gigagan_jax.telemetry.profiler import parse_steps
from gigagan_jax.training.loop import Run

_log = logging.getLogger(__name__)


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(prog="python -m gigagan_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py[:variant]; fields by --config.key=value")
    parser.add_argument("--workdir", type=cli.local_folder, help="where the run lives; needed unless --dry_run")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="build abstractly, print sizes and shardings"
    )
    parser.add_argument("--devices", type=int, help="with --dry_run: plan for so many devices instead of those here")
    parser.add_argument("--profile_steps", default="", help="FIRST:LAST steps to take a trace of; see docs/seeing.md")
    for flags in (cluster, preemption, compilation_cache):
        flags.add_flags(parser)
    args, unknown = parser.parse_known_args(argv)
    if args.devices is not None and args.devices < 1:
        raise UserError(f"--devices={args.devices}: must be at least 1")
    profile_steps = parse_steps(args.profile_steps) if args.profile_steps else None
    config = cli.load_config(args.config, cli.config_overrides(unknown))
    if not args.dry_run:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the profiler listens: a request must not end the process
    cluster.join(args)
    configure(process_index=jax.process_index())
    if args.dry_run:
        print(dry_run.report(config, args.devices or jax.device_count(), args.workdir))
        return 0
    if args.workdir is None:
        raise UserError("--workdir=DIR is needed: the run's checkpoints, metrics and images go there")
    if args.devices:
        raise UserError("--devices goes with --dry_run")
    config = as_begun(args.workdir, config)
    compilation_cache.keep_programs(args.compilation_cache, args.workdir)
    run = Run(config, args.workdir)
    run.began = process_began()
    run.profile_steps = profile_steps
    sampler = TextToImage(config, run.mesh, frozen=lambda: run.frozen[0])
    run.snapshot = snapshot_hook(config, sampler, args.workdir)
    run.finish = [EVALUATORS[name](config, sampler, args.workdir) for name in config.evaluators]
    if jax.process_index() == 0:
        print(dry_run.summary(run.networks, run.mesh), flush=True)
    try:
        with (
            run_report.at_the_end(args.workdir, enabled=jax.process_index() == 0),
            preemption.watch(args.maintenance_url),
            watchdog.steps_timed(args.stall_seconds),
        ):
            run.train()
    except Interrupted as e:
        _log.info("%s; run the same command again to go on", e)
        code = cli.RESTART if e.number == signal.SIGTERM else cli.INTERRUPTED
        if not e.agreed:
            watchdog.fail(f"{e} while it was not training", code)
            watchdog.leave(code)
        return code
    return 0


if __name__ == "__main__":
    cli.main(verb)

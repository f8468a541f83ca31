"""Trains a model: `python -m gigagan_jax.train --config=configs/digits.py --workdir=DIR [--config.key=value] [--dry_run]`.

The same command again resumes from the newest checkpoint.
"""

import logging
import signal
from collections.abc import Sequence

import jax

from gigagan_jax import cli
from gigagan_jax.checkpoint.run_folder import RunFolder, workdir_argument
from gigagan_jax.checkpoint.workdir import with_original_settings
from gigagan_jax.config import ACCEPTED
from gigagan_jax.core.errors import UserError
from gigagan_jax.evaluation.hooks import make_hooks
from gigagan_jax.parallel import cluster, compilation_cache, preemption, watchdog
from gigagan_jax.parallel.devices import log_devices
from gigagan_jax.parallel.signals import Interrupted
from gigagan_jax.planning import dry_run
from gigagan_jax.reporting import run_report
from gigagan_jax.telemetry.console import configure_logging
from gigagan_jax.telemetry.goodput import process_start_time
from gigagan_jax.telemetry.profiler import parse_steps
from gigagan_jax.training.fine_tuning import DEFAULT_PARTS, PARTS, InitFrom
from gigagan_jax.training.loop import Run

_log = logging.getLogger(__name__)


def accepted_changes(text: str) -> frozenset[str]:
    """Type for argparse: "data", "settings" or both with a comma."""
    names = frozenset(name.strip() for name in text.split(","))
    if not names <= set(ACCEPTED):
        raise UserError(f"--accept={text}: write {', '.join(ACCEPTED)}, or {','.join(ACCEPTED)}")
    return names


def make_parser() -> cli.Parser:
    """The flags; fields of the config are no part of it."""
    parser = cli.Parser(prog="python -m gigagan_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py[:variant]; fields by --config.key=value")
    parser.add_argument(
        "--workdir",
        type=workdir_argument,
        help="where the run lives: a folder, or gs://BUCKET/PATH; needed unless --dry_run",
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="build abstractly, print sizes and shardings"
    )
    parser.add_argument(
        "--devices", type=int, help="with --dry_run: plan for this number of devices instead of those present"
    )
    parser.add_argument("--profile_steps", default="", help="FIRST:LAST steps to take a trace of; see docs/seeing.md")
    parser.add_argument(
        "--accept",
        type=accepted_changes,
        default=frozenset(),
        help="what may have changed since the run began: data, settings, or data,settings; see docs/runs.md",
    )
    parser.add_argument(
        "--init_from", help="a new run starts from the weights of this WORKDIR, FOLDER or hub id; see docs/runs.md"
    )
    parser.add_argument(
        "--init_parts", default=",".join(DEFAULT_PARTS), help=f"with --init_from: of {', '.join(PARTS)} (%(default)s)"
    )
    for flags in (cluster, preemption, compilation_cache):
        flags.add_flags(parser)
    return parser


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    args, unknown = make_parser().parse_known_args(argv)
    if args.devices is not None and args.devices < 1:
        raise UserError(f"--devices={args.devices}: must be at least 1")
    profile_steps = parse_steps(args.profile_steps) if args.profile_steps else None
    init_from = None if args.init_from is None else InitFrom.parse(args.init_from, args.init_parts)
    overrides, notes = cli.collect_overrides(unknown), list[str]()
    config = cli.load_config(args.config, overrides, notes)
    if not args.dry_run:
        # The default action of SIGUSR1 ends the process. The profiler sets its handler only when the loop begins.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Before anything that touches a device, even jax.process_index().
    cluster.join_processes(args)
    configure_logging(process_index=jax.process_index())
    for note in notes:
        _log.info(note)
    if args.dry_run:
        folder = None if args.workdir is None else args.workdir.folder
        print(dry_run.report_dry_run(config, args.devices or jax.device_count(), folder))
        if args.workdir is not None:
            args.workdir.upload()
        return 0
    if args.workdir is None:
        raise UserError("--workdir=DIR is needed: the run's checkpoints, metrics and images go there")
    if args.devices:
        raise UserError("--devices goes with --dry_run")
    log_devices()
    place: RunFolder = args.workdir
    if place.store is not None and jax.process_index() == 0:
        _log.info("workdir: %s; its small files pass through %s", place, place.folder)
    place.download_settings()
    # What the command line names is meant; defaults of a config file may be younger than the run.
    chosen = {text.removeprefix("--config.").partition("=")[0] for text in overrides} if args.accept else ()
    config = with_original_settings(place, config, chosen)
    place.download_programs()
    # Before Run, which compiles the initialisation.
    compilation_cache.enable_compilation_cache(args.compilation_cache, place.folder)
    run = Run(
        config,
        place,
        hooks=make_hooks,
        began=process_start_time(),
        profile_steps=profile_steps,
        accept=args.accept,
        init_from=init_from,
    )
    if jax.process_index() == 0:
        print(dry_run.summarize_modules(run.networks, run.mesh), flush=True)
    try:
        with (
            run_report.write_report_at_end(
                place.folder, jax.process_index() == 0, before=place.prepare_report, after=place.upload_report
            ),
            preemption.watch_notices(args.maintenance_url),
            watchdog.watch_for_stall(args.stall_seconds),
        ):
            run.train()
    except Interrupted as e:
        _log.info("%s; run the same command again to go on", e)
        code = cli.RESTART if e.number == signal.SIGTERM else cli.INTERRUPTED
        # Otherwise the other processes would wait for this one in their next collective.
        if not e.agreed:
            watchdog.report_failure(f"{e} outside of its steps", code)
            watchdog.exit_without_waiting(code)
        return code
    return 0


if __name__ == "__main__":
    cli.main(verb)

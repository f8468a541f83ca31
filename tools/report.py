"""Writes the report of a run, finished or not: one HTML file with curves, grids, goodput, health, data and settings.

    python tools/report.py --workdir=DIR [--out=FILE]     (report.html in the workdir)

The file needs nothing else: it can be sent, or opened where there is no network.
"""

import argparse
from collections.abc import Sequence

from gigagan_jax import cli
from gigagan_jax.checkpoint.run_folder import RunFolder, workdir_argument
from gigagan_jax.reporting import run_report


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=workdir_argument, required=True, help="of the training run")
    parser.add_argument("--out", type=cli.local_folder, help="file to write; report.html in the workdir by default")
    args = parser.parse_args(argv)
    place: RunFolder = args.workdir
    place.download_logs()
    out = run_report.write_report(place.folder, args.out, **place.prepare_report())
    if args.out is None:
        place.upload_report()
    print(f"{args.out or f'{place}/{out.name}'}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    cli.main(verb)

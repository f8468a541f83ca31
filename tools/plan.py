"""Compiles the real train step for machines that are not here, and says what the compiler makes of it.

    python tools/plan.py --config=configs/laion.py --topology=v5p:4x4x8 [--batch=1024] [--config.key=value] [--with-r1]
                         [--json=FILE] [--html=FILE] [--sweep='mesh.fsdp:1,8,64;batch_size:512,1024']
    python tools/plan.py table [--scaling] results/*.json

Needs the libtpu of `pip install -e '.[tpu]'`, and no TPU. Every time it prints is the compiler's estimate. For GPUs
(h100:8x4) there is no compiler without the GPU: memory before temporaries and FLOPs only. See docs/planning.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from gigagan_jax import cli
from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.planning import compile, html_report, sweep, text_report, topology


def table(argv: Sequence[str]) -> int:
    """A Markdown table of results of --json: configs by topologies, or one config on more and more chips."""
    parser = cli.Parser(prog="plan.py table", description=table.__doc__)
    parser.add_argument("--scaling", action="store_true", help="a row for each file, against the first of its config")
    parser.add_argument("files", nargs="+", type=Path, help="results of --json, in the order of the columns")
    plans: list[dict] = []
    text = ""
    args = parser.parse_args(argv)
    for file in args.files:
        try:
            found = json.loads(file.read_text())
            plans += found.get("sweep", [found])
            text = text_report.scaling(plans) if args.scaling else text_report.markdown(plans)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{file} is not a result of plan.py ({type(e).__name__}: {e})") from e
    print(text)
    return 0


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if argv and argv[0] == "table":
        return table(argv[1:])
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", required=True, help="v5p:4x4x8, v5p-256, v5e-256, v6e:16x16, h100:8x4")
    parser.add_argument(
        "--slices", type=int, default=1, help="slices of that topology, joined by the data-centre network"
    )
    parser.add_argument("--batch", type=int, help="global batch: short for --config.batch_size")
    parser.add_argument("--with-r1", action="store_true", help="compile the step with R1 too: about twice the time")
    parser.add_argument("--effort", type=float, default=-1.0, help="of the compiler for a fast program, -1 to 1")
    parser.add_argument("--memory-effort", type=float, help="of the compiler for a small program, -1 to 1")
    parser.add_argument(
        "--sweep", help="FIELD:VALUE,VALUE;FIELD:VALUE: all combinations; --json keeps them as they come"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path)
    args, unknown = parser.parse_known_args(argv)
    topology.prepare_environment()
    for file in (args.json, args.html):
        cli.writable(file)
    for name in ("effort", "memory_effort"):
        value = getattr(args, name)
        if value is not None and not -1 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')}={value:g}: from -1 (least) to 1 (most)")
    where = topology.parse(args.topology, args.slices)
    settings = compile.Settings(args.with_r1, args.effort, args.memory_effort)
    overrides = cli.config_overrides(unknown)
    if args.batch is not None:
        overrides.append(f"--config.batch_size={args.batch}")

    def load(point: dict[str, str]) -> Config:
        return cli.load_config(args.config, [*overrides, *(f"--config.{k}={v}" for k, v in point.items())])

    def run(config: Config) -> dict:
        return compile.plan(config, where, settings) | {"asked": args.topology}

    if args.sweep is not None:
        if args.html:
            raise UserError("--html is of one plan, not of a --sweep")

        def point(p: dict[str, str]):  # type: ignore[no-untyped-def]
            config = load(p)
            return sweep.key(config, where, settings), lambda: run(config)

        points = sweep.grid(args.sweep)
        load({})  # what is wrong without the sweep is an error, not a row
        print(sweep.text(sweep.sweep(points, point, args.json)))
        return 0
    out = run(load({}))
    print(text_report.report(out))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    if args.html:
        args.html.write_text(html_report.page(out), encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.main(verb)

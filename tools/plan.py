"""Compiles the real train step for accelerators that are not at hand, and reports the compiler's estimates.

    python tools/plan.py --config=configs/laion.py --topology=v5p:4x4x8 [--batch=1024] [--config.key=value] [--with-r1]
                         [--json=FILE] [--html=FILE] [--sweep='mesh.fsdp:1,8,64;batch_size:512,1024']
    python tools/plan.py table [--scaling] results/*.json
    python tools/plan.py compact results/*.json > plans.jsonl

It needs the libtpu of `pip install -e '.[tpu]'`, and no TPU. Every printed time is the compiler's estimate. XLA
compiles for a GPU (h100:8x4) only where there is one: then the plan has memory before temporaries and FLOPs. See
docs/planning.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from gigagan_jax import cli
from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.planning import compile, html_report, sweep, text_report, topology

# What reading a file raises that is no result: it is missing, no JSON, or JSON of another form.
_BAD_RESULT = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _read_results(file: Path) -> list[dict]:
    """The plans of a result of --json (one plan or a sweep), or of a .jsonl file with one plan a line."""
    text = file.read_text()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    found = json.loads(text)
    return found.get("sweep", [found])


def compact_plans(argv: Sequence[str]) -> int:
    """Prints results of --json as one line a plan, without the lists of modules and exchanges."""
    parser = cli.Parser(prog="plan.py compact", description=compact_plans.__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="results of --json")
    for file in parser.parse_args(argv).files:
        try:
            lines = [json.dumps(text_report.compact_plan(plan)) for plan in _read_results(file)]
        except _BAD_RESULT as e:
            raise UserError(f"{file} is not a result of plan.py ({type(e).__name__}: {e})") from e
        print("\n".join(lines))
    return 0


def print_table(argv: Sequence[str]) -> int:
    """Prints a Markdown table of results: configs by topologies, or one config on more and more chips."""
    parser = cli.Parser(prog="plan.py table", description=print_table.__doc__)
    parser.add_argument("--scaling", action="store_true", help="a row for each plan, against the first of its config")
    parser.add_argument("files", nargs="+", type=Path, help="results of --json or compact, in the order of the columns")
    plans: list[dict] = []
    text = ""
    args = parser.parse_args(argv)
    for file in args.files:
        try:
            plans += _read_results(file)
            # The table is made after each file, so that the error names the file that does not fit.
            text = text_report.scaling_table(plans) if args.scaling else text_report.markdown_table(plans)
        except _BAD_RESULT as e:
            raise UserError(f"{file} is not a result of plan.py ({type(e).__name__}: {e})") from e
    print(text)
    return 0


_COMMANDS = {"table": print_table, "compact": compact_plans}


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    # Both commands read files only, so they need neither --config nor libtpu.
    if argv and argv[0] in _COMMANDS:
        return _COMMANDS[argv[0]](argv[1:])
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
    # JAX reads these variables when it first looks for devices, so they are set before anything else.
    topology.prepare_environment()
    # A plan takes minutes: a file that cannot be written is an error before it, not after it.
    for file in (args.json, args.html):
        cli.check_writable(file)
    for name in ("effort", "memory_effort"):
        value = getattr(args, name)
        if value is not None and not -1 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')}={value:g}: from -1 (least) to 1 (most)")
    where = topology.parse_topology(args.topology, args.slices)
    settings = compile.CompileSettings(args.with_r1, args.effort, args.memory_effort)
    overrides = cli.collect_overrides(unknown)
    if args.batch is not None:
        overrides.append(f"--config.batch_size={args.batch}")

    # A point of the sweep wins over the command line's overrides: later flags replace earlier ones.
    def load_point(point: dict[str, str]) -> Config:
        return cli.load_config(args.config, [*overrides, *(f"--config.{k}={v}" for k, v in point.items())])

    def plan_config(config: Config) -> dict:
        return compile.plan_run(config, where, settings) | {"asked": args.topology}

    if args.sweep is not None:
        if args.html:
            raise UserError("--html is of one plan, not of a --sweep")

        def prepare_point(point: dict[str, str]):  # type: ignore[no-untyped-def]
            config = load_point(point)
            return sweep.plan_key(config, where, settings), lambda: plan_config(config)

        points = sweep.parse_grid(args.sweep)
        # A config that is wrong without the sweep is an error of the command, not a row of its table.
        load_point({})
        print(sweep.format_sweep(sweep.run_sweep(points, prepare_point, args.json)))
        return 0
    plan = plan_config(load_point({}))
    print(text_report.format_plan(plan))
    if args.json:
        args.json.write_text(json.dumps(plan, indent=1) + "\n")
    # The page has characters outside ASCII, and the locale's encoding may not.
    if args.html:
        args.html.write_text(html_report.render_page(plan), encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.main(verb)

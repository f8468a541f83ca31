"""Prepares data for training: looks at it, indexes it, writes it anew, embeds its captions.

    python tools/prepare_data.py index   --path='data/{00000..00123}.tar'
    python tools/prepare_data.py check   --path=data --sample=10000 --report=bad.jsonl
    python tools/prepare_data.py stats   --path=data --sample=50000 --out=stats.html
    python tools/prepare_data.py convert --path=data --to=arrayrecord --out=records
    python tools/prepare_data.py embed   --config=configs/laion.py --path=data --out=embeddings
    python tools/prepare_data.py emoji   --packages=DIR,DIR... --size=32 --out=data/emoji
    python tools/prepare_data.py photographs --train=A.deb,B.whl --test=C.deb --out=data/photographs

The data is what --path names (a folder of images, tars, ArrayRecord or Parquet files, a tfds data set; its kind is found by
its files), or what a config trains on: --config=configs/laion.py --config.data.path=data. With --path alone captions are
optional; --config.data.KEY=VALUE sets anything else, filters too: --config.data.filters.min_width=512.

Work is done in processes, one for each core (--workers). Past one machine the same tasks run as an Apache Beam pipeline
(pip install -e '.[beam]'), with Beam's own flags after --:

    python tools/prepare_data.py convert --path='gs://bucket/{00000..09999}.tar' --config.data.index=/shared/index \\
        --to=arrayrecord --out=gs://bucket/records --runner=FlinkRunner -- --flink_master=host:8081 --parallelism=64

--runner=DirectRunner is Beam on this machine. Workers of other runners need this package, and must see the data, its index
and --out (or --work) under the same names.
"""

# Worker processes import this file anew: what is heavy is imported by the task that needs it.
import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigagan_jax.config import Config
    from gigagan_jax.data.source import Source
    from gigagan_jax.preparation.output import Output

TASKS = {
    "index": "index tars, apply filters, and say how many examples each leaves",
    "check": "decode a sample or everything and say what is wrong; exit code 1 where too much is",
    "convert": "write the data as tars, folders or ArrayRecord",
    "stats": "a page with sizes, captions and yields",
    "embed": "text embeddings ahead of time, for --config.data.embeddings=DIR",
    "emoji": "draw emoji sets as captioned tars, for configs/emoji.py",
    "photographs": "cut photographs of packages into tars of patches, and keep others whole, for upsamplers",
}
# Tasks whose data is not a config's.
MADE = ("emoji", "photographs")
EXAMPLES = {
    "index": """examples:
  python tools/prepare_data.py index --path='data/{00000..00123}.tar' --workers=16
  python tools/prepare_data.py index --path='gs://bucket/{00000..01234}.tar' --config.data.index=index \\
      --config.data.filters.min_width=512 --config.data.filters.min_aesthetic=5""",
    "check": """examples:
  python tools/prepare_data.py check --path=photos
  python tools/prepare_data.py check --config=configs/laion.py --path=data --sample=10000 --report=bad.jsonl""",
    "convert": """examples:
  python tools/prepare_data.py convert --path=photos --to=tar --out=tars
  python tools/prepare_data.py convert --path=data --to=arrayrecord --out=records --check_images
  python tools/prepare_data.py convert --path=data --to=arrayrecord --out=records --runner=DirectRunner -- \\
      --direct_num_workers=8 --direct_running_mode=multi_processing

The same command goes on where it was stopped: shards that are whole are not made again. Images are copied as they are
stored. What cannot be read is left out and named in OUT/left_out.jsonl. A folder keeps no labels, and no format keeps
metadata columns: apply filters now.""",
    "stats": """examples:
  python tools/prepare_data.py stats --path=photos --out=stats.html
  python tools/prepare_data.py stats --config=configs/laion.py --path=data --sample=50000 --check_images""",
    "embed": """example:
  python tools/prepare_data.py embed --config=configs/laion.py --path=data --out=embeddings

Runs the config's frozen text encoder (and the text tower of the contrastive loss) over every caption. The same command goes
on where it was stopped.""",
    "emoji": """example:
  for set in noto noto-v1 twemoji openmoji fluent-emoji-flat fluent-emoji emojione; do
    npm pack @iconify-json/$set && mkdir -p sets/$set && tar xzf iconify-json-$set-[0-9]*.tgz -C sets/$set
  done
  python tools/prepare_data.py emoji --packages='sets/*' --size=32 --out=data/emoji

Needs pip install -e '.[emoji]'. OUT/train has the cells (concepts in styles) of training, OUT/held_out the tenth that is
left out of it, each with its licence in its .json. The same command goes on where it was stopped.""",
    "photographs": """example:
  apt-get download plasma-workspace-wallpapers lomiri-wallpapers-20.04 lomiri-wallpapers-16.04 mate-backgrounds
  pip download --no-deps scikit-image scikit-learn
  python tools/prepare_data.py photographs --train='plasma-*.deb,lomiri-*-20.04_*.deb,scikit_*.whl' \\
      --test='lomiri-*-16.04_*.deb,mate-*.deb' --out=data/photographs

OUT/train has tars of patches without captions (--config.data.captions=optional), OUT/test whole photographs and manifest.json,
OUT/PROVENANCE.txt the package, licence and author of each. Folders of images are read too. The same command goes on where it
was stopped.""",
}


def parsers(base: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The command line, with a class of parsers whose errors are one line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = base(description=__doc__, formatter_class=raw)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    by_name = {
        name: tasks.add_parser(name, help=text, description=text, epilog=EXAMPLES[name], formatter_class=raw)
        for name, text in TASKS.items()
    }
    for name, p in by_name.items():
        if name not in MADE:
            p.add_argument("--config", default="", help="FILE.py[:variant]; fields by --config.key=value")
            p.add_argument("--path", default="", help="the data: sets config.data.path")
        if name != "embed":
            p.add_argument("--workers", type=_count, default=0, help="processes; 0: one for each core (default)")
        if name in ("check", "stats"):
            p.add_argument("--sample", type=_count, default=0, help="examples to draw at random; 0: all (default)")
            p.add_argument("--seed", type=_count, default=0, help="of the sample")
            p.add_argument(
                "--work",
                default="",
                help="folder for what tasks find: resumes, and other machines share it; a new one when files have changed",
            )
        if name in ("check", "stats", "convert"):
            p.add_argument("--runner", help="an Apache Beam runner instead of processes; its flags after --")
        if name in ("stats", "convert"):
            p.add_argument(
                "--check_images", action="store_true", help="decode images, and leave out those that are broken"
            )
    by_name["check"].add_argument("--report", type=Path, help="file for a line of JSON about each bad example")
    by_name["check"].add_argument(
        "--max_bad_fraction", type=float, help="share that is healthy (default: the config's)"
    )
    by_name["stats"].add_argument("--out", type=Path, default=Path("stats.html"), help="the page; beside it FILE.json")
    c = by_name["convert"]
    c.add_argument("--to", required=True, choices=("arrayrecord", "tar", "folder"), help="what to write")
    c.add_argument("--out", required=True, help="folder to write to; an address (gs://, s3://) too")
    c.add_argument("--shard_size", type=_count, default=10_000, help="examples of a shard (default 10000)")
    c.add_argument("--name", default="images", help="of the data set, in names of ArrayRecord files")
    by_name["embed"].add_argument("--out", required=True, help="folder to write to")
    e = by_name["emoji"]
    e.add_argument(
        "--packages", required=True, help="folders of unpacked Iconify packages, commas between; or a pattern"
    )
    e.add_argument("--size", type=_count, default=32, help="side of a picture in pixels (32)")
    e.add_argument("--out", required=True, help="folder to write to")
    e.add_argument(
        "--concepts", choices=("64", "all"), default="64", help="64 of the list, or all that every set draws"
    )
    e.add_argument(
        "--hold_out",
        default="cells",
        help="what training never shows, commas between: cells (a tenth), concepts (a tenth), styles by name (cells)",
    )
    e.add_argument("--tags", default="", help="folder of the npm package openmoji: tags for one more wording")
    add_photograph_flags(by_name["photographs"])
    return parser


def add_photograph_flags(p: argparse.ArgumentParser) -> None:
    """The flags of the task photographs."""
    places = ".deb and .whl files, folders of unpacked packages or of images; commas between; patterns"
    p.add_argument("--train", default="", help=f"to cut into patches: {places}")
    p.add_argument("--test", default="", help="to keep whole: the same")
    p.add_argument("--out", required=True, help="folder to write to")
    p.add_argument("--size", type=_count, default=256, help="side of a patch in pixels (256)")
    p.add_argument("--reductions", default="1,2,4", help="patches are of photographs so many times smaller (1,2,4)")
    p.add_argument(
        "--least_energy", type=float, default=20.0, help="squared grey levels of gradients below which it is flat (20)"
    )
    p.add_argument("--most", type=_count, default=400, help="patches of one photograph (400)")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def read_config(args: argparse.Namespace, unknown: Sequence[str]) -> "Config":
    """The config that --config, --path and --config.key=value ask for.

    Raises:
      UserError: neither --config nor --path, or what `cli.load_config` raises.
    """
    from ml_collections import ConfigDict

    from gigagan_jax import cli
    from gigagan_jax.config import DataConfig, from_dict
    from gigagan_jax.core.errors import UserError

    overrides = cli.collect_overrides(unknown)
    if args.path:
        overrides.append(f"--config.data.path={args.path}")
    if args.config:
        return cli.load_config(args.config, overrides)
    if not any(
        o.startswith(("--config.data.path=", "--config.data.mixture=", "--config.data.source=")) for o in overrides
    ):
        raise UserError(f"{args.task}: what data? name it by --path=PATTERN or by --config=FILE.py (see --help)")
    values = ConfigDict({"data": dataclasses.asdict(DataConfig(captions="optional"))})
    for text in overrides:
        name, _, value = text.removeprefix("--config.").partition("=")
        cli.override_field(values, name, value)
    return from_dict(values)


def index(config: "Config", workers: int) -> int:
    """Opens the data set, which indexes what needs an index."""
    from gigagan_jax.data.sources.mixture import MixtureSource
    from gigagan_jax.data.sources.tar import TarSource

    source = open_source(config, workers, refresh=True)
    for part in source.parts if isinstance(source, MixtureSource) else (source,):
        if isinstance(part, TarSource):
            table = f"{part.format_filter_report()}\n" if part.filter_report else ""
            print(f"{table}{part.report}\nindex: {part.index.folder}")
        else:
            kind = type(part).__name__.removesuffix("Source").lower()
            print(f"{len(part)} examples; data of this kind ({kind}) needs no index")
    return 0


def open_source(config: "Config", workers: int, refresh: bool = False, scratch: Path | None = None) -> "Source":
    """The config's data set; what its path holds is printed first. Raises UserError as `make_source` does.

    `scratch` takes the index of tars that lie where nothing can be written.
    """
    from gigagan_jax.data.sources import make_source

    return make_source(
        config.data,
        condition=config.condition,
        workdir=scratch,
        workers=workers,
        refresh=refresh,
        report=print_report,
    )


def print_report(text: str) -> None:
    """Prints what a path holds at once, before the work on it begins."""
    print(text, flush=True)


def check(config: "Config", args: argparse.Namespace, how: dict[str, Any]) -> int:
    """The doctor; 1 where the data is not healthy."""
    from gigagan_jax import cli
    from gigagan_jax.preparation.check import check_source

    cli.check_writable(args.report)
    limit = config.data.max_bad_fraction if args.max_bad_fraction is None else args.max_bad_fraction
    # The verdict is on every cause together: a folder that lacks captions is counted, not refused.
    data = dataclasses.replace(config.data, max_bad_fraction=1.0)
    source = open_source(dataclasses.replace(config, data=data), args.workers, scratch=args.scratch)
    said, healthy = check_source(
        source,
        sample=args.sample,
        seed=args.seed,
        max_bad_fraction=limit,
        report=args.report,
        results=work(args),
        **how,
    )
    print(said)
    return 0 if healthy else 1


def convert(config: "Config", args: argparse.Namespace, how: dict[str, Any]) -> int:
    """Writes the data anew; 1 where nothing of it could be read."""
    from gigagan_jax.core.formatting import format_bytes
    from gigagan_jax.preparation.convert import LEFT_OUT, convert_source
    from gigagan_jax.preparation.output import Output

    source = open_source(config, args.workers, scratch=args.scratch)
    out = Output(args.out)
    done = convert_source(
        source, out, args.to, name=args.name, shard_size=args.shard_size, check_images=args.check_images, **how
    )
    print(f"{done['examples']} examples in {done['shards']} shards, {format_bytes(done['bytes'])}, in {out}")
    if done["left_out"]:
        causes = ", ".join(f"{n} {cause}" for cause, n in done["left_out"].items())
        print(f"left out: {causes}; each is named in {out}/{LEFT_OUT}")
    if args.to == "folder" and getattr(source, "has_labels", config.condition == "class"):
        print("the labels are not in the folder: tars and ArrayRecord keep them")
    return 0 if done["examples"] else 1


def stats(config: "Config", args: argparse.Namespace, how: dict[str, Any]) -> int:
    """The page."""
    from gigagan_jax import cli
    from gigagan_jax.core.formatting import format_percent
    from gigagan_jax.preparation.stats import write_stats

    cli.check_writable(args.out)
    source = open_source(config, args.workers, scratch=args.scratch)
    said = write_stats(
        source,
        args.out,
        title=config.data.title,
        sample=args.sample,
        seed=args.seed,
        check_images=args.check_images,
        results=work(args),
        **how,
    )
    bad = said["examples"] - said["good"]
    print(
        f"{said['examples']} of {said['total']} examples, {bad} bad ({format_percent(bad / max(1, said['examples']))})"
    )
    print(f"open {args.out} in a browser; the numbers are in {args.out.with_suffix('.json')}")
    return 0


def embed(config: "Config", args: argparse.Namespace) -> int:
    """Embeddings of all captions."""
    from gigagan_jax import cli
    from gigagan_jax.preparation.embed import embed_captions
    from gigagan_jax.training.input_pipeline import make_data_source

    embed_captions(config, make_data_source(config), cli.local_folder(args.out))
    return 0


def emoji(args: argparse.Namespace) -> int:
    """Tars of emoji; 1 where nothing could be drawn."""
    from glob import glob

    from gigagan_jax.core.errors import UserError
    from gigagan_jax.preparation.convert import LEFT_OUT, convert_source
    from gigagan_jax.preparation.emoji import CONCEPTS, EmojiSource, read_set, read_tags
    from gigagan_jax.preparation.output import Output

    names = [name for part in args.packages.split(",") for name in (sorted(glob(part)) if "*" in part else [part])]
    if not names:
        raise UserError(f"--packages={args.packages}: no folder has such a name")
    sets = [read_set(name) for name in names]
    tags = read_tags(args.tags) if args.tags else {}
    concepts = CONCEPTS if args.concepts == "64" else ()
    hold_out = tuple(filter(None, args.hold_out.split(",")))
    drawn = 0
    for part in ("train", "held_out"):
        source = EmojiSource(sets, args.size, concepts=concepts, part=part, hold_out=hold_out, tags=tags)
        out = Output(args.out).subfolder(part)
        done = convert_source(source, out, "tar", shard_size=1000, workers=args.workers)
        print(f"{part}: {done['examples']} pictures of {len(source.concepts)} concepts, in {out}")
        if done["left_out"]:
            print(f"{part}: {sum(done['left_out'].values())} could not be drawn; each is named in {out}/{LEFT_OUT}")
        drawn += done["examples"]
    licences = "".join(f"{s.prefix} ({s.style} style): {s.license}, {s.author}\n" for s in sets)
    Output(args.out).write_text("LICENSES.txt", licences)
    return 0 if drawn else 1


def photographs(args: argparse.Namespace) -> int:
    """Tars of patches, whole photographs, and where they come from."""
    from gigagan_jax.core.errors import UserError
    from gigagan_jax.preparation import photographs as library
    from gigagan_jax.preparation.convert import convert_source
    from gigagan_jax.preparation.output import Output

    train = library.read_photographs(expand_places(args.train, "--train"))
    test = library.read_photographs(expand_places(args.test, "--test"))
    if not train and not test:
        raise UserError("photographs: which ones? name packages or folders by --train and --test (see --help)")
    library.check_apart(train, test)
    out = Output(args.out)
    if train:
        try:
            reductions = tuple(int(text) for text in args.reductions.split(","))
        except ValueError as error:
            raise UserError(f"--reductions={args.reductions}: whole numbers, commas between") from error
        source = library.PatchSource(
            train, args.size, reductions=reductions, least_energy=args.least_energy, most=args.most
        )
        done = convert_source(source, out.subfolder("train"), "tar", shard_size=1000, workers=args.workers)
        print(
            f"train: {done['examples']} patches of {len(train)} photographs, in {out.subfolder('train')}; {source.flat} are flat"
        )
    if test:
        print(f"test: {library.write_photographs(test, out.subfolder('test'))} photographs, in {out.subfolder('test')}")
    out.write_text("PROVENANCE.txt", library.provenance({"train": train, "test": test}))
    out.clear_scratch()
    return 0


def expand_places(text: str, flag: str) -> list[str]:
    """The paths of a flag: commas between, patterns expanded. Raises UserError where nothing has such a name."""
    from glob import glob

    from gigagan_jax.core.errors import UserError

    places = []
    for part in filter(None, text.split(",")):
        found = sorted(glob(part))
        if not found:
            raise UserError(f"{flag}={part}: no file or folder has such a name")
        places += found
    return places


def work(args: argparse.Namespace) -> "Output | None":
    """--work, where it is given."""
    from gigagan_jax.preparation.output import Output

    return Output(args.work) if args.work else None


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    from gigagan_jax import cli
    from gigagan_jax.core.errors import UserError
    from gigagan_jax.telemetry.console import configure_logging

    argv, beam_args = list(argv), []
    if "--" in argv:
        place = argv.index("--")
        argv, beam_args = argv[:place], argv[place + 1 :]
    args, unknown = parsers(cli.Parser).parse_known_args(argv)
    runner = getattr(args, "runner", None)
    if beam_args and not runner:
        raise UserError(f"{beam_args[0]}: flags after -- are Apache Beam's; name its runner by --runner=DirectRunner")
    if args.task == "embed" and not args.config:
        raise UserError("embed: whose text encoder? name the config by --config=FILE.py (see --help)")
    if args.task in MADE:
        if unknown:
            raise UserError(f"{unknown[0]}: {args.task} has no such flag (see --help)")
        configure_logging()
        return {"emoji": emoji, "photographs": photographs}[args.task](args)
    config = read_config(args, unknown)
    configure_logging()
    if args.task == "index":
        return index(config, args.workers)
    if args.task == "embed":
        return embed(config, args)
    how = {"workers": args.workers, "runner": runner, "beam_args": beam_args}
    with tempfile.TemporaryDirectory(prefix="gigagan_index_") as scratch:
        # Machines of a runner do not see this one's temporary folder.
        args.scratch = None if runner else Path(scratch)
        return {"check": check, "convert": convert, "stats": stats}[args.task](config, args, how)


if __name__ == "__main__":
    from gigagan_jax import cli

    cli.main(verb, sys.argv[1:])

"""Independent tasks, one for each shard: in processes of this machine, or on many machines as an Apache Beam pipeline."""

import concurrent.futures
import contextlib
import io
import json
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import parallel
from gigagan_jax.preparation.output import Output

_log = logging.getLogger(__name__)
EMBEDDED = ("DirectRunner", "FnApiRunner", "EmbeddedRunner")  # they run in this process, or in children of it


def run_tasks(
    task: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int = 0,
    runner: str | None = None,
    beam_args: Sequence[str] = (),
    results: Output | None = None,
    is_whole: Callable[[Any, Any], bool] | None = None,
    title: str,
    quiet: bool = False,
) -> list[Any]:
    """task(item) for each item; the same function whatever runs it, so what it writes does not depend on that.

    Args:
      task: can be pickled, as its items; returns what JSON can hold.
      items: one for each task.
      workers: processes without a runner; 0: one for each core, 1: this one.
      runner: name of an Apache Beam runner ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner", ...).
      beam_args: flags for Beam. Runners on other machines need this package there, by Beam's own flags.
      results: folder in which each task's result is kept, by its place in `items`: a task that has one is not run again. It
        must be seen by all machines that run tasks.
      is_whole: (item, kept result) to whether what the task wrote is still there; None: it is.
      title: what is being done.
      quiet: without progress.

    Returns:
      results in the order of the items

    Raises:
      UserError: apache_beam is missing, or refuses its flags; a task raised one.
    """
    if runner is None and results is None:
        return list(parallel(task, items, workers, title, quiet))
    if results is None:
        if runner not in EMBEDDED:
            raise UserError(
                f"--runner={runner} needs a folder that all its machines see for what they find: name one by --work"
            )
        with tempfile.TemporaryDirectory() as folder:
            return run_tasks(
                task, items, runner=runner, beam_args=beam_args, results=Output(folder), title=title, quiet=quiet
            )
    kept = dict(enumerate(_kept(results, range(len(items)))))
    todo = [
        (i, item)
        for i, item in enumerate(items)
        if "result" not in kept[i] or not (is_whole is None or is_whole(item, kept[i]["result"]))
    ]
    if len(todo) < len(items) and not quiet:
        _log.info("%s: %d of %d were done before", title, len(items) - len(todo), len(items))
    if todo:
        results.clear_scratch()
        call = _Keep(task, results)
        if runner is None:
            for error in parallel(call, todo, workers, title, quiet):
                if error:
                    raise UserError(error)
        else:
            _by_beam(call, todo, runner, beam_args, title, quiet)
            if errors := [name for name in results.names() if name.endswith(call.error_suffix)]:
                raise UserError(results.read_text(errors[0]) or f"{title}: {results}/{errors[0]} was removed")
        kept |= zip((i for i, _ in todo), _kept(results, [i for i, _ in todo]), strict=True)
    lost = [i for i, said in kept.items() if "result" not in said]
    if lost:
        raise UserError(
            f"{title}: {len(lost)} of {len(items)} tasks left no result in {results}: does every machine of --runner={runner} "
            "see that folder? The same command runs those again"
        )
    return [kept[i]["result"] for i in range(len(items))]


class _Keep:
    """A task that writes what it returns to a file. Its UserErrors too: a runner would try them again and bury the line.

    Errors lie in files of this run alone: a task that outlived a killed run takes no good result away from the next one.
    """

    def __init__(self, task: Callable[[Any], Any], results: Output):
        self.task, self.results = task, results
        self.error_suffix = f".{uuid.uuid4().hex}.error"

    def __call__(self, numbered: tuple[int, Any]) -> str:
        i, item = numbered
        try:
            result = self.task(item)
        except UserError as e:
            self.results.write_text(f"{i:06d}{self.error_suffix}", str(e))
            return str(e)
        self.results.write_text(_file(i), json.dumps({"result": result}))
        return ""


def _file(i: int) -> str:
    return f"{i:06d}.json"


def _kept(results: Output, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    def read(i: int) -> dict[str, Any]:
        text = results.read_text(_file(i))
        try:
            said = json.loads(text) if text else {}
        except ValueError:  # damaged: the task runs again
            said = {}
        return said if isinstance(said, dict) else {}

    with concurrent.futures.ThreadPoolExecutor(1 if results.local else 32) as pool:
        yield from pool.map(read, numbers)


def _by_beam(
    call: _Keep, items: list[tuple[int, Any]], runner: str, beam_args: Sequence[str], title: str, quiet: bool
) -> None:
    beam = _import_beam(runner)
    from apache_beam.options.pipeline_options import PipelineOptions

    chosen: Any = runner
    if runner in EMBEDDED:
        # By its short name Beam would first try to download a runner written in Go.
        from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

        chosen = FnApiRunner()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # its argparse prints all flags there are, and leaves the program
            options = PipelineOptions(list(beam_args))
            options.get_all_options()
        pipeline = beam.Pipeline(runner=chosen, options=options)
    except (SystemExit, ValueError, ImportError, AttributeError) as e:
        why = said.getvalue().strip().splitlines()[-1:] if isinstance(e, SystemExit) else [str(e)]
        raise UserError(f"--runner={' '.join([runner, *beam_args])}: Apache Beam refuses: {' '.join(why)}") from None
    if not quiet:
        _log.info("%s: %d tasks by Apache Beam's %s", title, len(items), runner)
    # The shuffle parts what Create made from what is done with it: otherwise all of it is one worker's.
    _ = pipeline | beam.Create(items) | beam.Reshuffle() | beam.Map(call)
    pipeline.run().wait_until_finish()


def _import_beam(runner: str) -> Any:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # on import it warns of Google's packages that it would use if they were there
    try:
        import apache_beam
        import apache_beam.runners.portability.fn_api_runner.fn_runner
    except ImportError:
        raise UserError(f"--runner={runner} needs Apache Beam: pip install -e '.[beam]'") from None
    finally:
        logging.disable(level)
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    return apache_beam

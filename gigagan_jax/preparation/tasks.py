"""Runs independent tasks: in processes of this machine, or on many machines as an Apache Beam pipeline."""

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
from gigagan_jax.core.processes import map_parallel
from gigagan_jax.preparation.output import Output

_log = logging.getLogger(__name__)
# Runners that work in this process or its children. A temporary folder of this machine serves them.
EMBEDDED = ("DirectRunner", "FnApiRunner", "EmbeddedRunner")


def run_tasks(
    task: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int = 0,
    runner: str | None = None,
    beam_args: Sequence[str] = (),
    results: Output | None = None,
    is_complete: Callable[[Any, Any], bool] | None = None,
    title: str,
    quiet: bool = False,
) -> list[Any]:
    """Calls task(item) for each item. Every runner calls the same function, so outputs do not depend on the runner.

    Args:
      task: picklable, as are its items; returns what JSON can hold.
      items: one for each task.
      workers: processes where there is no runner; 0 means one for each core, 1 means this process.
      runner: name of an Apache Beam runner ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner", ...).
      beam_args: flags for Beam. Runners on other machines need this package there, by Beam's own flags.
      results: folder that keeps each task's result under its place in `items`. A task with a result is not run again.
        All machines that run tasks must see the folder.
      is_complete: called with (item, kept result); False runs the task again, since its output is lost. None keeps all.
      title: of the progress lines.
      quiet: print no progress.

    Returns:
      results in the order of the items

    Raises:
      UserError: apache_beam is missing or refuses its flags, or a task raised a UserError.
    """
    # Nothing to resume: results pass through memory.
    if runner is None and results is None:
        return list(map_parallel(task, items, workers, title, quiet))
    if results is None:
        if runner not in EMBEDDED:
            raise UserError(
                f"--runner={runner} needs a folder that all its machines see for their results: name one by --work"
            )
        with tempfile.TemporaryDirectory() as folder:
            return run_tasks(
                task, items, runner=runner, beam_args=beam_args, results=Output(folder), title=title, quiet=quiet
            )
    # {place in `items`: {"result": ...}, or {} for a task that has none}
    kept = dict(enumerate(_read_results(results, range(len(items)))))
    todo = [
        (i, item)
        for i, item in enumerate(items)
        if "result" not in kept[i] or not (is_complete is None or is_complete(item, kept[i]["result"]))
    ]
    if len(todo) < len(items) and not quiet:
        _log.info("%s: %d of %d were done before", title, len(items) - len(todo), len(items))
    if todo:
        # Also stops tasks of a killed run: they can publish no result after it.
        results.clear_scratch()
        call = _RecordingTask(task, results)
        if runner is None:
            for error in map_parallel(call, todo, workers, title, quiet):
                if error:
                    raise UserError(error)
        else:
            _run_on_beam(call, todo, runner, beam_args, title, quiet)
            # Beam would repeat a failing task and wrap its error, so tasks report UserErrors by files.
            if errors := [name for name in results.list_names() if name.endswith(call.error_suffix)]:
                raise UserError(results.read_text(errors[0]) or f"{title}: {results}/{errors[0]} was removed")
        kept |= zip((i for i, _ in todo), _read_results(results, [i for i, _ in todo]), strict=True)
    # A machine that does not see the folder writes its results elsewhere, without an error.
    lost = [i for i, entry in kept.items() if "result" not in entry]
    if lost:
        raise UserError(
            f"{title}: {len(lost)} of {len(items)} tasks left no result in {results}: does every machine of "
            f"--runner={runner} see that folder? The same command runs those again"
        )
    return [kept[i]["result"] for i in range(len(items))]


class _RecordingTask:
    """A task that writes its result to a file. Returns the message of a UserError, or "".

    UserErrors go to files too: a runner would repeat the task and hide the message in a traceback.
    """

    def __init__(self, task: Callable[[Any], Any], results: Output):
        self.task, self.results = task, results
        # Of this run alone: a task that outlives a killed run must not replace a result of the next one.
        self.error_suffix = f".{uuid.uuid4().hex}.error"

    def __call__(self, numbered: tuple[int, Any]) -> str:
        i, item = numbered
        try:
            result = self.task(item)
        except UserError as e:
            self.results.write_text(f"{i:06d}{self.error_suffix}", str(e))
            return str(e)
        self.results.write_text(_result_file(i), json.dumps({"result": result}))
        return ""


def _result_file(i: int) -> str:
    return f"{i:06d}.json"


def _read_results(results: Output, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    def read_result(i: int) -> dict[str, Any]:
        text = results.read_text(_result_file(i))
        # A damaged file counts as none: the task runs again.
        try:
            entry = json.loads(text) if text else {}
        except ValueError:
            entry = {}
        return entry if isinstance(entry, dict) else {}

    # Reads from a bucket wait for the network. Local reads are faster without threads.
    with concurrent.futures.ThreadPoolExecutor(1 if results.local else 32) as pool:
        yield from pool.map(read_result, numbers)


def _run_on_beam(
    call: _RecordingTask, items: list[tuple[int, Any]], runner: str, beam_args: Sequence[str], title: str, quiet: bool
) -> None:
    # First: it reports a missing package, and it silences Beam's log before the options are imported.
    beam = _import_beam(runner)
    from apache_beam.options.pipeline_options import PipelineOptions

    chosen: Any = runner
    if runner in EMBEDDED:
        # Under its short name, Beam first tries to download a runner written in Go.
        from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

        chosen = FnApiRunner()
    printed = io.StringIO()
    try:
        # For an invalid flag, Beam's argparse prints all its flags and exits the program.
        with contextlib.redirect_stderr(printed):
            options = PipelineOptions(list(beam_args))
            # Parses the flags now. The constructor does not.
            options.get_all_options()
        pipeline = beam.Pipeline(runner=chosen, options=options)
    except (SystemExit, ValueError, ImportError, AttributeError) as e:
        # argparse's last line names the flag.
        why = printed.getvalue().strip().splitlines()[-1:] if isinstance(e, SystemExit) else [str(e)]
        raise UserError(f"--runner={' '.join([runner, *beam_args])}: Apache Beam refuses: {' '.join(why)}") from None
    if not quiet:
        _log.info("%s: %d tasks by Apache Beam's %s", title, len(items), runner)
    # Runners fuse adjacent stages. Without the shuffle, one worker would create and process all items.
    _ = pipeline | beam.Create(items) | beam.Reshuffle() | beam.Map(call)
    # run() returns at once on other machines.
    pipeline.run().wait_until_finish()


def _import_beam(runner: str) -> Any:
    level = logging.root.manager.disable
    # On import, Beam warns about optional Google packages.
    logging.disable(logging.WARNING)
    try:
        import apache_beam
        import apache_beam.runners.portability.fn_api_runner.fn_runner
    except ImportError:
        raise UserError(f"--runner={runner} needs Apache Beam: pip install -e '.[beam]'") from None
    finally:
        logging.disable(level)
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    return apache_beam

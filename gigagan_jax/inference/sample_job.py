"""Samples many prompts into a folder or tars: a job that can be stopped at any moment and goes on by the same command."""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gigagan_jax.config import Config, class_label, describe_classes, needs_prompts
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import count_cores, hold_file_lock
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.data.tokenizers import report_cut_captions
from gigagan_jax.inference.image_encoding import DEFAULT_QUALITY, ENDINGS, encode_image
from gigagan_jax.inference.images import file_name
from gigagan_jax.inference.prompts import Prompt
from gigagan_jax.inference.sample_outputs import Destination, FolderOutput, JobOutput, Sample, TarOutput, json_line
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.inference.upscaler import Upscaler
from gigagan_jax.parallel import communication

_log = logging.getLogger(__name__)

# Batches whose images are encoded while the devices make the next one.
_BATCHES_BEHIND = 3
_MAX_THREADS = 16
# Names that `images.file_name` gives.
_OWN_NAME = re.compile(r"\d{4,}_.*_seed\d+")
# What a difference of two jobs is called, where its values say nothing to people.
_DIGESTS = {"prompts": "other prompts, seeds or names", "weights": "other weights"}


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """The images that are asked for: `num` of each prompt.

    Args:
      prompts: without a condition one, with an empty text.
      num: images of each prompt.
      seed: of the first image.
      own_seeds: each image of the job has a seed of its own, SEED plus its index, as an evaluation needs it; otherwise the
        images of each prompt have the seeds SEED, SEED + 1, ... A prompt's own seed is the one of its first image.

    Raises:
      UserError: a name of a prompt could be that of another one's image.
    """

    prompts: Sequence[Prompt]
    num: int
    seed: int = 0
    own_seeds: bool = False

    def __post_init__(self) -> None:
        # Names of a file are distinct among themselves: `read_prompts` has seen to that.
        named = [p for p in self.prompts if p.name is not None]
        for prompt in named if len(named) < len(self.prompts) else ():
            if _OWN_NAME.fullmatch(str(prompt.name)):
                raise UserError(f"{prompt.where}the name {prompt.name} may be that of a prompt without one: change it")

    def __len__(self) -> int:
        return len(self.prompts) * self.num

    def __iter__(self) -> Iterator[Sample]:
        return map(self.sample, range(len(self)))

    def sample(self, index: int) -> Sample:
        """An image of the job; the images of a prompt follow each other."""
        prompt, number = self.prompts[index // self.num], index % self.num
        first = prompt.seed if prompt.seed is not None else self.seed
        # Seeds have 32 bits.
        seed = (first + (index if self.own_seeds and prompt.seed is None else number)) % 2**32
        if prompt.name is None:
            # Names sort in the order of the job.
            name = file_name(index, prompt.text, seed, "", max(4, len(str(len(self) - 1))))
        else:
            # Of one image the name as it was given: others look for their reference images by it.
            name = prompt.name if self.num == 1 else f"{prompt.name}_{number:0{len(str(self.num - 1))}d}"
        return Sample(index, name, prompt.text, seed)


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How images are made and written.

    Attributes:
      truncation, global_truncation: as `TextToImage` takes them.
      quality: of JPEG and WebP, 1 to 100.
      upsampler: enlarges the images; None for none.
      upsampler_noise: level of noise augmentation before it.
    """

    truncation: float = 1.0
    global_truncation: float = 1.0
    quality: int = DEFAULT_QUALITY
    upsampler: Upscaler | None = None
    upsampler_noise: float = 0.0

    def describe(self, model: TextToImage) -> dict[str, str]:
        """What the metadata of every image say."""
        about = {"model": model.config.name, "step": str(model.step), "truncation": f"{self.truncation:g}"}
        about |= {"global_truncation": f"{self.global_truncation:g}"}
        if self.upsampler is not None:
            about |= {"upsampler": self.upsampler.config.name, "upsampler_step": str(self.upsampler.step)}
            about |= {"upsampler_noise": f"{self.upsampler_noise:g}"}
        return about


def check_job(config: Config, prompts: Sequence[Prompt]) -> None:
    """Checks prompts by the config of a model, before its weights are read.

    Args:
      config: of the model.
      prompts: as they were given; none for an unconditional model.

    Raises:
      UserError: there are none and the model needs some, the reverse, or one of them is no class.
    """
    if not needs_prompts(config):
        if prompts:
            raise UserError(
                f"{config.name} was trained without captions and classes: leave --prompt and --prompts out; --num says how many "
                "images"
            )
        return
    if not prompts:
        what = "text" if config.condition == "text" else f"a class; {describe_classes(config)}"
        raise UserError(
            f"no prompt: give --prompt=TEXT, or --prompts=FILE with one a line; {config.name} makes images of {what}"
        )
    if config.condition == "class":
        for prompt in prompts:
            try:
                class_label(config, prompt.text)
            except UserError as e:
                raise UserError(f"{prompt.where}{e}") from None


def report_cut_prompts(model: TextToImage, job: SampleJob) -> None:
    """Warns of prompts that are longer than the text encoder reads."""
    if model.config.condition == "text" and jax.process_index() == 0:
        report_cut_captions(model.sampler.tokenizer, (p.text for p in job.prompts))


def make_batches(
    model: TextToImage, samples: Sequence[Sample], settings: SampleSettings, full: bool
) -> Iterator[np.ndarray]:
    """The images of samples, uint8 [n, H, W, 3] a batch; see `Sampler.batches`."""
    batches = model.batches(
        _Column(samples, lambda s: s.prompt),
        _Column(samples, lambda s: s.seed),
        truncation=settings.truncation,
        global_truncation=settings.global_truncation,
        full=full,
    )
    start = 0
    for images in batches:
        # The last batch is shorter.
        part = [samples[start + i] for i in range(len(images))]
        start += len(part)
        if settings.upsampler is not None:
            prompts, seeds = [s.prompt for s in part], [s.seed for s in part]
            images = settings.upsampler.enlarge(images, prompts, seeds, settings.upsampler_noise)
        yield images


def run_job(
    model: TextToImage, job: SampleJob, destination: Destination, settings: SampleSettings, *, quiet: bool = False
) -> tuple[int, int]:
    """Samples a job into a folder or tars. What an earlier run of the same job has made is kept.

    Args:
      model: makes the images. With several processes each of them calls this; process 0 writes.
      job: the images.
      destination: of kind "folder" or "tars".
      settings: the rest.
      quiet: show no progress.

    Returns:
      (images made, images that were there)

    Raises:
      UserError: the destination holds another job or other images, another process is at it, or it cannot be written.
    """
    output: JobOutput = FolderOutput(destination) if destination.kind == "folder" else TarOutput(destination, len(job))
    with contextlib.ExitStack() as stack:
        plan: dict[str, Any] = {}
        if jax.process_index() == 0:
            try:
                stack.enter_context(_hold_job(output, _identify(model, job, destination, settings)))
                plan = {"missing": _to_ranges(output.find_missing(job))}
            # All processes must end, and not wait for this one.
            except UserError as e:
                plan = {"error": str(e)}
            except OSError as e:
                plan = {"error": f"{e.filename or destination.path} cannot be read: {e.strerror or e}"}
        plan = communication.broadcast_from_main(plan)
        if "error" in plan:
            raise UserError(plan["error"])
        samples = _Samples(job, plan["missing"])
        kept = len(job) - len(samples)
        if kept:
            _log.info("%d of %d images are there%s", kept, len(job), ": going on" if samples else "")
        writer = _Writer(model, job, output, ENDINGS[destination.ending], settings)
        # Also of a single image: it must not depend on where an earlier run was stopped.
        batches = make_batches(model, samples, settings, full=len(job) > model.sampler.fewest)
        if jax.process_index() != 0:
            # The devices of this process make their share.
            collections.deque(batches, maxlen=0)
        else:
            writer.write_all(samples, batches, quiet)
    return len(samples), kept


class _Writer:
    """Encodes and writes the images of a job in threads, while the devices make more."""

    def __init__(self, model: TextToImage, job: SampleJob, output: JobOutput, kind: str, settings: SampleSettings):
        self._job, self._output, self._kind, self._settings = job, output, kind, settings
        # Of all images the same.
        self._config, self._about = model.config, settings.describe(model)
        self._done = 0

    def write_all(self, samples: _Samples, batches: Iterator[np.ndarray], quiet: bool) -> None:
        """Writes all batches and the metadata. Stopped at any moment, it leaves whole images."""
        missing = samples.ranges
        # Of what is there, whatever an earlier run had time to write.
        self._write_metadata(skip=missing)
        progress: ProgressBar | None = None
        # Threads suffice: the encoders of Pillow release the interpreter's lock.
        pool = concurrent.futures.ThreadPoolExecutor(min(_MAX_THREADS, count_cores()), "encode")
        behind: collections.deque[list[tuple[Sample, concurrent.futures.Future[bytes]]]] = collections.deque()
        start = 0
        try:
            with open(self._output.metadata, "a", encoding="utf-8") as lines:

                def commit_oldest() -> None:
                    for sample, encoded in behind.popleft():
                        line = self._line(sample)
                        # Raises what the thread has raised.
                        self._output.commit(sample, encoded.result(), line)
                        # After the image: a line promises one.
                        lines.write(line)
                        self._done += 1
                        if progress is not None:
                            progress.step()
                    lines.flush()

                for images in batches:
                    # Not before: the rate would count the compiler's time.
                    progress = progress or ProgressBar("sampling", len(samples), " images", quiet=quiet)
                    part = [samples[start + i] for i in range(len(images))]
                    start += len(part)
                    behind.append([(s, pool.submit(self._encode, s, x)) for s, x in zip(part, images, strict=True)])
                    # Bounded: images must not wait in memory for a slow disk.
                    if len(behind) > _BATCHES_BEHIND:
                        commit_oldest()
                while behind:
                    commit_oldest()
        except OSError as e:
            raise UserError(f"{e.filename or self._output.metadata} cannot be written: {e.strerror or e}") from None
        except (KeyboardInterrupt, SystemExit):
            _log.info("stopped after %d of %d images; the same command goes on", self._done, len(samples))
            raise
        finally:
            if progress is not None:
                progress.close()
            # What is half written is finished or removed, and nothing more begun.
            pool.shutdown(cancel_futures=True)
            self._output.close()
        # What was added in gaps is in its place.
        if missing and missing[0][1] < len(self._job):
            self._write_metadata(skip=[])

    def _encode(self, sample: Sample, image: np.ndarray) -> bytes:
        # An empty prompt is one too: the null caption.
        about = self._about | ({"prompt": sample.prompt} if needs_prompts(self._config) else {})
        data = encode_image(image, self._kind, about | {"seed": str(sample.seed)}, self._settings.quality)
        self._output.prepare(sample, data)
        return data

    def _line(self, sample: Sample) -> str:
        # file_name first: readers of Hugging Face's `imagefolder` know it, and take the rest as columns.
        values: dict[str, object] = dict(self._output.locate(sample))
        if needs_prompts(self._config):
            values["prompt"] = sample.prompt
        values["seed"] = sample.seed
        if self._config.condition == "class":
            label = class_label(self._config, sample.prompt)
            values["class"] = label
            if self._config.class_names:
                values["class_name"] = self._config.class_names[label]
        s = self._settings
        values |= {"model": self._config.name, "step": int(self._about["step"])}
        values |= {"truncation": s.truncation, "global_truncation": s.global_truncation}
        if s.upsampler is not None:
            values |= {"upsampler": s.upsampler.config.name, "upsampler_step": s.upsampler.step}
            values |= {"upsampler_noise": s.upsampler_noise}
        return json_line(values)

    def _write_metadata(self, skip: Sequence[Sequence[int]]) -> None:
        """Writes the lines of all images but those of some ranges."""
        file = self._output.metadata
        # Replaced whole: a reader never sees half of it.
        temporary = file.with_name(f".{file.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as lines:
            start = 0
            # The images between the ranges, and those after the last one.
            for begin, end in [*skip, (len(self._job), len(self._job))]:
                lines.writelines(self._line(self._job.sample(i)) for i in range(start, begin))
                start = end
        os.replace(temporary, file)


def _identify(
    model: TextToImage, job: SampleJob, destination: Destination, settings: SampleSettings
) -> dict[str, object]:
    """What makes two jobs the same: the same files would be written."""
    digest = hashlib.sha256()
    for sample in job:
        digest.update(json.dumps([sample.name, sample.prompt, sample.seed]).encode())
    # Of the weights the mean of w: any step of any run has another one.
    w_avg = np.asarray(model.w_avg, np.float32).tobytes()
    # What has no influence on the files is left out.
    jpeg = {"quality": settings.quality} if destination.ending != ".png" else {}
    tars = {"tar": destination.path.name, "shard_size": destination.shard_size} if destination.kind == "tars" else {}
    return {
        "images": len(job),
        **settings.describe(model),
        "format": destination.ending[1:],
        **jpeg,
        **tars,
        "prompts": digest.hexdigest(),
        "weights": hashlib.sha256(w_avg).hexdigest(),
    }


@contextlib.contextmanager
def _hold_job(output: JobOutput, identity: dict[str, object]) -> Iterator[None]:
    """Within it no other process writes the job. Raises UserError where it is another job, or one is at it."""
    folder, record = output.record.parent, output.record

    def refuse() -> None:
        raise UserError(f"another process writes the samples in {folder} now: wait until it has ended")

    with contextlib.ExitStack() as lock:
        # Two of the same command would write the same names, and take each other's temporary files for leftovers.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(hold_file_lock(record, refuse))
        except OSError as e:
            raise UserError(f"--out={folder} cannot be written: {e.strerror or e}; choose another folder") from None
        text = record.read_text(encoding="utf-8")
        # The lock makes the file: it is empty for a new job.
        if not text:
            foreign = output.find_foreign()
            if foreign is not None:
                # Nothing is left behind in somebody's folder.
                record.unlink()
                raise UserError(f"{foreign} is there, and of no job of sample: name another --out, or move it away")
            record.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        else:
            _check_identity(text, identity, record)
        yield


def _check_identity(text: str, identity: dict[str, object], record: Path) -> None:
    try:
        before = json.loads(text)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{record} is damaged: delete it with the samples beside it, or name another --out")
    # Keys of both, in order: an upsampler may be in one of them alone.
    for key in dict.fromkeys((*identity, *before)):
        if before.get(key) != identity.get(key):
            none = "none"
            what = _DIGESTS.get(key) or f"{key} {before.get(key, none)}, and not {identity.get(key, none)}"
            raise UserError(
                f"{record.parent} holds the samples of another job ({what}): name another --out, or delete that folder"
            )


def _to_ranges(indices: Iterable[int]) -> list[list[int]]:
    """[[start, stop], ...] of ascending indices: a message of a few bytes where there are millions."""
    ranges: list[list[int]] = []
    for i in indices:
        if ranges and ranges[-1][1] == i:
            ranges[-1][1] = i + 1
        else:
            ranges.append([i, i + 1])
    return ranges


class _Samples(Sequence[Sample]):
    """Samples of a job by ranges of their indices; made when they are asked for."""

    def __init__(self, job: SampleJob, ranges: list[list[int]]):
        self._job, self.ranges = job, ranges
        # Where each range begins among the samples.
        self._starts = [0, *itertools.accumulate(stop - start for start, stop in ranges)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        # The last range that begins at or before it.
        at = bisect.bisect_right(self._starts, position) - 1
        return self._job.sample(self.ranges[at][0] + position - self._starts[at])


class _Column(Sequence[Any]):
    """One field of samples, which are made when they are asked for."""

    def __init__(self, samples: Sequence[Sample], read: Callable[[Sample], Any]):
        self._samples, self._read = samples, read

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: Any) -> Any:
        return self._read(self._samples[position])

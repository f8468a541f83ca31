"""From a config to its stream of batches on this host."""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.config import Config, TextConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import QUARANTINE_FILE
from gigagan_jax.data import pipeline
from gigagan_jax.data.embeddings import Embeddings
from gigagan_jax.data.source import Source
from gigagan_jax.data.sources import filters, make_source
from gigagan_jax.data.survey import Survey
from gigagan_jax.data.tokenizers import Tokenizer, make_tokenizer
from gigagan_jax.models.pretrained.frozen import clip_length, needs_own_clip_tokens
from gigagan_jax.models.pretrained.text_encoder import tokenizer_options
from gigagan_jax.parallel import communication

_log = logging.getLogger(__name__)


# Cached: hooks open the data again, and one report of each path is enough.
@functools.cache
def _log_report(text: str) -> None:
    _log.info("%s", text)


def make_data_source(
    config: Config, workdir: Path | None = None, surveys: Mapping[str, Survey] | None = None
) -> Source:
    """The config's data set.

    Args:
      config: of a run.
      workdir: takes the index of tars that lie where it cannot be written.
      surveys: {path: survey} of paths that were looked at already.
    """
    d = config.data
    # Opening may index tars, which takes minutes at the first start (docs/data.md).
    source = make_source(d, condition=config.condition, workdir=workdir, report=_log_report, surveys=surveys)
    parts = getattr(source, "parts", (source,))
    if config.condition == "class" and not all(getattr(part, "has_labels", True) for part in parts):
        raise UserError(
            f"{d.path} has no labels, and config.condition='class' needs them; config.condition=none trains without"
        )
    filter_report = getattr(source, "filter_report", None)
    if filter_report:
        _log.info("filters:\n%s", filters.format_report(filter_report))
    return source


def build_shared_index(config: Config, place: RunFolder) -> None:
    """Lets process 0 build the index of tars in a bucket, for all: the processes of a run in a bucket share no folder."""
    data = config.data
    indexed = data.source in ("auto", "tar") and "://" in " ".join((data.path, *data.mixture))
    if place.store is None or jax.process_count() == 1 or not indexed:
        return
    if jax.process_index() == 0:
        make_data_source(config, place.folder)
        place.upload()
    # The others wait here, as they wait for a lock on a disk.
    communication.broadcast_from_main(True)
    if jax.process_index() != 0:
        place.download_programs()


def make_tokenizers(config: Config) -> tuple[Tokenizer, Tokenizer | None]:
    """(of the text encoder, of the CLIP of the contrastive loss where that has tokens of its own)"""
    used = config.used_text
    text = make_tokenizer(used.encoder, used.length, **tokenizer_options(used))
    if not needs_own_clip_tokens(config):
        return text, None
    clip = TextConfig(encoder="clip", path=config.clip_path, length=clip_length(config))
    return text, make_tokenizer("clip", clip.length, **tokenizer_options(clip))


def make_pipeline(
    config: Config, workdir: Path | None, rows: Sequence[int] | None = None, source: Source | None = None
) -> pipeline.Pipeline:
    """The config's stream of batches for this host.

    Args:
      config: of the run.
      workdir: takes the quarantine's list, and indices of data that cannot be written beside it.
      rows: of each batch, those of this host's devices; None for all.
      source: the data where it is open already.
    """
    d = config.data
    source = make_data_source(config, workdir) if source is None else source
    text, clip = make_tokenizers(config)
    # Stored embeddings replace the encoders' tokens; a class-conditional model has none.
    stored = bool(d.embeddings) and config.condition == "text"
    return pipeline.build_pipeline(
        source,
        resolution=config.resolution,
        batch_size=config.batch_size,
        seed=config.seed,
        tokenizer=text,
        # The contrastive loss reads stored embeddings too: its tokens are not needed.
        clip_tokenizer=None if stored else clip,
        embeddings=Embeddings(Path(d.embeddings), config, source) if stored else None,
        crop=d.crop,
        flip=d.flip,
        caption_dropout=d.caption_dropout,
        resize_filter=d.resize_filter,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        # Which rows a host reads depends on its devices' place in the mesh, not on its number.
        rows=rows,
        num_threads=d.threads,
        num_workers=d.workers,
        clean_captions=d.clean_captions,
        fast_decode=d.fast_decode,
        num_classes=config.class_count,
        max_bad_fraction=d.max_bad_fraction,
        quarantine_path=None if workdir is None else workdir / QUARANTINE_FILE,
    )

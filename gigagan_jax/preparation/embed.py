"""`prepare_data.py embed`: runs the frozen text encoders over every caption of a data set ahead of training."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from gigagan_jax.config import Config, MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data import embeddings
from gigagan_jax.data.captions import clean_all
from gigagan_jax.data.embeddings import CaptionEmbedding
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.source import Source
from gigagan_jax.data.tokenizers import Tokenizer
from gigagan_jax.models.network import Params
from gigagan_jax.models.pretrained.frozen import FrozenNetworks
from gigagan_jax.models.pretrained.text_encoder import text_spec
from gigagan_jax.parallel import sharding
from gigagan_jax.training.input_pipeline import make_tokenizers

# Captions of a batch on each device.
DEVICE_BATCH = 32


class Embedder:
    """The frozen text encoders of a config, on all devices of this process."""

    def __init__(self, config: Config):
        self.config = config
        # The config's mesh is that of the training run. Here, every device takes a share of the batch.
        self.mesh = sharding.make_mesh(MeshConfig())
        self.frozen = FrozenNetworks(config, roles=("text", "clip_text"))
        if "text" not in self.frozen.users:
            raise UserError(f"config.text.encoder={config.text.encoder!r} is trained with the model: nothing to embed")
        self.params: Params
        self.params, self.identities = self.frozen.load(self.mesh)
        self.text: Tokenizer
        self.text, self.clip = make_tokenizers(config)
        self.batch = DEVICE_BATCH * jax.device_count()
        self._end = jax.jit(text_spec(config.text).end_position)
        rows = NamedSharding(
            self.mesh, sharding.partition_spec(("batch",), (self.batch,), self.mesh, config.rules, "captions")
        )
        self._rows = rows
        self._run = jax.jit(self._encode_batch)

    def _encode_batch(self, params: Params, tokens: jax.Array, clip_tokens: jax.Array | None) -> dict[str, jax.Array]:
        with sharding.use_mesh(self.mesh, self.config.rules):
            return self.frozen.encode_captions(params, tokens, clip_tokens)

    def __call__(self, captions: Sequence[str]) -> list[CaptionEmbedding]:
        """Computes the embeddings of captions, in batches of one size."""
        encoded: list[CaptionEmbedding] = []
        for start in range(0, len(captions), self.batch):
            some = list(captions[start : start + self.batch])
            # Padded with null captions: another batch size would compile another program.
            full = some + [""] * (self.batch - len(some))
            put = lambda x: jax.device_put(x, self._rows)
            tokens = put(self.text(full))
            clip_tokens = None if self.clip is None else put(self.clip(full))
            arrays = jax.device_get(self._run(self.params, tokens, clip_tokens))
            ends = np.asarray(self._end(tokens))
            for i in range(len(some)):
                clip = arrays["clip_text"][i] if "clip_text" in arrays else None
                # Rows after the end of text carry nothing and are most of the features of a short caption.
                encoded.append(CaptionEmbedding(arrays["features"][i][: ends[i] + 1], clip))
        return encoded


def embed_captions(config: Config, source: Source, out: Path) -> None:
    """Writes the embeddings of every caption of `source` to `out`. Parts that exist are kept.

    Raises:
      UserError: the folder cannot be written, or holds embeddings of another data set or encoder.
    """
    metadata = embeddings.expected_metadata(config, source)
    embedder = Embedder(config)
    begun = out / "begun.json"
    mark = {"of": metadata, "identities": embedder.identities}
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Through JSON and back: tuples become lists, so that both sides compare equal.
        if begun.exists() and json.loads(begun.read_text()) != json.loads(json.dumps(mark)):
            raise UserError(f"--out={out} holds embeddings of another data set or encoder: choose another folder")
        begun.write_text(json.dumps(mark, indent=1))
        null = embedder([""])[0]
        embeddings.write_null(out, null)
        parts = -(-len(source) // embeddings.PART_SIZE)
        began, done = time.monotonic(), 0
        for number in range(parts):
            file = out / embeddings.part_name(number)
            # write_part renames whole files into place, so a part that exists is complete.
            if file.exists():
                continue
            places = range(number * embeddings.PART_SIZE, min(len(source), (number + 1) * embeddings.PART_SIZE))
            captions = [_read_captions(source, i, config.data.clean_captions) for i in places]
            # One call for the part fills the batches. The results are dealt back to their examples in order.
            encoded = iter(embedder([c for example in captions for c in example]))
            examples = [[next(encoded) for _ in example] for example in captions]
            embeddings.write_part(file, examples, null.features.shape[1], null.features.dtype)
            # Parts of an earlier run are not in `done`: the rate is that of this run.
            done += len(places)
            rate = done / (time.monotonic() - began)
            left = (parts - number - 1) * embeddings.PART_SIZE / rate
            print(f"{places.stop} of {len(source)} examples  {rate:.0f}/s  ETA {left:.0f} s", flush=True)
        # Last: readers refuse a folder without its index.
        embeddings.write_index(out, metadata, embedder.identities)
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror or e}") from None
    print(f"embeddings of {len(source)} examples in {out}: train with --config.data.embeddings={out}")


def _read_captions(source: Source, i: int, cleaned: bool) -> tuple[str, ...]:
    try:
        return clean_all(source.captions(i)) if cleaned else source.captions(i)
    # The training run puts the example into quarantine and asks for no embedding of it.
    except BadExample:
        return ()

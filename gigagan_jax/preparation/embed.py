"""`prepare_data.py embed`: what the frozen text encoders say about every caption of a data set, ahead of time."""

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
from gigagan_jax.data.embeddings import Said
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.source import Source
from gigagan_jax.data.tokenizers import Tokenizer
from gigagan_jax.models.network import Params
from gigagan_jax.models.pretrained.frozen import Frozen
from gigagan_jax.models.pretrained.text_encoder import text_spec
from gigagan_jax.parallel import sharding
from gigagan_jax.training.input_pipeline import tokenizers

DEVICE_BATCH = 32


class Embedder:
    """The frozen text encoders of a config, on all devices here."""

    def __init__(self, config: Config):
        self.config = config
        self.mesh = sharding.make_mesh(MeshConfig())
        self.frozen = Frozen(config, roles=("text", "clip_text"))
        if "text" not in self.frozen.users:
            raise UserError(f"config.text.encoder={config.text.encoder!r} is trained with the model: nothing to embed")
        self.params: Params
        self.params, self.identities = self.frozen.load(self.mesh)
        self.text: Tokenizer
        self.text, self.clip = tokenizers(config)
        self.batch = DEVICE_BATCH * jax.device_count()
        self._end = jax.jit(text_spec(config.text).end)
        rows = NamedSharding(self.mesh, sharding.spec(("batch",), (self.batch,), self.mesh, config.rules, "captions"))
        self._rows = rows
        self._run = jax.jit(self._encode)

    def _encode(self, params: Params, tokens: jax.Array, clip_tokens: jax.Array | None) -> dict[str, jax.Array]:
        with sharding.use(self.mesh, self.config.rules):
            return self.frozen.encode(params, tokens, clip_tokens)

    def __call__(self, captions: Sequence[str]) -> list[Said]:
        """Embeddings of captions, in batches of one size."""
        out: list[Said] = []
        for start in range(0, len(captions), self.batch):
            some = list(captions[start : start + self.batch])
            full = some + [""] * (self.batch - len(some))
            put = lambda x: jax.device_put(x, self._rows)
            tokens = put(self.text(full))
            said = jax.device_get(self._run(self.params, tokens, None if self.clip is None else put(self.clip(full))))
            ends = np.asarray(self._end(tokens))
            for i in range(len(some)):
                clip = said["clip_text"][i] if "clip_text" in said else None
                out.append(Said(said["features"][i][: ends[i] + 1], clip))
        return out


def embed(config: Config, source: Source, out: Path) -> None:
    """Writes the embeddings of every caption of `source` to `out`; parts that are there already are kept.

    Raises:
      UserError: the folder cannot be written, or holds embeddings of something else.
    """
    of = embeddings.describe(config, source)
    embedder = Embedder(config)
    begun = out / "begun.json"
    mark = {"of": of, "identities": embedder.identities}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if begun.exists() and json.loads(begun.read_text()) != json.loads(json.dumps(mark)):
            raise UserError(f"--out={out} holds embeddings of another data set or encoder: choose another folder")
        begun.write_text(json.dumps(mark, indent=1))
        null = embedder([""])[0]
        embeddings.write_null(out, null)
        parts = -(-len(source) // embeddings.PART_SIZE)
        began, done = time.monotonic(), 0
        for number in range(parts):
            file = out / embeddings.part_name(number)
            if file.exists():
                continue
            places = range(number * embeddings.PART_SIZE, min(len(source), (number + 1) * embeddings.PART_SIZE))
            captions = [_captions(source, i, config.data.clean_captions) for i in places]
            said = iter(embedder([c for example in captions for c in example]))
            examples = [[next(said) for _ in example] for example in captions]
            embeddings.write_part(file, examples, null.features.shape[1], null.features.dtype)
            done += len(places)
            rate = done / (time.monotonic() - began)
            left = (parts - number - 1) * embeddings.PART_SIZE / rate
            print(f"{places.stop} of {len(source)} examples  {rate:.0f}/s  ETA {left:.0f} s", flush=True)
        embeddings.write_index(out, of, embedder.identities)
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror or e}") from None
    print(f"embeddings of {len(source)} examples in {out}: train with --config.data.embeddings={out}")


def _captions(source: Source, i: int, cleaned: bool) -> tuple[str, ...]:
    try:
        return clean_all(source.captions(i)) if cleaned else source.captions(i)
    except BadExample:
        return ()  # the run puts it into quarantine itself

"""The frozen networks of a config: their selection, sizes, loading and evaluation.

Roles: `text` is E_txt before T. `clip_text` and `clip_image` are the CLIP of the contrastive loss. `vision_aided` is
the image tower under the vision-aided discriminator. `perceptual` is the VGG-16 of the perceptual loss. Two roles with the
same tower and weights share one copy.
Functions take the parameters as an argument. Parameters are sharded, in the precision of the computation, never
donated and never in a checkpoint. A checkpoint holds their identities instead.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gigagan_jax.config import Config, TextConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import Network, Params, is_spec
from gigagan_jax.models.pretrained import clip, dino, t5
from gigagan_jax.models.pretrained.architectures import (
    REQUIREMENTS,
    WITHOUT_CLIP,
    check_architecture,
    open_network,
    read_architecture,
)
from gigagan_jax.models.pretrained.network_files import find_network
from gigagan_jax.models.pretrained.perceptual import build_perceptual, load_perceptual
from gigagan_jax.models.pretrained.text_encoder import text_spec
from gigagan_jax.models.pretrained.weights import Row, load_params
from gigagan_jax.models.vision_aided import RandomProjection


def clip_width(config: Config) -> int:
    """Width P of the shared space of the contrastive loss."""
    return read_architecture("clip", config.clip_path, REQUIREMENTS["clip_text"]).projection_dim


def clip_length(config: Config) -> int:
    """Tokens in a row for the CLIP of the contrastive loss."""
    sizes = read_architecture("clip", config.clip_path, REQUIREMENTS["clip_text"]).text
    return sizes.max_position_embeddings if sizes is not None else 0


def needs_own_clip_tokens(config: Config) -> bool:
    """Whether the contrastive loss needs tokens of its own, because E_txt is no CLIP."""
    return config.uses_clip_loss and config.text.encoder != "clip"


# ---------------------------------------------------------------- towers


@dataclasses.dataclass(frozen=True)
class Tower:
    """One frozen network."""

    role: str
    # clip_text, clip_vision, t5 or dino
    kind: str
    path: str
    sizes: Any
    module: Network


def _make_tower(role: str, kind: str, path: str, config: Config) -> Tower:
    family = kind.partition("_")[0]
    sizes = read_architecture(family, path, REQUIREMENTS[role])
    dtype = jnp.dtype(config.dtype)
    options: dict[str, Any] = {"dtype": dtype, "remat": config.remat}
    if kind == "clip_text":
        if sizes.text is None:
            raise UserError(
                f"{REQUIREMENTS[role].field}={path} is a CLIP without a text tower; {REQUIREMENTS[role].instead}"
            )
        make: Any = lambda rngs: clip.ClipText(sizes.text, sizes.projection_dim, rngs=rngs, **options)
    elif kind == "clip_vision":
        if sizes.vision is None:
            raise _no_images_error(role, path, config)
        # The logit scale belongs to the whole CLIP: files of a vision tower alone lack it.
        full = sizes.text is not None
        make = lambda rngs: clip.ClipVision(sizes.vision, sizes.projection_dim, scaled=full, rngs=rngs, **options)
    elif kind == "t5":
        make = lambda rngs: t5.T5Encoder(sizes, rngs=rngs, **options)
    elif kind == "dino":
        make = lambda rngs: dino.Dino(sizes, rngs=rngs, **options)
    else:
        raise ValueError(f"unknown kind of frozen network {kind!r}")
    return Tower(role, kind, path, sizes, Network(f"{role} ({path})", make))


def _no_images_error(role: str, path: str, config: Config) -> UserError:
    """The error of a CLIP without a vision tower, or without a projection, where a loss needs them."""
    uses = {"loss.clip=(0,0)": config.uses_clip_loss, "loss.vision_aided=0": config.loss.vision_aided > 0}
    # Flags to copy.
    off = " ".join(f"--config.{name}" for name, used in uses.items() if used)
    # The path may be that of the text encoder, which both losses take by default.
    field = REQUIREMENTS[role].field
    return UserError(
        f"{field}={path} is a text tower alone, and a loss needs a whole CLIP: name one by {field}, or switch off what "
        f"needs it by {off}"
    )


def _key_table(tower: Tower, keys: set[str]) -> tuple[list[Row], Any, Any]:
    """(key table, predicate of the tower's tensors, predicate of tensors without learned values)"""
    # A file of a whole CLIP holds both towers: tensors of the other one are neither read nor reported.
    if tower.kind == "clip_text":
        prefix = "text_model." if any(k.startswith("text_model.") for k in keys) else ""
        rows = clip.text_rows(prefix, projection=tower.sizes.projection_dim > 0)
        others = ("vision_model.", "visual_projection.", "logit_scale")
        return rows, lambda k: not k.startswith(others), clip.is_position_number
    if tower.kind == "clip_vision":
        prefix = "vision_model." if any(k.startswith("vision_model.") for k in keys) else ""
        scaled = tower.sizes.text is not None
        rows = clip.vision_rows(prefix, projection=tower.sizes.projection_dim > 0, scaled=scaled)
        other = ("text_model.", "text_projection.")
        return rows, lambda k: not k.startswith(other), clip.is_position_number
    if tower.kind == "t5":
        return t5.t5_rows(keys, tower.sizes), t5.is_encoder, t5.duplicate_embedding_filter(keys)
    if tower.kind == "dino":
        return dino.dino_rows(keys, tower.sizes), lambda k: True, dino.is_ignored
    raise ValueError(f"unknown kind of frozen network {tower.kind!r}")


class FrozenNetworks:
    """The frozen networks of a config; holds no arrays.

    Args:
      config: config of the run.
      roles: roles to keep; None for all roles of a training step. Stored embeddings replace the text towers.
    """

    def __init__(self, config: Config, roles: Sequence[str] | None = None):
        self.config = config
        # {role: name of its tower}; the name is the first role with that tower.
        self.users: dict[str, str] = {}
        self.towers: dict[str, Tower] = {}
        towers_by_role: dict[str, tuple[str, str]] = {}
        if config.condition == "text" and not config.text.is_trained:
            kind = {"clip": "clip_text", "t5": "t5"}[config.text.encoder]
            towers_by_role["text"] = (kind, config.text.path)
        if config.uses_clip_loss:
            towers_by_role["clip_text"] = ("clip_text", config.clip_path)
            towers_by_role["clip_image"] = ("clip_vision", config.clip_path)
        if config.loss.vision_aided > 0:
            kind = {"clip": "clip_vision", "dino": "dino"}[config.vision_aided.backbone]
            towers_by_role["vision_aided"] = (kind, config.vision_path)
        first_role: dict[tuple[str, str], str] = {}
        for role, (tower_kind, path) in towers_by_role.items():
            identity = (tower_kind, path)
            # Embeddings of captions that are stored with the data make the text towers unnecessary.
            stored = roles is None and bool(config.data.embeddings) and role in ("text", "clip_text")
            if stored or (roles is not None and role not in roles):
                continue
            if identity not in first_role:
                first_role[identity] = role
                self.towers[role] = _make_tower(role, tower_kind, path, config)
            self.users[role] = first_role[identity]
        self.projection = None
        if "vision_aided" in self.users:
            tower = self.towers[self.users["vision_aided"]]
            self._check_layers(tower)
            # The projection is random and fixed, so it is part of the frozen networks and is drawn from the seed.
            width, out = self.vision_width, config.vision_aided.projection
            count = len(config.vision_aided.layers)
            self.projection = Network(
                "vision_aided_projection", lambda rngs: RandomProjection(width, out, count, rngs=rngs)
            )
        # A text tower without a projection has no place in the space that the contrastive loss compares in.
        if "clip_text" in self.users and not self.towers[self.users["clip_text"]].sizes.projection_dim:
            raise _no_images_error("clip_text", config.clip_path, config)
        if "clip_image" in self.users:
            self._check_clip(self.towers[self.users["clip_image"]])
        # Of the perceptual loss: no tower, as its weights are in files of other kinds.
        wanted = config.loss.perceptual > 0 and roles is None
        self.perceptual = build_perceptual(config.perceptual.kind, jnp.dtype(config.dtype)) if wanted else None

    def _check_layers(self, tower: Tower) -> None:
        sizes = tower.sizes.vision if tower.kind == "clip_vision" else tower.sizes
        depth = sizes.num_hidden_layers
        if max(self.config.vision_aided.layers) > depth:
            raise UserError(
                f"config.vision_aided.layers={self.config.vision_aided.layers}: {tower.path} has {depth} blocks"
            )

    def _check_clip(self, tower: Tower) -> None:
        c, sizes = self.config, tower.sizes
        if not sizes.projection_dim or sizes.vision is None or sizes.text is None:
            raise UserError(f"config.clip.path={tower.path}: the contrastive loss needs a whole CLIP; {WITHOUT_CLIP}")
        if c.text.encoder == "clip":
            spec = text_spec(c.text)
            # Both CLIPs read one row of tokens, so their ids must mean the same.
            if (spec.vocab_size, spec.end_id) != (sizes.text.vocab_size, sizes.text.eos_token_id):
                raise UserError(
                    f"config.clip.path={tower.path} has other tokens than config.text.path={c.text.path}: "
                    f"{sizes.text.vocab_size} ids against {spec.vocab_size}; use CLIPs with one vocabulary"
                )
            if c.text.length > sizes.text.max_position_embeddings:
                raise UserError(f"config.text.length={c.text.length} is more than {tower.path} takes")

    # -- parameters

    def abstract(self) -> Params:
        """ShapeDtypeStructs of all parameters, by tower."""
        one = lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(_param_dtype(s, self.config)))
        return {
            name: jax.tree.map(one, module.specs, is_leaf=is_spec) for name, module in self._networks_by_name().items()
        }

    def shardings(self, mesh: Any) -> Params:
        """NamedShardings of all parameters."""
        return {name: module.shardings(mesh, self.config.rules) for name, module in self._networks_by_name().items()}

    def _networks_by_name(self) -> dict[str, Network]:
        modules = {name: tower.module for name, tower in self.towers.items()}
        others = {"projection": self.projection, "perceptual": self.perceptual}
        return modules | {name: network for name, network in others.items() if network is not None}

    def load(self, mesh: Any) -> tuple[Params, dict[str, str]]:
        """Reads all parameters from their files, each directly into its shards.

        Returns:
          (parameters by tower, identities by role); an identity is the SHA-256 of the stored weights

        Raises:
          UserError: files are missing, damaged, pickles, or of another architecture.
        """
        params: Params = {}
        identities = {}
        where = self.shardings(mesh)
        dtype_of = functools.partial(_param_dtype, config=self.config)
        for name, tower in self.towers.items():
            family = tower.kind.partition("_")[0]
            files = find_network(tower.path, REQUIREMENTS[tower.role], family)
            # The plan may have used the table of known sizes; the files decide.
            check_architecture(family, tower.sizes, files, REQUIREMENTS[tower.role])
            weights = open_network(family, files)
            rows, ours, ignore = _key_table(tower, weights.keys())
            params[name], identities[name] = load_params(
                tower.module, rows, weights, shardings=where[name], dtype_of=dtype_of, ours=ours, ignore=ignore
            )
        if self.projection is not None:
            drawn = self.projection.init(self.config.seed, where["projection"])
            cast = lambda spec, x: x.astype(dtype_of(spec))
            params["projection"] = jax.tree.map(cast, self.projection.specs, drawn, is_leaf=is_spec)
        identities = {role: identities[name] for role, name in self.users.items()}
        if self.perceptual is not None:
            p = self.config.perceptual
            params["perceptual"], identities["perceptual"] = load_perceptual(
                self.perceptual, p.kind, p.path, shardings=where["perceptual"], dtype_of=dtype_of
            )
        return params, identities

    def bind(self, role: str, params: Params) -> Any:
        """The module of a role with its parameters; None if the config has no such role."""
        name = self.users.get(role)
        return None if name is None else self.towers[name].module.bind(params[name])

    # -- evaluation

    def encode_captions(
        self, params: Params, tokens: jax.Array, clip_tokens: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Features and embeddings of captions.

        Args:
          tokens: int32 [N, C] of E_txt
          clip_tokens: int32 [N, C'] of the CLIP of the contrastive loss, if it has other tokens

        Returns:
          `features` [N, C, D] if E_txt is frozen; `clip_text` float32 [N, P], normalised, with the contrastive loss
        """
        encoded: dict[str, jax.Array] = {}
        # One pass of a shared tower gives both the features and the embedding.
        shared = "text" in self.users and self.users.get("clip_text") == self.users["text"]
        text = self.bind("text", params)
        if text is not None:
            features, projected = text_features(text, self.config.text, tokens, pool=shared)
            encoded["features"] = features
            if shared and projected is not None:
                encoded["clip_text"] = l2_normalize(projected)
        if "clip_text" in self.users and not shared:
            output = self.bind("clip_text", params)(tokens if clip_tokens is None else clip_tokens)
            encoded["clip_text"] = l2_normalize(output.projected)
        return {k: jax.lax.stop_gradient(x) for k, x in encoded.items()}

    def embed_images(self, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images [N, R, R, 3] in [-1, 1] -> (float32 [N, P] normalised embeddings, logit scale)"""
        tower = self.bind("clip_image", params)
        projected = tower(clip.preprocess(images, tower.config.image_size)).projected
        # Gradients reach the image, but not the scale, which is part of the frozen CLIP.
        return l2_normalize(projected), jax.lax.stop_gradient(jnp.exp(tower.logit_scale[...].astype(jnp.float32)))

    def perceptual_distance(self, params: Params, a: jax.Array, b: jax.Array) -> jax.Array:
        """a, b [N, R, R, 3] in [-1, 1] -> float32 [N], by the perceptual loss's network"""
        assert self.perceptual is not None
        return self.perceptual.bind(params["perceptual"])(a, b)

    @property
    def vision_width(self) -> int:
        """Channels of the features under the vision-aided discriminator."""
        tower = self.towers[self.users["vision_aided"]]
        return (tower.sizes.vision if tower.kind == "clip_vision" else tower.sizes).hidden_size

    def vision_features(self, params: Params, images: jax.Array) -> list[jax.Array]:
        """images [N, R, R, 3] in [-1, 1] -> [N, h, w, projection] at each of config.vision_aided.layers"""
        tower = self.bind("vision_aided", params)
        prepare = clip.preprocess if self.config.vision_aided.backbone == "clip" else dino.preprocess
        x = prepare(images, tower.config.image_size)
        hidden = tower(x, taps=self.config.vision_aided.layers, pool=False).hidden
        assert self.projection is not None
        # Token 0 is the class token; the others are the patches, row by row.
        project = self.projection.bind(params["projection"])
        side = tower.config.image_size // tower.config.patch_size
        return project([h[:, 1:].reshape(h.shape[0], side, side, h.shape[2]) for h in hidden])


def _param_dtype(spec: Any, config: Config) -> Any:
    # Norms, biases and the logit scale stay float32: they are small, and rounding them is visible in the outputs.
    # The axis "layers" of stacked blocks does not make a vector a matrix.
    return config.dtype if len([a for a in spec.axes if a != "layers"]) > 1 else "float32"


def l2_normalize(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis, in float32."""
    x = x.astype(jnp.float32)
    # The constant keeps the gradient finite at zero.
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def text_features(
    encoder: Any, config: TextConfig, tokens: jax.Array, *, pool: bool
) -> tuple[jax.Array, jax.Array | None]:
    """E_txt(c), and with `pool` the embedding in CLIP's shared space.

    tokens int32 [N, C] -> (features [N, C, D], [N, P] or None)
    """
    if config.encoder == "t5":
        spec = text_spec(config)
        # T5 is bidirectional: without a mask, padding would change the features.
        mask = jnp.arange(tokens.shape[1]) <= spec.end_position(tokens)[:, None]
        return encoder(tokens, mask), None
    depth = encoder.config.num_hidden_layers
    # `text.layer` selects the last or the penultimate block.
    last = config.layer == "last"
    output = encoder(tokens, taps=(depth if last else depth - 1,), pool=pool)
    features = output.hidden[0]
    return (encoder.norm(features) if config.final_norm else features), output.projected

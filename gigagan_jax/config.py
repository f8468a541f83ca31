"""Every setting of a run, as frozen dataclasses, and the one place that reads them from an ml_collections ConfigDict.

Marks in the comments: (A2) is row of Table A2 of the paper, (sec. n) a section of it, (open) a value the paper does not
state. Sizes listed per resolution follow the flow of data: low to high for the generator, high to low for the
discriminator. Strings that name mesh axes join several with a comma; an empty string means "replicated".
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gigagan_jax.config_check import validate
from gigagan_jax.config_data import DataConfig
from gigagan_jax.config_run import DEFAULT_RULES, CheckpointConfig, HealthConfig, MeshConfig, SnapshotConfig
from gigagan_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text encoder that comes before T (sec. 3.1)."""

    # "auto": by `path`, and without one bytes and no loss that needs a CLIP
    encoder: str = "bytes"  # "bytes": trainable, needs no download; "clip" or "t5": frozen, from `path`; or "auto"
    path: str = ""  # folder or hub id of a frozen encoder's weights
    length: int = 77  # tokens, padding included (CLIP: 77)
    width: int = 768  # features a token of the bytes encoder; a frozen one has its own
    layer: str = "penultimate"  # (sec. 3.2) of CLIP: "penultimate" or "last"
    final_norm: bool = True  # (open) CLIP's last norm on these features, whose channels differ widely in size


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The learned text transformer T (eq. 3a); one of its own in each network."""

    width: int = 768  # (open) 768 or 1024; features of the encoder are projected to it where they differ
    depth: int = 4  # (A2)
    heads: int = 8  # (open)
    mlp_ratio: float = 4.0  # (open)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The frozen CLIP of the contrastive loss (eq. 9); its weight is `loss.clip`."""

    path: str = ""  # (open) folder or hub id; empty: that of the text encoder


@dataclasses.dataclass(frozen=True)
class VisionAidedConfig:
    """The vision-aided discriminator (sec. 3.3); its weight is `loss.vision_aided`."""

    backbone: str = "clip"  # (A2) "clip", or "dino" as in StyleGAN-T
    path: str = ""  # (A2: CLIP ViT-B/32) folder or hub id; empty: that of the contrastive loss
    layers: tuple[int, ...] = (4, 8, 12)  # (open) numbers of blocks after which features are taken
    projection: int = 256  # (open) channels after the fixed random projection
    head_width: int = 256  # (open)
    head_depth: int = 2  # (open) modulated 3x3 convolutions of each head
    augment: tuple[str, ...] = ("color", "translation", "cutout")  # differentiable augmentation (Zhao et al., 2020)
    text: TransformerConfig = TransformerConfig(depth=0)  # (open) what its heads read the caption through


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention blocks of both networks (sec. 3.1)."""

    heads: int = 8  # (open)
    head_dim: int = 64  # (open)
    dim_multiplier: float = 1.0  # (A2) width of attention, times heads * head_dim
    mlp_ratio: float = 4.0  # (A2)
    norm: str = "rms"  # (open) before each branch: "rms" or "none"
    kind: str = "l2"  # (sec. 3.1) "l2": squared distance with tied query and key; "dot": dot product
    mask_self: bool = False  # (open) with tied q and k a token is always nearest to itself; True forbids that


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """The 64 px generator (sec. 3.2). Tuples run from 4 px up to the resolution."""

    z_dim: int = 128  # (A2)
    w_dim: int = 1024  # (A2)
    mapping_depth: int = 4  # (A2)
    mapping_lr_mul: float = 0.01  # (StyleGAN2)
    w_avg_decay: float = 0.998  # a step; for truncation
    channel_base: int = 16384  # (A2) channels = min(base / resolution, max)
    channel_max: int = 1600  # (A2)
    blocks: tuple[int, ...] = (3, 3, 3, 2, 2)  # (A2) synthesis blocks, two adaptive convolutions each
    bank: tuple[int, ...] = (1, 1, 2, 4, 8)  # (A2) filters N in the bank of each adaptive convolution
    attention_depth: tuple[int, ...] = (0, 2, 2, 1, 0)  # (A2) attention layers at each resolution
    attention_every_block: bool = (
        False  # (open) False: after the last block of a resolution, which fits the paper's size
    )
    cross_attention: bool = True  # (A2) text only
    mlp_after_self: bool = True  # (open) feed-forward after self-attention
    mlp_after_cross: bool = True  # (open) and after cross-attention: with both, G has the paper's size
    residual_gain: float = 0.4  # (A2) x + gain * f(x)
    attention_gain: float = 0.3  # (A2)
    rgb_gain: float = 1.0  # (open) scale of each ToRGB: the spread of the first images
    pyramid: bool = True  # (sec. 3.2) every level goes to the discriminator; False: only the output
    w_token: bool = True  # (sec. 3.1) w as an extra token of self-attention
    adaptive_form: str = "auto"  # how per-sample kernels are computed: see models/layers/adaptive_conv.py
    text: TransformerConfig = TransformerConfig()
    attention: AttentionConfig = AttentionConfig()


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The multi-scale-input, multi-scale-output discriminator (sec. 3.3). Tuples run from the resolution down to 4 px."""

    channel_base: int = 32768  # (A2)
    channel_max: int = 1536  # (A2)
    blocks: tuple[int, ...] = (1, 2, 2, 2, 2)  # (A2)
    attention_depth: tuple[int, ...] = (0, 1, 2, 2, 0)  # (A2)
    attention_gain: float = 0.3  # (open) as in G
    mlp: bool = False  # (open) feed-forward after attention: without it D has the paper's size
    multi_scale_input: bool = True  # (A2) one entry a pyramid level
    multi_scale_output: bool = True  # (A2) one exit a stage
    head: str = "modulated"  # (A2) "modulated": eq. 7; "projection": projection discriminator, for classes
    class_mapping_depth: int = 0  # (open) layers between a class embedding and a projection head (StyleGAN2-ADA: 8)
    head_depth: int = 4  # (sec. 3.3) modulated 1x1 convolutions
    head_width: int = 256  # (open)
    minibatch_std: int = 0  # (A2) images a group; 0 is off
    text: TransformerConfig = TransformerConfig()
    attention: AttentionConfig = AttentionConfig()


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses (sec. 3.3, A2)."""

    level_weights: tuple[float, ...] = ()  # high to low; () is (2, 1, 1, ...) / sum (A2)
    intermediate_gan: float = 0.01  # (A2) weight of every exit before the last, GAN loss
    intermediate_match: float = 0.05  # (A2) the same, matching-aware loss
    match_d: float = 1.0  # (A2)
    match_g: float = 1.0  # (A2)
    mismatch_group: int = 16  # (open) neighbours in the batch among which wrong captions are drawn; 0: the whole batch
    clip: tuple[float, float] = (0.0, 0.0)  # (A2: 0.2 to 1.0) contrastive loss, first and last; linear in images
    vision_aided: float = 0.0  # (open) of the vision-aided discriminator in G's loss; 0 is off
    r1_gamma: tuple[float, float] = (0.2048, 2.048)  # (A2) first and last; linear in images
    r1_interval: int = 16  # (A2) steps
    r1_levels: str = "full"  # (open) "full": gradient by the full-resolution real image; "all": by every level


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of one network (A2)."""

    learning_rate: float = 0.0025  # (A2)
    beta1: float = 0.0  # (A2)
    beta2: float = 0.99  # (A2)
    epsilon: float = 1e-8  # (A2)
    weight_decay: float = 1e-5  # (A2)
    attention_weight_decay: float = 0.01  # (A2)
    warmup_kimg: float = 0.0  # linear
    decay_kimg: float = 0.0  # cosine to `final_ratio` over this many kimg before the end; 0 is constant
    final_ratio: float = 0.0  # share of the learning rate that is left at the end of `decay_kimg`


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Moving average of G, as a half-life in thousands of images."""

    half_life_kimg: float = 7100.0  # (A2) beta 0.9999 at batch 1024
    rampup: float = 0.05  # half-life is at most this share of the images seen; 0 is off


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "gigagan"  # of the model, in files and logs
    seed: int = 0  # of initial values, data order and every draw during training
    resolution: int = 64  # side of the images in pixels, a power of two
    batch_size: int = 1024  # (A2: 512 to 1024) images a step, over all devices
    micro_batches: int = 1  # gradient accumulation: parts that the batch is cut into
    total_kimg: float = 1_000_000.0  # length of the run, in thousands of real images seen
    checkpoint_kimg: float = 5000.0  # thousands of images between checkpoints
    snapshot_kimg: float = 5000.0  # thousands of images between sample grids
    log_kimg: float = 50.0  # thousands of images between lines of metrics
    condition: str = "text"  # "text", "class" or "none"
    num_classes: int = 0  # for condition="class"
    dtype: str = "bfloat16"  # of the computation; parameters, logits, losses and penalties are float32
    remat: bool = True  # recompute each block in the backward pass
    evaluators: tuple[str, ...] = ()  # run at the end of training: "digits"
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009  (frozen)
    # logical axis -> mesh axes; see DEFAULT_RULES
    rules: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(DEFAULT_RULES))  # see sharding.py
    data: DataConfig = DataConfig()  # noqa: RUF009  (frozen)
    text: TextConfig = TextConfig()
    clip: ClipConfig = ClipConfig()
    generator: GeneratorConfig = GeneratorConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    vision_aided: VisionAidedConfig = VisionAidedConfig()
    loss: LossConfig = LossConfig()
    g_optimizer: OptimizerConfig = OptimizerConfig()
    d_optimizer: OptimizerConfig = OptimizerConfig()
    v_optimizer: OptimizerConfig = OptimizerConfig()  # of the vision-aided discriminator
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()  # noqa: RUF009  (frozen)
    snapshot: SnapshotConfig = SnapshotConfig()  # noqa: RUF009  (frozen)
    health: HealthConfig = HealthConfig()  # noqa: RUF009  (frozen)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the pyramid, low to high: (4, 8, ..., resolution)."""
        return tuple(1 << i for i in range(2, self.resolution.bit_length()))

    @property
    def clip_path(self) -> str:
        """Of the CLIP of the contrastive loss; empty where none is named."""
        return self.clip.path or (self.text.path if self.text.encoder == "clip" else "")

    @property
    def vision_path(self) -> str:
        """Of the image tower of the vision-aided discriminator; empty where none is named."""
        return self.vision_aided.path or (self.clip_path if self.vision_aided.backbone == "clip" else "")

    @property
    def uses_clip_loss(self) -> bool:
        """Is the contrastive loss on?"""
        return max(self.loss.clip) > 0


# ---------------------------------------------------------------- reading


def default() -> ConfigDict:
    """All fields with their defaults, for a config file to change."""
    return ConfigDict(to_dict(Config()))


def to_dict(config: Any) -> Any:
    """Nested plain dicts, lists as tuples: JSON, and the way back through `from_dict`."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return dict(config)
    return config


def from_dict(values: Any) -> Config:
    """The frozen config of a ConfigDict or plain dict, checked.

    Raises:
      UserError: an unknown key (with the nearest known one), a value of another type, settings that do not fit together.
    """
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    config = _without_auto(_read(Config, values, "config"))
    validate(config)
    return config


def _without_auto(config: Config) -> Config:
    """text.encoder="auto" as what it stands for, so that a stored config says what was run."""
    if config.text.encoder != "auto":
        return config
    path, encoder = config.text.path, "bytes"
    if path:
        try:
            values = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
            kind = str(values.get("model_type", ""))
        except (OSError, ValueError, AttributeError):
            kind = path.lower()  # a hub id, or a folder that the loader will complain about
        encoder = "t5" if "t5" in kind else "clip"
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, encoder=encoder))
    without: dict[str, Any] = {} if config.clip_path else {"clip": (0.0, 0.0)}
    without |= {} if config.vision_path else {"vision_aided": 0.0}
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, **without))


def _read(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a group of settings, got {value!r}")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                near = difflib.get_close_matches(key, hints, 1)
                hint = f"; did you mean {where}.{near[0]}?" if near else f"; known: {', '.join(sorted(hints))}"
                raise UserError(f"unknown config key {where}.{key}{hint}")
        return kind(**{k: _read(hints[k], v, f"{where}.{k}") for k, v in value.items()})  # type: ignore[operator]
    origin = typing.get_origin(kind)
    if origin is tuple:
        args = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a tuple like {_example(args)}, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_read(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise UserError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a group of settings, got {value!r}")
        return {str(k): _read(str, v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(origin, types.UnionType):
        raise TypeError(f"{where}: unions are not supported in configs")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {kind.__name__}, got {type(value).__name__} {value!r}")
    return value


def _example(args: tuple) -> str:
    return {int: "(1, 2)", float: "(0.5, 1.0)", str: "('a', 'b')"}.get(args[0], "(...)")


def entry_levels(config: Config) -> tuple[int, ...]:
    """Pyramid levels that the discriminator sees, high to low; level 0 is the output image."""
    return tuple(range(len(config.resolutions))) if config.discriminator.multi_scale_input else (0,)


# ---------------------------------------------------------------- comparing

# What each machine of a run may have its own of: where things lie, and how they are read. That the data and the frozen
# weights are the same is checked by their identities.
OWN_FIELDS = (
    "data.path",
    "data.index",
    "data.workers",
    "data.threads",
    "data.embeddings",
    "text.path",
    "clip.path",
    "vision_aided.path",
)
# What may change between two runs in one workdir: it does not alter what the stored state means.
FREE_FIELDS = (
    *OWN_FIELDS,
    "total_kimg",
    "batch_size",
    "checkpoint_kimg",
    "snapshot_kimg",
    "log_kimg",
    "micro_batches",
    "remat",
    "evaluators",
    "mesh",
    "rules",
    "data.retry_seconds",
    "data.max_bad_fraction",
    "data.captions",
    "generator.adaptive_form",
    "checkpoint",
    "snapshot",
    "health",
)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data.crop": "center", ...}"""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= flatten(value, name + ".")
        else:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out


def is_fixed(name: str) -> bool:
    """Must a field ("loss.clip") stay as it is within a workdir?"""
    return not any(name == f or name.startswith(f + ".") for f in FREE_FIELDS)


def with_fields(config: Config, fields: Mapping[str, Any]) -> Config:
    """The config with other values of the fields {"loss.clip": ...}."""
    if not fields:
        return config
    values = to_dict(config)
    for name, value in fields.items():
        group: Any = values
        *groups, key = name.split(".")
        for g in groups:
            group = group[g]
        group[key] = value
    return from_dict(values)


def differences(stored: Mapping[str, Any], current: Config) -> list[str]:
    """Lines "field: stored -> current" for fields that must not change within a workdir."""
    a, b = flatten(stored), flatten(to_dict(current))
    keys = [k for k in sorted(a.keys() | b.keys()) if is_fixed(k)]
    missing = "(absent)"
    return [f"{k}: {a.get(k, missing)} -> {b.get(k, missing)}" for k in keys if a.get(k, missing) != b.get(k, missing)]


def digest(config: Config) -> str:
    """A short hash of the whole config."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]

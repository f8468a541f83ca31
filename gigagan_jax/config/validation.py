"""Which settings cannot work together; called by `config.from_dict`."""

import functools
import math
from typing import Any

from gigagan_jax.core.errors import UserError


def _levels(config: Any) -> int:
    return len(config.resolutions) if config.discriminator.multi_scale_input else 1


def _one_of(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"config.{where}={value!r}: must be one of {', '.join(map(repr, allowed))}")


_NETS = ("generator", "discriminator")
_POSITIVE = (
    *("batch_size", "micro_batches", "total_kimg", "checkpoint_kimg", "snapshot_kimg", "log_kimg", "text.width"),
    *("loss.r1_interval", "checkpoint.keep", "ema.half_life_kimg", "snapshot.seeds", "discriminator.head_depth"),
    "checkpoint.timeout_seconds",
    *(
        "generator.z_dim",
        "generator.w_dim",
        "generator.mapping_depth",
        "generator.mapping_lr_mul",
        "generator.rgb_gain",
    ),
    *(f"{net}.{size}" for net in _NETS for size in ("channel_base", "channel_max", "text.width", "text.heads")),
    *(f"{net}.{size}" for net in _NETS for size in ("text.mlp_ratio", "attention.heads", "attention.head_dim")),
    *(f"{net}.attention.{size}" for net in _NETS for size in ("dim_multiplier", "mlp_ratio")),
    "discriminator.head_width",
    *(f"vision_aided.{size}" for size in ("projection", "head_width", "head_depth", "text.width", "text.heads")),
)
_NOT_NEGATIVE = (
    "loss.mismatch_group",
    *(
        "seed",
        "num_classes",
        "data.threads",
        "data.workers",
        "data.retry_seconds",
        "discriminator.minibatch_std",
        "discriminator.class_mapping_depth",
    ),
    *("ema.rampup", "generator.w_avg_decay", "checkpoint.keep_every_kimg", "checkpoint.keep_best"),
    *("loss.match_d", "loss.match_g", "loss.intermediate_gan", "loss.intermediate_match"),
    *(f"{net}.text.depth" for net in (*_NETS, "vision_aided")),
    "loss.vision_aided",
    *(f"{o}_optimizer.{rate}" for o in "gdv" for rate in ("learning_rate", "weight_decay", "attention_weight_decay")),
    *(
        f"{o}_optimizer.{time}"
        for o in "gdv"
        for time in ("warmup_kimg", "decay_kimg", "final_ratio", "beta1", "beta2")
    ),
)


def _get(config: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def _check_numbers(config: Any) -> None:
    for name in _POSITIVE:
        if not 0 < _get(config, name) < math.inf:
            raise UserError(f"config.{name}={_get(config, name)}: must be greater than 0")
    for name in _NOT_NEGATIVE:
        if not 0 <= _get(config, name) < math.inf:
            raise UserError(f"config.{name}={_get(config, name)}: must not be negative")
    if config.text.length < 3:
        raise UserError(f"config.text.length={config.text.length}: must be at least 3 (a byte between begin and end)")
    _one_of("checkpoint.best_mode", config.checkpoint.best_mode, ("min", "max"))
    if config.checkpoint.keep_best and not config.checkpoint.best_metric:
        raise UserError("config.checkpoint.keep_best needs config.checkpoint.best_metric, a name of metrics.jsonl")
    if config.seed >= 2**32:
        raise UserError(f"config.seed={config.seed}: must be below {2**32}")
    for name in (f"{o}_optimizer.{beta}" for o in "gdv" for beta in ("beta1", "beta2")):
        if _get(config, name) >= 1:
            raise UserError(f"config.{name}={_get(config, name)}: must be below 1")
    for net in _NETS:
        t, a = _get(config, f"{net}.text"), _get(config, f"{net}.attention")
        if round(t.width * t.mlp_ratio) < 1 or round(a.head_dim * a.dim_multiplier) < 1 or a.mlp_ratio < 0.1:
            raise UserError(
                f"config.{net}: text.mlp_ratio, attention.mlp_ratio or attention.dim_multiplier leaves no width"
            )
        base = _get(config, f"{net}.channel_base")
        if base < config.resolution:
            raise UserError(f"config.{net}.channel_base={base}: leaves no channel at resolution {config.resolution}")


def _check_frozen(config: Any) -> None:
    _one_of("text.encoder", config.text.encoder, ("bytes", "clip", "t5", "auto"))
    _one_of("text.layer", config.text.layer, ("penultimate", "last"))
    _one_of("vision_aided.backbone", config.vision_aided.backbone, ("clip", "dino"))
    for name in config.vision_aided.augment:
        _one_of("vision_aided.augment", name, ("color", "translation", "cutout"))
    v = config.vision_aided
    if not v.layers or min(v.layers) < 1 or list(v.layers) != sorted(set(v.layers)):
        raise UserError(f"config.vision_aided.layers={v.layers}: numbers of blocks, at least 1, in rising order")
    first, last = config.loss.clip
    if min(first, last) < 0 or not max(first, last) < math.inf:
        raise UserError(f"config.loss.clip={config.loss.clip}: weights must not be negative")
    if config.uses_clip_loss and config.condition != "text":
        raise UserError(
            "config.loss.clip: the contrastive loss compares with captions and needs config.condition='text'"
        )
    if config.condition != "text":
        return
    if config.text.encoder != "bytes" and not config.text.path:
        raise UserError(
            f"config.text.path is not set: text.encoder={config.text.encoder!r} needs the folder or hub id of its weights; "
            "text.encoder=bytes needs none"
        )
    if config.uses_clip_loss and not config.clip_path:
        raise UserError(
            "config.clip.path is not set: config.loss.clip needs the folder or hub id of a CLIP; (0,0) switches it off"
        )


def _check_vision_aided(config: Any) -> None:
    text = config.vision_aided.text
    if config.condition == "text" and text.width % text.heads:
        raise UserError(f"config.vision_aided.text.width={text.width} does not divide into {text.heads} heads")
    if config.loss.vision_aided and not config.vision_path:
        raise UserError(
            "config.vision_aided.path is not set: config.loss.vision_aided needs the folder or hub id of a "
            f"{config.vision_aided.backbone} image tower; 0 switches it off"
        )
    if config.loss.vision_aided and config.condition == "text" and config.text.encoder == "bytes" and not text.depth:
        raise UserError(
            "config.vision_aided.text.depth=0: the bytes encoder says nothing of a caption at its end; use at least 1"
        )


def _check_data(data: Any) -> None:
    kinds = ("auto", "tar", "folder", "arrayrecord", "tfds", "parquet", "digits")
    _one_of("data.source", data.source, kinds)
    _one_of("data.captions", data.captions, ("required", "optional"))
    _one_of("data.crop", data.crop, ("center", "random", "none", "pad"))
    _one_of("data.resize_filter", data.resize_filter, ("lanczos", "bicubic", "bilinear", "box", "nearest"))
    for name in ("caption_dropout", "max_bad_fraction"):
        if not 0 <= getattr(data, name) <= 1:
            raise UserError(f"config.data.{name}={getattr(data, name)}: must be a share, 0 to 1")
    f = data.filters
    for name in ("min_width", "min_height", "min_caption", "max_caption", "max_watermark", "max_nsfw"):
        if not 0 <= getattr(f, name) < math.inf:
            raise UserError(f"config.data.filters.{name}={getattr(f, name)}: must not be negative")
    if f.max_aspect and not 1 <= f.max_aspect < math.inf:
        raise UserError(f"config.data.filters.max_aspect={f.max_aspect}: is longer side by shorter side, at least 1")
    if f.max_caption and f.max_caption < f.min_caption:
        raise UserError("config.data.filters.max_caption is less than min_caption: nothing would be left")


def _check_health(health: Any) -> None:
    _one_of("health.nonfinite", health.nonfinite, ("warn", "skip", "rollback"))
    for name in ("saturation", "penalty", "collapse", "levels", "updates"):
        _one_of(f"health.{name}", getattr(health, name), ("off", "warn", "rollback"))
    for name in ("max_skips", "max_rollbacks", "grace"):
        if getattr(health, name) < 0:
            raise UserError(f"config.health.{name}={getattr(health, name)}: must not be negative")
    for name in ("rollback_lr", "window", "patience"):
        if not 0 < getattr(health, name) < math.inf:
            raise UserError(f"config.health.{name}={getattr(health, name)}: must be greater than 0")


def validate(config: Any) -> None:
    """Raises UserError where the settings of a `Config` cannot work together."""
    r = config.resolution
    if r < 8 or r & (r - 1):
        raise UserError(f"config.resolution={r}: must be a power of two, at least 8 (8, 16, 32, 64, ...)")
    levels = len(config.resolutions)
    g, d = config.generator, config.discriminator
    for where, value in (
        ("generator.blocks", g.blocks),
        ("generator.bank", g.bank),
        ("generator.attention_depth", g.attention_depth),
        ("discriminator.blocks", d.blocks),
        ("discriminator.attention_depth", d.attention_depth),
    ):
        if len(value) != levels:
            raise UserError(
                f"config.{where} has {len(value)} entries; resolution {r} has {levels} levels {config.resolutions}"
            )
    for where, values, least in (
        ("generator.blocks", g.blocks, 1),
        ("generator.bank", g.bank, 1),
        ("discriminator.blocks", d.blocks, 1),
        ("generator.attention_depth", g.attention_depth, 0),
        ("discriminator.attention_depth", d.attention_depth, 0),
    ):
        if min(values) < least:
            raise UserError(f"config.{where}={values}: every entry must be at least {least}")
    _check_numbers(config)
    if config.total_kimg * 1000 >= 2**32:
        raise UserError(
            f"config.total_kimg={config.total_kimg}: must be below {2**32 // 1000} (images are counted in 32 bits)"
        )
    if config.batch_size % config.micro_batches:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide into config.micro_batches={config.micro_batches}"
        )
    micro = config.batch_size // config.micro_batches
    if d.minibatch_std and micro % d.minibatch_std:
        raise UserError(
            f"config.discriminator.minibatch_std={d.minibatch_std} does not divide a micro-batch of {micro} images"
        )
    if d.minibatch_std == 1:
        raise UserError(
            "config.discriminator.minibatch_std=1: a group of one has no deviation; use 0 (off) or at least 2"
        )
    _check_data(config.data)
    _check_health(config.health)
    _one_of("condition", config.condition, ("text", "class", "none"))
    _one_of("dtype", config.dtype, ("bfloat16", "float32"))
    _one_of("discriminator.head", d.head, ("modulated", "projection"))
    _one_of("generator.adaptive_form", g.adaptive_form, ("auto", "bank", "shift", "im2col", "vmap"))
    _one_of("loss.r1_levels", config.loss.r1_levels, ("full", "all"))
    for net in ("generator", "discriminator"):
        attention = getattr(config, net).attention
        _one_of(f"{net}.attention.kind", attention.kind, ("l2", "dot"))
        _one_of(f"{net}.attention.norm", attention.norm, ("rms", "none"))
        text = getattr(config, net).text
        if config.condition == "text" and text.width % text.heads:
            raise UserError(f"config.{net}.text.width={text.width} does not divide into {text.heads} heads")
    for name in config.evaluators:
        _one_of("evaluators", name, ("digits",))
    if "digits" in config.evaluators and config.condition != "text":
        raise UserError("config.evaluators: 'digits' asks for digits by captions and needs config.condition='text'")
    _check_frozen(config)
    _check_vision_aided(config)
    if config.condition == "class" and config.num_classes < 2:
        raise UserError(f"config.num_classes={config.num_classes}: condition='class' needs at least 2")
    s = config.snapshot
    if not s.prompts or not s.truncations or any(not 0 <= psi <= 1 for psi in s.truncations):
        raise UserError("config.snapshot: needs at least one prompt, and at least one truncation of 0 to 1")
    if config.condition == "class" and any(
        not p.strip().isdecimal() or int(p) >= config.num_classes for p in s.prompts
    ):
        raise UserError(f"config.snapshot.prompts={s.prompts}: must be class numbers, 0 to {config.num_classes - 1}")
    if config.condition == "none" and d.head == "projection":
        raise UserError(
            "config.discriminator.head='projection' needs a condition; use 'modulated' with condition='none'"
        )
    if g.pyramid != d.multi_scale_input:
        raise UserError("config.generator.pyramid and config.discriminator.multi_scale_input must be switched together")
    if config.loss.level_weights and len(config.loss.level_weights) != _levels(config):
        raise UserError(f"config.loss.level_weights needs {_levels(config)} entries, one a level, high to low")

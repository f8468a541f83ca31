"""Validates settings: ranges, choices, and combinations that cannot work. `config.from_dict` calls it."""

import functools
import math
from typing import Any

from gigagan_jax.config.augmentation import check_augmentations
from gigagan_jax.config.classes import check_classes
from gigagan_jax.config.data import SOURCE_KINDS
from gigagan_jax.core.errors import UserError

# Tokens of the longest captions of data/sources/shapes_scenes.py by encoder: of one object, and of several.
_DRAWN_CAPTION = {"bytes": (46, 112), "words": (10, 20)}


def _count_levels(config: Any) -> int:
    # Without multi-scale input, D scores the full resolution only.
    d = config.discriminator
    return (d.input_levels or len(config.resolutions)) if d.multi_scale_input else 1


def _check_choice(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"config.{where}={value!r}: must be one of {', '.join(map(repr, allowed))}")


# Sections of the networks that the text and attention settings belong to.
_NETS = ("generator", "discriminator")
# Names of fields with values that must be finite and greater than 0.
_POSITIVE = (
    *(
        "batch_size",
        "micro_batches",
        "total_kimg",
        "checkpoint_kimg",
        "snapshot_kimg",
        "log_kimg",
        "text.width",
        "text.buckets",
    ),
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
# Names of fields with values that must be finite and at least 0; 0 often switches something off.
_NOT_NEGATIVE = (
    "loss.mismatch_group",
    "loss.pixel",
    "loss.perceptual",
    "upsampler.skip_gain",
    *(
        "seed",
        "num_classes",
        "data.threads",
        "data.workers",
        "data.retry_seconds",
        "discriminator.minibatch_std",
        "discriminator.class_mapping_depth",
    ),
    *(
        "ema.rampup",
        "generator.w_avg_decay",
        "checkpoint.keep_every_kimg",
        "checkpoint.keep_best",
        "checkpoint.full_disk_seconds",
    ),
    *("loss.match_d", "loss.match_g", "loss.intermediate_gan", "loss.intermediate_match"),
    *(
        "loss.centring",
        "loss.vision_r1_gamma",
        "loss.ramp_kimg",
        "generator.layer_scale",
        "discriminator.residual_gain",
    ),
    *("discriminator.float32_resolution", *(f"{net}.text.residual_gain" for net in (*_NETS, "vision_aided"))),
    *(f"{net}.text.depth" for net in (*_NETS, "vision_aided")),
    "loss.vision_aided",
    *(f"{o}_optimizer.{rate}" for o in "gdv" for rate in ("learning_rate", "weight_decay", "attention_weight_decay")),
    *(
        f"{o}_optimizer.{time}"
        for o in "gdv"
        for time in ("warmup_kimg", "decay_kimg", "final_ratio", "beta1", "beta2")
    ),
)


def _get_field(config: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def _check_numbers(config: Any) -> None:
    for name in _POSITIVE:
        if not 0 < _get_field(config, name) < math.inf:
            raise UserError(f"config.{name}={_get_field(config, name)}: must be greater than 0")
    for name in _NOT_NEGATIVE:
        if not 0 <= _get_field(config, name) < math.inf:
            raise UserError(f"config.{name}={_get_field(config, name)}: must not be negative")
    if config.text.length < 3:
        raise UserError(f"config.text.length={config.text.length}: must be at least 3 (a token between begin and end)")
    _check_choice("checkpoint.best_mode", config.checkpoint.best_mode, ("min", "max"))
    if config.checkpoint.keep_best and not config.checkpoint.best_metric:
        raise UserError("config.checkpoint.keep_best needs config.checkpoint.best_metric, a name of metrics.jsonl")
    # jax.random.key takes seeds of 32 bits while 64-bit integers are disabled.
    if config.seed >= 2**32:
        raise UserError(f"config.seed={config.seed}: must be below {2**32}")
    for name in (f"{o}_optimizer.{beta}" for o in "gdv" for beta in ("beta1", "beta2")):
        # Adam divides by 1 - beta^t.
        if _get_field(config, name) >= 1:
            raise UserError(f"config.{name}={_get_field(config, name)}: must be below 1")
    for net in _NETS:
        t, a = _get_field(config, f"{net}.text"), _get_field(config, f"{net}.attention")
        # Widths are products of a size and a ratio: each factor may be valid and the product round to 0.
        if round(t.width * t.mlp_ratio) < 1 or round(a.head_dim * a.dim_multiplier) < 1 or a.mlp_ratio < 0.1:
            raise UserError(
                f"config.{net}: text.mlp_ratio, attention.mlp_ratio or attention.dim_multiplier leaves no width"
            )
        # Channels are base / resolution.
        base = _get_field(config, f"{net}.channel_base")
        if base < config.resolution:
            raise UserError(f"config.{net}.channel_base={base}: leaves no channel at resolution {config.resolution}")


def _check_frozen(config: Any) -> None:
    _check_choice("text.encoder", config.text.encoder, ("bytes", "words", "clip", "t5", "auto"))
    _check_choice("text.layer", config.text.layer, ("penultimate", "last"))
    _check_choice("vision_aided.backbone", config.vision_aided.backbone, ("clip", "dino"))
    check_augmentations(config)
    v = config.vision_aided
    # Features are taken in one pass through the tower, block by block.
    if not v.layers or min(v.layers) < 1 or list(v.layers) != sorted(set(v.layers)):
        raise UserError(f"config.vision_aided.layers={v.layers}: numbers of blocks, at least 1, in rising order")
    # The weight changes from the first value to the last during a run.
    first, last = config.loss.clip
    if min(first, last) < 0 or not max(first, last) < math.inf:
        raise UserError(f"config.loss.clip={config.loss.clip}: weights must not be negative")
    # CLIP compares images with captions.
    if config.uses_clip_loss and config.condition != "text":
        raise UserError(
            "config.loss.clip: the contrastive loss compares with captions and needs config.condition='text'"
        )
    # Three ids are special: a word needs a fourth.
    if config.text.encoder == "words" and config.text.buckets < 2:
        raise UserError(f"config.text.buckets={config.text.buckets}: must be at least 2")
    # Only text conditions load the encoder and CLIP.
    if config.condition != "text":
        return
    if not config.text.is_trained and not config.text.path:
        raise UserError(
            f"config.text.path is not set: text.encoder={config.text.encoder!r} needs the folder or hub id of its weights; "
            "text.encoder=bytes and text.encoder=words need none"
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
    # The vision-aided head conditions on the text feature at the end token, which a trained encoder does not compute.
    if config.loss.vision_aided and config.condition == "text" and config.text.is_trained and not text.depth:
        raise UserError(
            f"config.vision_aided.text.depth=0: the {config.text.encoder} encoder says nothing of a caption at its end; "
            "use at least 1"
        )


def _check_data(data: Any) -> None:
    _check_choice("data.source", data.source, ("auto", *SOURCE_KINDS))
    _check_choice("data.captions", data.captions, ("required", "optional"))
    _check_choice("data.crop", data.crop, ("center", "random", "patch", "none", "pad"))
    if data.crop == "patch" and data.fast_decode:
        raise UserError(
            "config.data.fast_decode: decodes large images smaller, and config.data.crop='patch' takes their own pixels"
        )
    _check_choice("data.resize_filter", data.resize_filter, ("lanczos", "bicubic", "bilinear", "box", "nearest"))
    for name in ("caption_dropout", "max_bad_fraction"):
        if not 0 <= getattr(data, name) <= 1:
            raise UserError(f"config.data.{name}={getattr(data, name)}: must be a share, 0 to 1")
    # 0 switches off most filters; see FilterConfig.
    f = data.filters
    for name in ("min_width", "min_height", "min_caption", "max_caption", "max_watermark", "max_nsfw"):
        if not 0 <= getattr(f, name) < math.inf:
            raise UserError(f"config.data.filters.{name}={getattr(f, name)}: must not be negative")
    # 0 switches the filter off.
    if f.max_aspect and not 1 <= f.max_aspect < math.inf:
        raise UserError(f"config.data.filters.max_aspect={f.max_aspect}: is longer side by shorter side, at least 1")
    if f.max_caption and f.max_caption < f.min_caption:
        raise UserError("config.data.filters.max_caption is less than min_caption: nothing would be left")


def _check_health(health: Any) -> None:
    _check_choice("health.nonfinite", health.nonfinite, ("warn", "skip", "rollback"))
    for name in ("saturation", "evasion", "drift", "penalty", "collapse", "levels", "updates"):
        _check_choice(f"health.{name}", getattr(health, name), ("off", "warn", "rollback"))
    _check_choice("health.memory", health.memory, ("off", "warn"))
    # 0 is valid: no skips, no rollbacks, no grace period.
    for name in ("max_skips", "max_rollbacks", "grace"):
        if getattr(health, name) < 0:
            raise UserError(f"config.health.{name}={getattr(health, name)}: must not be negative")
    # rollback_lr multiplies the learning rates, so 0 would stop training.
    for name in ("rollback_lr", "window", "patience"):
        if not 0 < getattr(health, name) < math.inf:
            raise UserError(f"config.health.{name}={getattr(health, name)}: must be greater than 0")


def validate(config: Any) -> None:
    """Raises UserError for values out of range and settings that cannot work together."""
    # The first error is reported. Later checks rely on earlier ones: the levels exist only for a valid resolution.
    _check_levels(config)
    _check_windows(config)
    _check_numbers(config)
    _check_batch(config)
    _check_data(config.data)
    _check_health(config.health)
    _check_choices(config)
    _check_evaluators(config)
    _check_drawn_captions(config)
    _check_frozen(config)
    _check_vision_aided(config)
    check_classes(config)
    _check_snapshot(config)
    _check_discriminator(config)


def _check_levels(config: Any) -> None:
    r = config.resolution
    # Networks double the resolution from level to level, starting at 4.
    # r & (r - 1) is 0 for powers of two only.
    if r < 8 or r & (r - 1):
        raise UserError(f"config.resolution={r}: must be a power of two, at least 8 (8, 16, 32, 64, ...)")
    _check_upsampler(config)
    g, d = config.generator, config.discriminator
    of_g, of_d = config.generator_resolutions, config.resolutions
    for where, value, levels in (
        ("generator.blocks", g.blocks, of_g),
        ("generator.bank", g.bank, of_g),
        ("generator.attention_depth", g.attention_depth, of_g),
        ("discriminator.blocks", d.blocks, of_d),
        ("discriminator.attention_depth", d.attention_depth, of_d),
    ):
        if len(value) != len(levels):
            raise UserError(
                f"config.{where} has {len(value)} entries; resolution {r} has {len(levels)} levels {levels}"
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


def _check_upsampler(config: Any) -> None:
    u, low, loss = config.upsampler, config.upsampler.input_resolution, config.loss
    if not config.is_upsampler:
        for name in ("pixel", "perceptual"):
            if getattr(loss, name):
                raise UserError(
                    f"config.loss.{name}: compares with the image that was made small; only an upsampler has one "
                    "(config.upsampler.input_resolution)"
                )
        return
    if low < 4 or low & (low - 1) or low >= config.resolution:
        raise UserError(
            f"config.upsampler.input_resolution={low}: must be a power of two from 4 to below "
            f"config.resolution={config.resolution}"
        )
    if u.bottleneck < 4 or u.bottleneck & (u.bottleneck - 1) or u.bottleneck > low:
        raise UserError(
            f"config.upsampler.bottleneck={u.bottleneck}: must be a power of two from 4 to "
            f"config.upsampler.input_resolution={low}"
        )
    if u.encoder_blocks < 1:
        raise UserError(f"config.upsampler.encoder_blocks={u.encoder_blocks}: must be at least 1")
    for name in ("noise", "degradation", "degradation_strength"):
        if not 0 <= getattr(u, name) <= 1:
            raise UserError(f"config.upsampler.{name}={getattr(u, name)}: must be 0 to 1")
    _check_choice("upsampler.downsample", u.downsample, ("area", "bicubic", "lanczos"))
    _check_choice("perceptual.kind", config.perceptual.kind, ("lpips", "hed"))
    if loss.perceptual and not config.perceptual.path:
        raise UserError(
            "config.perceptual.path is not set: config.loss.perceptual needs VGG-16 weights (docs/upsampler.md says from "
            "where); config.loss.perceptual=0 with config.loss.pixel=100 needs none"
        )
    if loss.perceptual and config.resolution < 16:
        raise UserError(f"config.loss.perceptual: VGG-16 needs images of 16 px; config.resolution={config.resolution}")
    if config.evaluators:
        raise UserError(
            f"config.evaluators={config.evaluators}: judge images of prompts; an upsampler is judged by "
            "tools/measure_upscaling.py"
        )
    if loss.vision_aided:
        raise UserError("config.loss.vision_aided: is of the base model (sec. 3.4); set it to 0 for an upsampler")


def _check_windows(config: Any) -> None:
    window = config.generator.attention.window
    if config.discriminator.attention.window:
        raise UserError("config.discriminator.attention.window: only G's attention has windows; set it to 0")
    if not window:
        return
    if window < 2 or window & (window - 1):
        raise UserError(f"config.generator.attention.window={window}: must be a power of two, or 0 for the whole map")
    for r, depth in zip(config.generator_resolutions, config.generator.attention_depth, strict=True):
        if depth and window > r:
            raise UserError(
                f"config.generator.attention.window={window}: is larger than the map of {r} x {r} whose attention it is for"
            )


def _check_batch(config: Any) -> None:
    # The state counts images as uint32.
    if config.total_kimg * 1000 >= 2**32:
        raise UserError(
            f"config.total_kimg={config.total_kimg}: must be below {2**32 // 1000} (images are counted in 32 bits)"
        )
    if config.batch_size % config.micro_batches:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide into config.micro_batches={config.micro_batches}"
        )
    # Groups of the minibatch standard deviation lie within a micro-batch.
    micro = config.batch_size // config.micro_batches
    d = config.discriminator
    if d.minibatch_std and micro % d.minibatch_std:
        raise UserError(
            f"config.discriminator.minibatch_std={d.minibatch_std} does not divide a micro-batch of {micro} images"
        )
    if d.minibatch_std == 1:
        raise UserError(
            "config.discriminator.minibatch_std=1: a group of one has no deviation; use 0 (off) or at least 2"
        )


def _check_choices(config: Any) -> None:
    _check_choice("condition", config.condition, ("text", "class", "none"))
    _check_choice("dtype", config.dtype, ("bfloat16", "float32"))
    _check_choice("discriminator.head", config.discriminator.head, ("modulated", "projection"))
    _check_choice(
        "generator.adaptive_form", config.generator.adaptive_form, ("auto", "bank", "shift", "im2col", "vmap")
    )
    loss = config.loss
    _check_choice("loss.r1_levels", loss.r1_levels, ("full", "all"))
    _check_choice("loss.r1_exits", loss.r1_exits, ("signs", "sum"))
    _check_choice("loss.r1_form", loss.r1_form, ("gradient", "finite_differences"))
    _check_choice("loss.match_d_form", loss.match_d_form, ("logistic", "contrastive"))
    forms = ("off", "min_max", "non_saturating", "cooperating", "contrastive")
    _check_choice("loss.match_g_form", loss.match_g_form, forms)
    contrastive = loss.match_d_form == "contrastive"
    if loss.match_g_form == "contrastive" and not contrastive:
        raise UserError("config.loss.match_g_form='contrastive' needs config.loss.match_d_form='contrastive'")
    if contrastive and config.discriminator.head != "projection":
        raise UserError(
            "config.loss.match_d_form='contrastive' compares each image with many captions: it needs "
            "config.discriminator.head='projection'"
        )
    if contrastive and loss.match_relativistic:
        raise UserError(
            "config.loss.match_relativistic is of match_d_form='logistic'; the contrastive form has it built in"
        )
    _check_choice("loss.pairing", loss.pairing, ("separate", "relativistic"))
    _check_choice("generator.attention_placement", config.generator.attention_placement, ("spread", "last", "every"))
    if not 0 <= loss.vision_smoothing <= 0.5:
        raise UserError(f"config.loss.vision_smoothing={loss.vision_smoothing}: must be a share, 0 to 0.5")
    if loss.r1_form == "finite_differences" and not 1e-6 <= loss.r1_sigma < 1:
        raise UserError(f"config.loss.r1_sigma={loss.r1_sigma}: must be between 1e-6 and 1, as images are in [-1, 1]")
    for net in _NETS:
        attention = getattr(config, net).attention
        _check_choice(f"{net}.attention.kind", attention.kind, ("l2", "dot"))
        _check_choice(f"{net}.attention.norm", attention.norm, ("rms", "none"))
        # Only text conditions have a text transformer; others may keep any width.
        text = getattr(config, net).text
        if config.condition == "text" and text.width % text.heads:
            raise UserError(f"config.{net}.text.width={text.width} does not divide into {text.heads} heads")


def _check_evaluators(config: Any) -> None:
    for name in config.evaluators:
        _check_choice("evaluators", name, ("digits", "shapes", "emoji"))
        if config.condition != "text":
            raise UserError(f"config.evaluators: {name!r} asks by captions and needs config.condition='text'")
    if "shapes" in config.evaluators and config.data.source != "shapes":
        raise UserError("config.evaluators: 'shapes' judges drawn shapes: it needs config.data.source='shapes'")


def _check_drawn_captions(config: Any) -> None:
    if config.data.source != "shapes" or config.condition != "text" or not config.text.is_trained:
        return
    needed = _DRAWN_CAPTION[config.text.encoder][config.data.shapes.max_objects > 1]
    if config.text.length < needed:
        raise UserError(
            f"config.text.length={config.text.length} cuts captions of drawn shapes off: set it to {needed} or more"
        )


def _check_snapshot(config: Any) -> None:
    s = config.snapshot
    # No prompts: they are chosen when the data is known (training/data_settings.py).
    if not s.truncations:
        raise UserError("config.snapshot: needs at least one truncation of 0 to 1")
    if any(not 0 <= psi <= 1 for psi in s.truncations):
        raise UserError(f"config.snapshot.truncations={s.truncations}: each must be 0 to 1")


def _check_discriminator(config: Any) -> None:
    g, d = config.generator, config.discriminator
    # D reads an image of each level, which only a pyramid of G provides for generated images.
    if g.pyramid != d.multi_scale_input:
        raise UserError("config.generator.pyramid and config.discriminator.multi_scale_input must be switched together")
    levels = len(config.image_resolutions)
    if not 0 <= d.input_levels <= levels:
        raise UserError(
            f"config.discriminator.input_levels={d.input_levels}: must be 0 to {levels}, the images that G gives"
        )
    if d.multi_scale_input and not d.input_levels and len(config.resolutions) > levels:
        raise UserError(
            f"config.discriminator.input_levels=0: G gives images of {config.image_resolutions} only; set it to {levels} or less"
        )
    if not 0 <= d.output_levels <= len(config.resolutions):
        raise UserError(
            f"config.discriminator.output_levels={d.output_levels}: must be 0 to {len(config.resolutions)}, D's stages"
        )
    # Empty: the paper's weights (losses.pair_weights).
    if config.loss.level_weights and len(config.loss.level_weights) != _count_levels(config):
        raise UserError(f"config.loss.level_weights needs {_count_levels(config)} entries, one a level, high to low")

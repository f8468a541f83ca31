"""Upgrades stored configs of earlier versions, so that a resumed run keeps its behaviour.

A stored config has the number of its format under "format"; format 0 has no number. A new field of `Config` needs a
higher FORMAT and a line in ADDED: the value with which the present code behaves as the code before the field. The present
default is never used for it. A field that takes the place of another has a line in REPLACED. Parameters that move need a
higher FORMAT too (parameter_renames.py).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from gigagan_jax.config.comparison import flatten_fields
from gigagan_jax.core.errors import UserError

FORMAT = 8
FORMAT_KEY = "format"
# Names of fields that are newer than the run. From its first restart on, config.json has them with the values of ADDED.
WITHOUT_KEY = "begun_without"

# (format that introduced the field, name, value that reproduces the code before it)
ADDED: tuple[tuple[int, str, Any], ...] = (
    (1, "generator.rgb_gain", 1.0),
    (1, "text.layer", "penultimate"),
    (1, "text.final_norm", True),
    (1, "clip.path", ""),
    (1, "loss.clip", (0.0, 0.0)),
    (1, "loss.vision_aided", 0.0),
    (1, "loss.mismatch_group", 0),  # wrong captions came from the whole batch
    (1, "vision_aided.backbone", "clip"),
    (1, "vision_aided.path", ""),
    (1, "vision_aided.layers", (4, 8, 12)),
    (1, "vision_aided.projection", 256),
    (1, "vision_aided.head_width", 256),
    (1, "vision_aided.head_depth", 2),
    (1, "vision_aided.augment", ("color", "translation", "cutout")),
    (1, "vision_aided.text.width", 768),
    (1, "vision_aided.text.depth", 0),
    (1, "vision_aided.text.heads", 8),
    (1, "vision_aided.text.mlp_ratio", 4.0),
    (1, "v_optimizer.learning_rate", 0.0025),
    (1, "v_optimizer.beta1", 0.0),
    (1, "v_optimizer.beta2", 0.99),
    (1, "v_optimizer.epsilon", 1e-8),
    (1, "v_optimizer.weight_decay", 1e-5),
    (1, "v_optimizer.attention_weight_decay", 0.01),
    (1, "v_optimizer.warmup_kimg", 0.0),
    (1, "v_optimizer.decay_kimg", 0.0),
    (1, "v_optimizer.final_ratio", 0.0),
    (1, "data.mixture", ()),
    (1, "data.index", ""),
    (1, "data.caption_keys", ()),
    (1, "data.image_key", ""),
    (1, "data.label_key", "label"),
    (1, "data.split", "train"),
    (1, "data.clean_captions", False),
    (1, "data.fast_decode", False),
    (1, "data.embeddings", ""),
    (1, "data.workers", 0),
    (1, "data.retry_seconds", 300.0),
    (1, "data.filters.min_width", 0),
    (1, "data.filters.min_height", 0),
    (1, "data.filters.max_aspect", 0.0),
    (1, "data.filters.min_clip_score", 0.0),
    (1, "data.filters.min_aesthetic", 0.0),
    (1, "data.filters.max_watermark", 1.0),
    (1, "data.filters.max_nsfw", 1.0),
    (1, "data.filters.nsfw", ()),
    (1, "data.filters.languages", ()),
    (1, "data.filters.min_caption", 0),
    (1, "data.filters.max_caption", 0),
    (1, "data.filters.duplicates", ""),
    (1, "mesh.slices", 1),
    (1, "mesh.shard_optimizer", False),  # moments lay as their parameters
    (1, "rules.optimizer", ""),
    (1, "checkpoint.keep_every_kimg", 0.0),
    (1, "checkpoint.keep_best", 0),
    (1, "checkpoint.best_metric", ""),
    (1, "checkpoint.best_mode", "min"),
    (1, "checkpoint.wait", False),
    (1, "checkpoint.timeout_seconds", 3600),
    # Earlier code had no health checks. These fields may change within a run, so they take the first defaults.
    (1, "health.nonfinite", "rollback"),
    (1, "health.saturation", "warn"),
    (1, "health.collapse", "warn"),
    (1, "health.penalty", "warn"),
    (1, "health.levels", "warn"),
    (1, "health.updates", "warn"),
    (1, "health.max_skips", 10),
    (1, "health.max_rollbacks", 3),
    (1, "health.rollback_lr", 0.5),
    (1, "health.window", 100),
    (1, "health.patience", 500),
    (1, "health.grace", 1000),
    (1, "health.max_gap", 0.98),
    (1, "health.max_penalty", 20.0),
    (1, "health.max_update", 0.1),
    (1, "health.min_update", 0.01),
    (1, "health.min_diversity", 0.2),
    (1, "health.min_diversity_z", 0.05),
    (1, "health.min_level", 0.005),
    (1, "health.min_exit", 0.001),
    (3, "loss.match_g_form", "non_saturating"),
    (3, "loss.match_relativistic", False),
    (3, "loss.pairing", "separate"),
    (3, "loss.centring", 0.0),
    (3, "loss.vision_r1_gamma", 0.0),
    (3, "loss.vision_smoothing", 0.0),
    (3, "loss.r1_exits", "sum"),
    (3, "loss.r1_form", "gradient"),
    (3, "loss.r1_sigma", 0.01),
    (3, "loss.r2", False),
    (3, "loss.ramp_kimg", 0.0),
    (3, "loss.mask_null_captions", False),
    (3, "generator.layer_scale", 0.0),
    (3, "generator.attention_zero_init", False),
    (3, "generator.text.residual_gain", 1.0),
    (3, "discriminator.text.residual_gain", 1.0),
    (3, "vision_aided.text.residual_gain", 1.0),
    (3, "discriminator.residual_gain", 1.0),
    (3, "discriminator.float32_resolution", 0),
    (3, "discriminator.minibatch_std_equalized", False),
    (3, "health.evasion", "warn"),
    (3, "health.drift", "warn"),
    (3, "health.min_cosine", -0.5),
    (3, "health.max_drift", 10.0),
    (4, "data.shapes.examples", 1_000_000),
    (4, "data.shapes.max_objects", 1),
    (4, "data.shapes.side", 32),
    (4, "data.shapes.held_out", True),
    (4, "data.shapes.seed", 0),
    (5, "text.buckets", 1024),
    (5, "loss.match_d_form", "logistic"),
    (6, "rules.height", ""),
    (6, "generator.attention.window", 0),
    (6, "discriminator.attention.window", 0),
    (6, "discriminator.input_levels", 0),
    (6, "discriminator.output_levels", 0),
    (6, "upsampler.input_resolution", 0),
    (6, "upsampler.bottleneck", 8),
    (6, "upsampler.encoder_blocks", 1),
    (6, "upsampler.skip_gain", 1.0),
    (6, "upsampler.image_skip", False),
    (6, "upsampler.noise", 0.0),
    (6, "upsampler.downsample", "area"),
    (6, "upsampler.degradation", 0.0),
    (6, "upsampler.degradation_strength", 1.0),
    (6, "perceptual.kind", "lpips"),
    (6, "perceptual.path", ""),
    (6, "loss.pixel", 0.0),
    (6, "loss.perceptual", 0.0),
    (7, "class_names", ()),
    (7, "checkpoint.full_disk_seconds", 600.0),
    (7, "health.memory", "warn"),  # may change within a run
    (7, "snapshot.preferred_classes", ()),
    (7, "discriminator.augment", ()),
    (8, "loss.mask_same_labels", True),
)
# (format that replaced the field, its name, its successor, values of the successor by those of the field)
REPLACED: tuple[tuple[int, str, str, dict[Any, Any]], ...] = (
    (3, "generator.attention_every_block", "generator.attention_placement", {False: "last", True: "every"}),
)
# (format that removed the field, name): nothing depends on it any more.
REMOVED: tuple[tuple[int, str], ...] = ((1, "checkpoint.keep_period_kimg"),)


def upgrade_config(stored: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stored config with the present fields.

    Args:
      stored: parsed JSON.
      where: name of the file, for messages.

    Returns:
      (the config alone, {name: value} of the fields that it lacks or was begun without)

    Raises:
      UserError: `stored` is no config, or has a newer format.
    """
    if not isinstance(stored, Mapping):
        raise UserError(f"{where} holds no config; remove it: the checkpoints hold the settings too")
    values = _copy_groups(stored)
    number, without = values.pop(FORMAT_KEY, 0), values.pop(WITHOUT_KEY, ())
    if not isinstance(number, int) or number > FORMAT:
        raise UserError(
            f"{where} is of format {number}, this code knows formats up to {FORMAT}: a newer version of gigagan_jax wrote it; "
            "use that one"
        )
    # A field removed in an older format cannot be in the file; a user's own wrong key must still be reported.
    for since, name in REMOVED:
        if since > number:
            _remove_field(values, name.split("."))
    if not (isinstance(without, (list, tuple)) and all(isinstance(name, str) for name in without)):
        raise UserError(f"{where}: {WITHOUT_KEY!r} is no list of names; remove it, or the file")
    # A restart stores the added values, which then look like chosen ones: WITHOUT_KEY remembers them.
    for since, name, successor, meaning in REPLACED:
        if since > number:
            _replace_field(values, name.split("."), successor.split("."), meaning)
    present = flatten_fields(values)
    lacked = {name: present[name] for name in without if name in present}
    for since, name, value in ADDED:
        if since > number and _set_default(values, name.split("."), value):
            lacked[name] = value
    return values, lacked


def with_format(values: Mapping[str, Any], begun_without: Iterable[str] = ()) -> dict[str, Any]:
    """The dict that is stored for a config.

    Args:
      values: of the config.
      begun_without: names of fields that are newer than the run.
    """
    without = sorted(begun_without)
    return {FORMAT_KEY: FORMAT} | ({WITHOUT_KEY: without} if without else {}) | dict(values)


def _copy_groups(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy_groups(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _remove_field(values: Any, path: list[str]) -> None:
    *groups, key = path
    for group in groups:
        values = values.get(group, {})
        if not isinstance(values, dict):
            # A value in the place of a group: from_dict reports it.
            return
    values.pop(key, None)


def _replace_field(values: dict[str, Any], old: list[str], new: list[str], meaning: Mapping[Any, Any]) -> None:
    value = flatten_fields(values).get(".".join(old))
    # A value that the field never had stays where it is: from_dict reports it.
    if isinstance(value, (bool, int, float, str)) and value in meaning:
        _remove_field(values, old)
        _set_default(values, new, meaning[value])


def _set_default(values: Any, path: list[str], value: Any) -> bool:
    *groups, key = path
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            # As in _remove_field.
            return False
    if key in values:
        return False
    values[key] = value
    return True

"""Settings of a run: frozen dataclasses, read from ml_collections ConfigDicts; `default()` gives all of them to a config file."""

from gigagan_jax.config.classes import class_label, class_labels, describe_classes, first_difference, needs_prompts
from gigagan_jax.config.comparison import (
    FREE_FIELDS,
    OWN_FIELDS,
    config_digest,
    fixed_differences,
    flatten_fields,
    is_fixed,
)
from gigagan_jax.config.config import Config
from gigagan_jax.config.data import SOURCE_KINDS, DataConfig, FilterConfig, ShapesConfig
from gigagan_jax.config.model import (
    AttentionConfig,
    ClipConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    PerceptualConfig,
    TextConfig,
    TransformerConfig,
    UpsamplerConfig,
    VisionAidedConfig,
)
from gigagan_jax.config.run import (
    DEFAULT_RULES,
    CheckpointConfig,
    EmaConfig,
    HealthConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    SnapshotConfig,
)
from gigagan_jax.config.serialization import default, from_dict, to_dict, with_fields

__all__ = [
    "DEFAULT_RULES",
    "FREE_FIELDS",
    "OWN_FIELDS",
    "SOURCE_KINDS",
    "AttentionConfig",
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "DataConfig",
    "DiscriminatorConfig",
    "EmaConfig",
    "FilterConfig",
    "GeneratorConfig",
    "HealthConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PerceptualConfig",
    "ShapesConfig",
    "SnapshotConfig",
    "TextConfig",
    "TransformerConfig",
    "UpsamplerConfig",
    "VisionAidedConfig",
    "class_label",
    "class_labels",
    "config_digest",
    "default",
    "describe_classes",
    "first_difference",
    "fixed_differences",
    "flatten_fields",
    "from_dict",
    "is_fixed",
    "needs_prompts",
    "to_dict",
    "with_fields",
]

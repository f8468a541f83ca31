"""`Config`: every setting of a run, as one frozen dataclass."""

import dataclasses
from collections.abc import Mapping

from gigagan_jax.config.data import DataConfig
from gigagan_jax.config.model import (
    ClipConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    PerceptualConfig,
    TextConfig,
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

# Where the data is not looked at, as in a dry run: ImageNet's.
ASSUMED_CLASSES = 1000


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
    num_classes: int = 0  # for condition="class"; 0: as many as the data have
    class_names: tuple[str, ...] = ()  # by label; the data gives them
    dtype: str = "bfloat16"  # of the computation; parameters, logits, losses and penalties are float32
    remat: bool = True  # recompute each block in the backward pass
    evaluators: tuple[str, ...] = ()  # run at the end of training: "digits", "shapes", "emoji"
    mesh: MeshConfig = MeshConfig()
    # logical axis -> mesh axes (config/run.py, parallel/sharding.py)
    rules: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(DEFAULT_RULES))
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    clip: ClipConfig = ClipConfig()
    generator: GeneratorConfig = GeneratorConfig()
    upsampler: UpsamplerConfig = UpsamplerConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    vision_aided: VisionAidedConfig = VisionAidedConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    loss: LossConfig = LossConfig()
    g_optimizer: OptimizerConfig = OptimizerConfig()
    d_optimizer: OptimizerConfig = OptimizerConfig()
    v_optimizer: OptimizerConfig = OptimizerConfig()  # of the vision-aided discriminator
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    health: HealthConfig = HealthConfig()

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the pyramid, low to high: (4, 8, ..., resolution)."""
        return tuple(1 << i for i in range(2, self.resolution.bit_length()))

    @property
    def is_upsampler(self) -> bool:
        """Does the run train an upsampler, and not the base model?"""
        return self.upsampler.input_resolution > 0

    @property
    def generator_resolutions(self) -> tuple[int, ...]:
        """Sides of the synthesis network's levels, low to high."""
        lowest = self.upsampler.bottleneck if self.is_upsampler else 4
        return tuple(r for r in self.resolutions if r >= lowest)

    @property
    def image_resolutions(self) -> tuple[int, ...]:
        """Sides of the images that G gives, low to high."""
        above = self.upsampler.input_resolution if self.upsampler.image_skip else 0
        return tuple(r for r in self.generator_resolutions if r > above)

    @property
    def class_count(self) -> int:
        """Rows of the class embedding; 0 without classes. A number that the data has yet to give is assumed."""
        return (self.num_classes or len(self.class_names) or ASSUMED_CLASSES) if self.condition == "class" else 0

    @property
    def used_text(self) -> TextConfig:
        """The text encoder whose tokens are made: without captions one that needs no files, for rows of null captions."""
        return self.text if self.condition == "text" else TextConfig(encoder="bytes", length=self.text.length)

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

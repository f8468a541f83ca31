"""Settings of the networks: text encoders, generator, discriminators.

Marks in the comments: (A2) is a row of Table A2 of the paper, (sec. n) a section of it, (open) a value the paper does not
state. Sizes listed per resolution follow the flow of data: low to high for the generator, high to low for the
discriminator.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text encoder that comes before T (sec. 3.1)."""

    # "auto": by `path`, and without one bytes and no loss that needs a CLIP
    # or "auto". "bytes" and "words" are trained with each network and need no download; "clip" and "t5" are frozen, from `path`
    encoder: str = "bytes"
    path: str = ""  # folder or hub id of a frozen encoder's weights
    length: int = 77  # tokens, padding included (CLIP: 77)
    width: int = 768  # features a token of a trained encoder; a frozen one has its own
    buckets: int = 1024  # of "words": rows of each of its two tables; words are hashed to pairs of rows
    layer: str = "penultimate"  # (sec. 3.2) of CLIP: "penultimate" or "last"
    final_norm: bool = True  # (open) CLIP's last norm on these features, whose channels differ widely in size

    @property
    def is_trained(self) -> bool:
        """Whether the encoder is part of each network and trained with it."""
        return self.encoder in ("bytes", "words")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The learned text transformer T (eq. 3a); one of its own in each network."""

    width: int = 768  # (open) 768 or 1024; features of the encoder are projected to it where they differ
    depth: int = 4  # (A2)
    heads: int = 8  # (open)
    mlp_ratio: float = 4.0  # (open)
    residual_gain: float = 1.0  # (open) x + gain f(x)


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
    window: int = 0  # tokens a side of the windows that G's self-attention stays in, on a fixed grid; 0: the whole map
    mask_self: bool = False  # (open) with tied q and k a token is always nearest to itself; True forbids that


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """The 64 px generator (sec. 3.2). Tuples run from 4 px up to the resolution."""

    z_dim: int = 128  # (A2)
    w_dim: int = 1024  # (A2)
    mapping_depth: int = 4  # (A2)
    mapping_lr_mul: float = 0.01  # (StyleGAN2)
    w_avg_decay: float = 0.0  # a step, of the mean w for truncation; 0: that of G's moving average
    channel_base: int = 16384  # (A2) channels = min(base / resolution, max)
    channel_max: int = 1600  # (A2)
    blocks: tuple[int, ...] = (3, 3, 3, 2, 2)  # (A2) synthesis blocks, two adaptive convolutions each
    bank: tuple[int, ...] = (1, 1, 2, 4, 8)  # (A2) filters N in the bank of each adaptive convolution
    attention_depth: tuple[int, ...] = (0, 2, 2, 1, 0)  # (A2) attention layers at each resolution
    # (open) where a resolution's attention layers are: "spread" over its blocks (eq. 5 alternates them), all behind its
    # "last" block, or so many behind "every" block
    attention_placement: str = "spread"
    cross_attention: bool = True  # (A2) text only
    mlp_after_self: bool = True  # (open) feed-forward after self-attention
    mlp_after_cross: bool = True  # (open) and after cross-attention: with both, G has the paper's size
    residual_gain: float = 0.4  # (A2) x + gain * f(x)
    attention_gain: float = 0.3  # (A2)
    layer_scale: float = 0.0  # first value of a learned gain a channel, in the place of residual_gain; 0 is off
    attention_zero_init: bool = False  # attention branches start at zero (StyleGAN-T, Aurora)
    rgb_gain: float = 1.0  # (open) scale of each ToRGB: the spread of the first images
    pyramid: bool = True  # (sec. 3.2) every level goes to the discriminator; False: only the output
    w_token: bool = True  # (sec. 3.1) w as an extra token of self-attention
    adaptive_form: str = "auto"  # how per-sample kernels are computed: see models/layers/adaptive_conv.py
    text: TransformerConfig = TransformerConfig()
    attention: AttentionConfig = AttentionConfig()


@dataclasses.dataclass(frozen=True)
class UpsamplerConfig:
    """The GAN upsampler (sec. 3.4), in the place of the generator where `input_resolution` is not 0.

    Its upper half is `config.generator`, whose tuples then run from the bottleneck up to the resolution.
    """

    input_resolution: int = 0  # side of the small image in pixels, a power of two; 0: no upsampler, the base model
    bottleneck: int = 8  # (sec. 3.4) side of the lowest features at that input: 64 px pass three blocks down to 8
    encoder_blocks: int = 1  # (open) residual blocks at each resolution on the way down
    skip_gain: float = 1.0  # (open) of the encoder's features where they are added at equal resolution
    image_skip: bool = False  # (open) the image starts as the small one, by Lanczos; only higher levels add to it
    noise: float = (
        0.0  # (open) largest level of noise augmentation, 0 to 1; every second image has none, others an even draw
    )
    downsample: str = "area"  # how training makes small images: "area", "bicubic" or "lanczos"
    degradation: float = 0.0  # share of small images that are degraded first (training/degradations.py), 0 to 1
    degradation_strength: float = 1.0  # the largest; drawn evenly below it for each image. 1 is Real-ESRGAN's worst


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """The frozen network of the perceptual loss of upsamplers (sec. 3.4); its weight is `loss.perceptual`."""

    kind: str = "lpips"  # (sec. 3.4) "lpips", or "hed": HED's VGG-16, with equal weights a channel
    path: str = ""  # file or folder of the VGG-16 weights


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The multi-scale-input, multi-scale-output discriminator (sec. 3.3). Tuples run from the resolution down to 4 px."""

    channel_base: int = 32768  # (A2)
    channel_max: int = 1536  # (A2)
    blocks: tuple[int, ...] = (1, 2, 2, 2, 2)  # (A2)
    residual_gain: float = 1.0  # (StyleGAN2: 1) (skip + gain f(x)) / sqrt(1 + gain^2)
    float32_resolution: int = 0  # (open) resolutions up to this one compute in float32; 0: none
    attention_depth: tuple[int, ...] = (0, 1, 2, 2, 0)  # (A2)
    attention_gain: float = 0.3  # (open) as in G
    mlp: bool = False  # (open) feed-forward after attention: without it D has the paper's size
    multi_scale_input: bool = True  # (A2) one entry a pyramid level
    input_levels: int = 0  # entries from the output image down; 0: one at every level
    output_levels: int = 0  # exits from the last one up, with multi_scale_output; 0: one a stage
    multi_scale_output: bool = True  # (A2) one exit a stage
    head: str = "modulated"  # (A2) "modulated": eq. 7; "projection": projection discriminator, for classes
    class_mapping_depth: int = 0  # (open) layers between a class embedding and a projection head (StyleGAN2-ADA: 8)
    head_depth: int = 4  # (sec. 3.3) modulated 1x1 convolutions
    head_width: int = 256  # (open)
    # differentiable augmentation of what D sees (Zhao et al., 2020), for few images: "color", "translation", "cutout"; ("auto",):
    # all three where the data set has fewer than 50,000 images; (): off
    augment: tuple[str, ...] = ()
    minibatch_std: int = 0  # (A2) images a group; 0 is off
    minibatch_std_equalized: bool = True  # (StyleGAN2) the deviation's channel weighs as each of the others
    text: TransformerConfig = TransformerConfig()
    attention: AttentionConfig = AttentionConfig()

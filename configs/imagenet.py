"""The paper's class-conditional ImageNet generator at 64 px: 209.5M and 76.7M (Table A2, first column); and its upsamplers.

    python -m gigagan_jax.train --config=configs/imagenet.py --workdir=DIR

`:upsampler` is the second stage, 64 to 256 px with classes (359.8M and 30.7M, second column). `:sr` is super-resolution of the
same size without classes (359.0M and 28.9M, last column). Their LPIPS loss needs `--config.perceptual.path=FILE`
(docs/upsampler.md); `--config.loss.perceptual=0 --config.loss.pixel=100` needs none.

Data: the TFDS data set imagenet2012, prepared as array_record; or by --config.data.path another one, or a folder that holds
one folder of images a class. Labels go through the mapping network; the discriminator is a projection
discriminator with one input and one output, and neither text nor matching-aware loss.
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """Variants: `:upsampler` and `:sr` (see above); `:unconditional` is the base model without classes; `:tiny`,
    `:upsampler-tiny`, `:sr-tiny` and `:unconditional-tiny` have every part at toy width."""
    stage, _, size = arg.partition("-")
    if stage in ("upsampler", "sr") and size in ("", "tiny"):
        return upsampler_config(classes=stage == "upsampler", tiny=size == "tiny")
    if arg not in ("", "tiny", "unconditional", "unconditional-tiny"):
        known = "tiny, upsampler, upsampler-tiny, sr, sr-tiny, unconditional, unconditional-tiny"
        raise ValueError(f"configs/imagenet.py has no variant {arg!r}; known: {known}")
    c = settings.default()
    c.name = "imagenet"
    # As many classes as the data have; without a look at them, in a dry run, ImageNet's 1,000.
    c.condition, c.num_classes = "class", 0
    c.data.path = "imagenet2012"
    c.data.flip = True
    c.batch_size = 1024
    c.total_kimg = 307_200.0  # 300k steps
    c.ema.half_life_kimg = 20.0  # beta 0.9651 at batch 1024

    g, d = c.generator, c.discriminator
    g.z_dim, g.w_dim, g.mapping_depth = 64, 512, 2
    g.channel_base, g.channel_max = 32768, 512
    g.blocks, g.bank, g.attention_depth = (1,) * 5, (8,) * 5, (0, 4, 4, 4, 0)
    g.residual_gain, g.attention_gain = 1.0, 1.0
    g.pyramid = False
    d.channel_base, d.channel_max = 32768, 768
    d.blocks, d.attention_depth = (1,) * 5, (0, 1, 1, 1, 0)
    d.attention_gain = 1.0
    d.attention.heads, d.mlp = 12, True
    d.multi_scale_input = d.multi_scale_output = False
    d.head, d.class_mapping_depth, d.minibatch_std = "projection", 8, 8
    c.loss.match_d = c.loss.match_g = 0.0
    c.loss.r1_gamma = (0.2048, 0.2048)
    for o in (c.g_optimizer, c.d_optimizer):
        o.attention_weight_decay = 1e-5
    # Without prompts of its own a run draws these classes, or where the data have fewer the first ones.
    c.snapshot.prompts, c.snapshot.preferred_classes = (), ("0", "1", "207", "281", "417", "933")

    if stage == "unconditional":
        c.name += "-unconditional"
        c.condition = "none"
        d.head, d.class_mapping_depth = "modulated", 0
    if size == "tiny" or arg == "tiny":
        c.name += "-tiny"
        c.resolution, c.batch_size, c.dtype = 16, 16, "float32"
        c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg, c.log_kimg = 1.6, 0.8, 0.8, 0.16
        g.z_dim, g.w_dim, g.channel_base, g.channel_max = 16, 32, 256, 32
        g.blocks, g.bank, g.attention_depth = (1, 1, 1), (4, 4, 4), (0, 2, 0)
        d.channel_base, d.channel_max, d.blocks, d.attention_depth = 256, 32, (1, 1, 1), (0, 1, 0)
        d.class_mapping_depth, d.minibatch_std = 0 if stage == "unconditional" else 2, 4
        d.head_width = 16
        for net in (g, d):
            net.attention.heads, net.attention.head_dim = 2, 16
        c.snapshot.preferred_classes, c.snapshot.seeds = ("0", "1", "7"), 4
    return c


def upsampler_config(*, classes: bool, tiny: bool) -> ConfigDict:
    """64 to 256 px.

    Args:
      classes: the second stage of the class-conditional model; False for super-resolution.
      tiny: 8 to 32 px at toy width.
    """
    c = settings.default()
    c.name = "imagenet-upsampler" if classes else "imagenet-sr"
    c.condition, c.num_classes = ("class", 0) if classes else ("none", 0)
    c.data.path, c.data.flip, c.data.captions = "imagenet2012", True, "optional"
    c.resolution, c.upsampler.input_resolution, c.upsampler.bottleneck = 256, 64, 16
    c.upsampler.noise = 0.1  # (open)
    c.batch_size = 256
    c.total_kimg = 158_720.0 if classes else 40_960.0  # 620k and 160k steps
    c.ema.half_life_kimg = 20.0  # beta 0.9912 at batch 256

    g, d = c.generator, c.discriminator
    g.w_dim, g.channel_base, g.channel_max = 512, 32768, 512
    # With the bottleneck at 16 px five blocks and four filters a level give the paper's parameters to 0.2 %.
    g.blocks, g.bank, g.attention_depth = (5,) * 5, (4,) * 5, (4, 2, 0, 0, 0)
    g.attention.dim_multiplier = 1.4
    g.pyramid = False
    d.channel_base, d.channel_max = 32768, 512
    d.blocks, d.attention_depth = (1,) * 7, (0,) * 7
    d.multi_scale_input = d.multi_scale_output = False
    d.minibatch_std = 4
    if classes:
        d.head, d.class_mapping_depth = "projection", 4
        c.snapshot.prompts, c.snapshot.preferred_classes = (), ("0", "1", "207")
    c.loss.match_d = c.loss.match_g = 0.0
    c.loss.r1_gamma = (0.2048, 0.2048)
    c.loss.perceptual = 100.0
    c.perceptual.path = "timm/vgg16.tv_in1k"
    c.health.min_diversity_z = 0.0  # one small image has nearly one large one
    for o in (c.g_optimizer, c.d_optimizer):
        o.attention_weight_decay = 1e-5

    if tiny:
        c.name += "-tiny"
        c.resolution, c.upsampler.input_resolution, c.upsampler.bottleneck = 32, 8, 4
        c.batch_size, c.dtype = 8, "float32"
        c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg, c.log_kimg = 0.8, 0.4, 0.4, 0.08
        c.loss.perceptual, c.loss.pixel = 0.0, 100.0
        g.z_dim, g.w_dim, g.channel_base, g.channel_max = 16, 32, 256, 32
        g.blocks, g.bank, g.attention_depth = (2, 1, 1, 1), (2,) * 4, (1, 1, 0, 0)
        d.channel_base, d.channel_max, d.blocks, d.attention_depth = 256, 32, (1,) * 4, (0,) * 4
        d.class_mapping_depth = 2 if classes else 0
        for net in (g, d):
            net.attention.heads, net.attention.head_dim = 2, 16
        c.snapshot.seeds = 4
        if classes:
            c.snapshot.preferred_classes = ("0", "1", "7")
    return c

"""Photographs enlarged four times: a small upsampler that trains on a laptop, 16 to 64 px.

    python -m gigagan_jax.train --config=configs/photos.py --workdir=runs/photos --config.data.path='photographs/train/*.tar'

Attention stays in windows of a fixed grid: a picture enlarged in tiles is the same for every size of tile. Half of the small
images are degraded before they are enlarged: blurred, noisy, with the blocks of JPEG.
Data: patches of photographs (docs/photographs.md).
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`:tiny` is for tests: the same parts at 8 to 16 px, a few steps."""
    c = settings.default()
    c.name = "photos"
    c.condition = "none"
    c.resolution, c.upsampler.input_resolution, c.upsampler.bottleneck = 64, 16, 8
    c.batch_size = 8
    c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg, c.log_kimg = 20.0, 4.0, 4.0, 0.2
    c.dtype, c.remat = "float32", False
    c.data.captions = "optional"
    c.data.crop, c.data.flip = "patch", True

    u, g, d = c.upsampler, c.generator, c.discriminator
    u.image_skip, u.downsample, u.noise = True, "bicubic", 0.1
    u.degradation, u.degradation_strength = 0.5, 0.4
    g.z_dim, g.w_dim, g.mapping_depth = 16, 64, 2
    g.channel_base, g.channel_max = 1024, 64  # 64, 64, 32, 16 at 8, 16, 32, 64 px
    g.blocks, g.bank, g.attention_depth = (1, 2, 1, 1), (1, 1, 1, 1), (1, 1, 0, 0)
    g.residual_gain, g.attention_gain, g.rgb_gain = 0.4, 0.3, 0.1
    g.attention.window, g.attention.heads, g.attention.head_dim, g.attention.mlp_ratio = 8, 4, 16, 2.0
    d.channel_base, d.channel_max = 1024, 64
    d.blocks, d.attention_depth, d.input_levels = (1,) * 5, (0,) * 5, 2
    d.head_depth, d.head_width, d.minibatch_std = 2, 32, 4

    c.loss.level_weights = (1.0, 0.5)
    c.loss.pixel = 100.0
    c.loss.match_d = c.loss.match_g = 0.0
    c.loss.pairing, c.loss.centring = "relativistic", 0.01
    c.loss.r1_gamma, c.loss.r2 = (0.05, 0.05), True
    for o in (c.g_optimizer, c.d_optimizer):
        o.learning_rate, o.decay_kimg, o.final_ratio = 0.008, 14.0, 0.02
    c.ema.half_life_kimg, c.ema.rampup = 1.0, 0.1
    c.health.min_diversity_z = 0.0  # a photograph is enlarged in one way

    if arg == "tiny":
        c.name += "-tiny"
        c.resolution, u.input_resolution, u.bottleneck = 16, 8, 4
        c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg, c.log_kimg = 0.16, 0.08, 0.08, 0.016
        g.z_dim, g.w_dim, g.channel_base, g.channel_max = 8, 16, 128, 16
        g.blocks, g.bank, g.attention_depth = (1, 1, 1), (1, 1, 2), (1, 1, 0)
        g.attention.window, g.attention.heads, g.attention.head_dim = 4, 2, 8
        d.channel_base, d.channel_max, d.blocks, d.attention_depth = 128, 16, (1,) * 3, (0,) * 3
        d.input_levels = 1
        c.loss.level_weights = ()
        for o in (c.g_optimizer, c.d_optimizer):
            o.decay_kimg = 0.0
    elif arg:
        raise ValueError(f"configs/photos.py has no variant {arg!r}; known: tiny")
    return c

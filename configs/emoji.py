"""Emoji from captions: 64 concepts in seven drawing styles, 32 px, on a laptop. Real pictures; a tenth of the cells held out.

    python -m gigagan_jax.train --config=configs/emoji.py --workdir=runs/emoji --config.data.path=data/emoji/train

`tools/prepare_data.py emoji` makes the data from npm packages (docs/emoji.md). It ends by judging four pictures of each cell: a
concept in a style. `:all` has every concept that the seven sets share, at 64 px, for one GPU.
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`:all`; `:tiny` is for tests: the same parts, a few steps."""
    if arg not in ("", "all", "tiny"):
        raise ValueError(f"configs/emoji.py has no variant {arg!r}; known: all, tiny")
    c = settings.default()
    c.name = "emoji" + (f"-{arg}" if arg else "")
    c.resolution = 64 if arg == "all" else 32
    levels = c.resolution.bit_length() - 2  # 4 px to the resolution
    c.batch_size = 16
    c.total_kimg = 600.0
    c.checkpoint_kimg = c.snapshot_kimg = 20.0
    c.log_kimg = 1.0
    c.dtype = "float32"
    c.remat = False
    c.evaluators = ("emoji",)

    c.data.source = "tar"
    c.data.threads = 1
    c.text.length = 80
    c.text.width = 48

    g = c.generator
    g.z_dim, g.w_dim = 32, 96
    g.channel_base, g.channel_max = 1024, 96
    g.blocks, g.bank = (1,) * levels, (2,) * levels
    g.attention_depth = (0, 1, *((0,) * (levels - 2)))
    g.residual_gain, g.attention_gain, g.rgb_gain = 0.4, 0.3, 0.3
    g.attention.heads, g.attention.head_dim, g.attention.mlp_ratio = 2, 24, 2.0
    d = c.discriminator
    d.channel_base, d.channel_max = 1024, 96
    d.blocks, d.attention_depth = (1,) * levels, (0,) * levels
    d.head_width, d.minibatch_std = 96, 4
    d.attention.heads, d.attention.head_dim = 2, 24
    for t in (g.text, d.text):
        t.width, t.depth, t.heads, t.mlp_ratio = 48, 1, 2, 2.0

    c.loss.level_weights = tuple(0.5**i for i in range(levels))
    c.loss.match_d, c.loss.match_g = 0.5, 0.0
    c.loss.r1_gamma, c.loss.r1_levels = (0.05, 0.05), "all"
    for o in (c.g_optimizer, c.d_optimizer):
        o.learning_rate, o.decay_kimg, o.final_ratio = 0.0025, c.total_kimg / 2, 0.05
    c.ema.half_life_kimg, c.ema.rampup = 10.0, 0.1
    c.snapshot.prompts = (
        "a violin, flat style",
        "a penguin, twitter style",
        "a rainbow, openmoji style",
        "an octopus, noto style",
        "a red apple, glossy style",
        "a rocket, emojione style",
    )
    if arg == "all":
        c.batch_size, c.dtype, c.total_kimg = 64, "bfloat16", 6000.0
        g.w_dim, g.channel_base, g.channel_max, g.bank = 256, 4096, 256, (4,) * levels
        d.channel_base, d.channel_max, d.head_width = 4096, 256, 256
        g.attention_depth = (0, 1, 1, *((0,) * (levels - 3)))
        for t in (g.text, d.text):
            t.width, t.depth, t.heads = 192, 3, 4
        c.text.width = 192
        for o in (c.g_optimizer, c.d_optimizer):
            o.decay_kimg = 3000.0
        c.ema.half_life_kimg = 50.0
    elif arg == "tiny":
        c.total_kimg, c.log_kimg = 0.32, 0.016
        c.checkpoint_kimg = c.snapshot_kimg = 0.16
        c.evaluators = ()
        g.z_dim, g.w_dim, g.mapping_depth, g.channel_base, g.channel_max = 8, 16, 2, 128, 16
        d.channel_base, d.channel_max, d.head_depth, d.head_width = 128, 16, 2, 16
        c.text.width = 16
        for t in (g.text, d.text):
            t.width = 16
        c.snapshot.seeds, c.snapshot.prompts = 2, c.snapshot.prompts[:2]
    return c

"""Drawn shapes from captions: a run whose pictures are judged attribute by attribute, 32 px, on a laptop.

    python -m gigagan_jax.train --config=configs/shapes.py --workdir=runs/shapes

One object a picture, with shape, color, size and material in its caption. It ends by judging 640 pictures; 160 of them
are of pairs of shape and color that no training picture has.
`:16` is for tables of settings; `:scenes` has up to three objects at 64 px; `:64` is the same for one GPU.
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`:16`, `:scenes`, `:64`; `:tiny` is for tests: the same parts at 16 px, a few steps."""
    if arg not in ("", "16", "scenes", "64", "tiny"):
        raise ValueError(f"configs/shapes.py has no variant {arg!r}; known: 16, scenes, 64, tiny")
    c = settings.default()
    c.name = "shapes" + (f"-{arg}" if arg else "")
    scenes = arg in ("scenes", "64")
    c.resolution = 16 if arg in ("16", "tiny") else 64 if scenes else 32
    levels = c.resolution.bit_length() - 2  # 4 px to the resolution
    c.batch_size = 16
    c.total_kimg = 60.0 if arg == "16" else 300.0
    c.checkpoint_kimg = c.snapshot_kimg = 20.0
    c.log_kimg = 1.0
    c.dtype = "float32"
    c.remat = False
    c.evaluators = ("shapes",)

    c.data.source = "shapes"
    c.data.threads = 1
    c.data.shapes.side = c.resolution
    c.data.shapes.max_objects = 3 if scenes else 1
    c.text.length = 128 if scenes else 56
    c.text.width = 32

    g = c.generator
    g.z_dim, g.w_dim = 32, 64
    g.channel_base, g.channel_max = 512, 64
    g.blocks, g.bank = (1,) * levels, (2,) * levels
    # Attention at 8 px, and at 16 px where there are relations to follow.
    g.attention_depth = (0, 1, *((1,) if scenes else ()), *((0,) * (levels - 2 - scenes)))
    g.residual_gain, g.attention_gain, g.rgb_gain = 0.4, 0.3, 0.3
    g.attention.heads, g.attention.head_dim, g.attention.mlp_ratio = 2, 16, 2.0
    d = c.discriminator
    d.channel_base, d.channel_max = 512, 64
    d.blocks, d.attention_depth = (1,) * levels, (0,) * levels
    d.head_width, d.minibatch_std = 64, 4
    d.attention.heads, d.attention.head_dim = 2, 16
    for t in (g.text, d.text):
        t.width, t.depth, t.heads, t.mlp_ratio = 32, 1, 2, 2.0

    c.loss.level_weights = tuple(0.5**i for i in range(levels))
    c.loss.match_d, c.loss.match_g = 0.5, 0.0
    c.loss.r1_gamma, c.loss.r1_levels = (0.02, 0.02), "all"
    for o in (c.g_optimizer, c.d_optimizer):
        o.learning_rate, o.decay_kimg, o.final_ratio = 0.0025, c.total_kimg / 2, 0.05
    c.ema.half_life_kimg, c.ema.rampup = 10.0, 0.1
    c.snapshot.prompts = (
        "a large red circle",
        "a small blue square",
        "a large striped green triangle",
        "a large shiny yellow star",
        "a small shiny purple cross",
        "a large striped pink ring",
        # Never seen in training.
        "a large purple circle",
        "a large shiny blue star",
    )
    if scenes:
        c.snapshot.prompts = (
            "a large red circle left of a small blue square",
            "a small shiny green star above a large yellow ring",
            "three small striped orange triangles",
            "two large shiny pink crosses",
        )
    if arg == "64":
        c.batch_size, c.dtype = 64, "bfloat16"
        c.total_kimg = 3000.0
        g.w_dim, g.channel_base, g.channel_max = 256, 4096, 256
        d.channel_base, d.channel_max, d.head_width = 4096, 256, 256
        g.bank = (4,) * levels
        for t in (g.text, d.text):
            t.width, t.depth, t.heads = 128, 2, 4
        c.text.width = 128
        for o in (c.g_optimizer, c.d_optimizer):
            o.decay_kimg = 1500.0
        c.ema.half_life_kimg = 50.0
    elif arg == "tiny":
        c.total_kimg, c.log_kimg = 0.32, 0.016
        c.checkpoint_kimg = c.snapshot_kimg = 0.16
        c.evaluators = ()
        c.data.shapes.examples = 1000
        g.z_dim, g.w_dim, g.mapping_depth, g.channel_base, g.channel_max = 8, 16, 2, 128, 16
        d.channel_base, d.channel_max, d.head_depth, d.head_width = 128, 16, 2, 16
        c.text.width = 16
        for t in (g.text, d.text):
            t.width = 16
        c.snapshot.seeds, c.snapshot.prompts = 2, c.snapshot.prompts[:2]
    return c

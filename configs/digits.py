"""Handwritten digits from captions: the newcomer's run, 16 px, on a laptop.

    python -m gigagan_jax.train --config=configs/digits.py --workdir=runs/digits

The loss is relativistic with R1 and R2: its pictures vary more than those of the logistic loss (docs/digits.md). The
contrastive matching loss is for D only. 10 minutes on two cores: 236 images/s. It ends by judging 600 fresh images.
Data: the 1,797 real digits that ship with scikit-learn, each with eight wordings of its caption.
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`:tiny` is for tests: the same parts at 8 px, a few steps."""
    c = settings.default()
    c.name = "digits"
    c.resolution = 16
    c.batch_size = 16
    c.total_kimg = 120.0
    c.checkpoint_kimg = 20.0
    c.snapshot_kimg = 20.0
    c.log_kimg = 1.0
    c.dtype = "float32"
    c.remat = False
    c.evaluators = ("digits",)

    c.data.source = "digits"
    c.data.resize_filter = "bicubic"
    c.data.threads = 0
    # Captions of a dozen words in all: a table of words needs no letters to be read first.
    c.text.encoder, c.text.length, c.text.buckets = "words", 12, 256
    c.text.width = 32

    g = c.generator
    g.z_dim, g.w_dim = 32, 48
    g.channel_base, g.channel_max = 256, 48  # 48, 32, 16 at 4, 8, 16 px
    g.blocks, g.bank, g.attention_depth = (1, 1, 1), (1, 1, 2), (0, 1, 0)
    g.residual_gain, g.attention_gain, g.rgb_gain = 0.4, 0.3, 0.3
    g.attention.heads, g.attention.head_dim, g.attention.mlp_ratio = 2, 16, 2.0
    d = c.discriminator
    d.channel_base, d.channel_max = 256, 48  # 16, 32, 48 at 16, 8, 4 px
    d.blocks, d.attention_depth = (1, 1, 1), (0, 0, 0)
    d.head, d.minibatch_std = "projection", 4
    d.attention.heads, d.attention.head_dim = 2, 16
    for t in (g.text, d.text):
        t.width, t.depth, t.heads, t.mlp_ratio = 32, 1, 2, 2.0

    c.loss.level_weights = (1.0, 0.5, 0.25)
    c.loss.match_d_form, c.loss.match_d, c.loss.match_g = "contrastive", 0.5, 0.0
    # Eight wordings of one meaning.
    c.loss.mask_same_labels = True
    c.loss.r1_gamma, c.loss.r1_levels = (0.02, 0.02), "all"
    c.loss.pairing, c.loss.r2, c.loss.centring = "relativistic", True, 0.01
    for o in (c.g_optimizer, c.d_optimizer):
        # 0.9 / channels, as in configs/shapes.py.
        o.learning_rate, o.decay_kimg, o.final_ratio = 0.019, 80.0, 0.02
    c.ema.half_life_kimg, c.ema.rampup = 12.0, 0.15
    c.snapshot.prompts = tuple(
        f"a handwritten {n}" for n in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    )

    if arg == "tiny":
        c.resolution, c.total_kimg = 8, 0.32
        c.checkpoint_kimg = c.snapshot_kimg = 0.16
        c.log_kimg = 0.016
        c.evaluators = ()
        for o in (c.g_optimizer, c.d_optimizer):
            o.learning_rate, o.decay_kimg = 0.0035, 0.0
        c.ema.half_life_kimg = 25.0
        # The text encoder without a download, the head and the losses of the paper.
        c.text.encoder, c.text.length, c.text.buckets = "bytes", 40, settings.default().text.buckets
        d.head, c.loss.match_d_form = "modulated", "logistic"
        c.loss.pairing, c.loss.r2, c.loss.centring = "separate", False, 0.0
        g.z_dim, g.w_dim, g.mapping_depth, g.channel_base, g.channel_max = 8, 16, 2, 128, 16
        g.blocks, g.bank, g.attention_depth = (1, 1), (1, 2), (0, 1)
        d.channel_base, d.channel_max, d.head_depth, d.head_width = 128, 16, 2, 16
        d.blocks, d.attention_depth = (1, 1), (0, 0)
        c.text.width = 16
        for t in (g.text, d.text):
            t.width = 16
        c.loss.level_weights = (1.0, 0.5)
        c.snapshot.seeds, c.snapshot.prompts = 2, ("a handwritten seven", "the digit 3")
    elif arg:
        raise ValueError(f"configs/digits.py has no variant {arg!r}; known: tiny")
    return c

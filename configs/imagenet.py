"""The paper's class-conditional ImageNet generator at 64 px: 209.5M and 76.7M (Table A2, first column).

    python -m gigagan_jax.train --config=configs/imagenet.py --workdir=DIR

Data: the TFDS data set imagenet2012, prepared as array_record; or by --config.data.path another one, or a folder that holds
one folder of images a class. Labels go through the mapping network; the discriminator is a projection
discriminator with one input and one output, and neither text nor matching-aware loss.
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """Variants: `:tiny` has every part at toy width."""
    c = settings.default()
    c.name = "imagenet"
    c.condition, c.num_classes = "class", 1000
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
    c.snapshot.prompts = ("0", "1", "207", "281", "417", "933")  # class labels

    if arg == "tiny":
        c.name += "-tiny"
        c.resolution, c.num_classes, c.batch_size, c.dtype = 16, 10, 16, "float32"
        c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg, c.log_kimg = 1.6, 0.8, 0.8, 0.16
        g.z_dim, g.w_dim, g.channel_base, g.channel_max = 16, 32, 256, 32
        g.blocks, g.bank, g.attention_depth = (1, 1, 1), (4, 4, 4), (0, 2, 0)
        d.channel_base, d.channel_max, d.blocks, d.attention_depth = 256, 32, (1, 1, 1), (0, 1, 0)
        d.class_mapping_depth, d.minibatch_std = 2, 4
        for net in (g, d):
            net.attention.heads, net.attention.head_dim = 2, 16
        c.snapshot.prompts, c.snapshot.seeds = ("0", "1", "7"), 4
    elif arg:
        raise ValueError(f"configs/imagenet.py has no variant {arg!r}; known: tiny")
    return c

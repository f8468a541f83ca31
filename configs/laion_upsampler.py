"""The paper's text-conditional upsampler: 64 to 512 px, 359.1M and 130.1M (Table A2, fourth column; here to 2 %).

    python -m gigagan_jax.train --config=configs/laion_upsampler.py --workdir=DIR --config.data.path='gs://bucket/{00000..01234}.tar'

Data: as configs/laion.py takes it, at 512 px and above; the small images are made of the large ones on the device. Captions go
through a frozen CLIP ViT-L/14. LPIPS needs the VGG-16 of torchvision as `--config.perceptual.path=FILE` (docs/upsampler.md);
`--config.loss.perceptual=0 --config.loss.pixel=100` needs none.

Hardware: the paper trained it on 96 to 128 A100 for 915k steps. Here it is planned for 64 TPU v5p chips at batch 256
(docs/upsampler.md: memory and step time as the compiler estimates them, and the layout of the networks).
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """Variants: `:1024` is 128 to 1024 px at 693M, whose layout is ours; `:bytes` needs no CLIP and no VGG; `:tiny` has every
    part at toy width."""
    c = settings.default()
    c.name = "laion-upsampler"
    c.text.encoder, c.text.path = "clip", "openai/clip-vit-large-patch14"
    c.resolution, c.upsampler.input_resolution, c.upsampler.bottleneck = 512, 64, 8
    c.upsampler.noise = 0.3  # (open)
    c.batch_size = 256
    c.total_kimg = 234_000.0  # 915k steps
    c.ema.half_life_kimg = 20.0  # beta 0.9890 at batch 320
    # The large images are what fills the memory: activations are computed twice.
    c.remat = True

    g, d = c.generator, c.discriminator
    g.w_dim = 512
    g.channel_base, g.channel_max = 32768, 512
    # Table A2 has the blocks and the attention; the filters a level are chosen so that the count is its 359.1M, to 1.3 %.
    g.blocks, g.bank = (4, 4, 4, 4, 4, 4, 3), (1, 2, 4, 4, 8, 16, 16)
    g.attention_depth = (2, 2, 2, 1, 0, 0, 0)
    g.attention_gain = 0.5
    d.channel_base, d.channel_max = 32768, 512
    d.blocks, d.attention_depth = (1,) * 8, (0, 0, 0, 0, 0, 2, 2, 0)
    d.attention_gain, d.mlp = 0.5, True
    # Five levels enter, and five exits follow them; the width of the heads gives 130.1M, to 0.8 %.
    d.input_levels, d.output_levels, d.head_width = 5, 5, 2112
    d.minibatch_std = 2
    for net in (g, d):
        net.text.depth = 2
    c.loss.level_weights = (0.2,) * 5
    c.loss.r1_gamma = (0.2048, 0.2048)
    c.loss.clip = (1.0, 1.0)
    c.loss.perceptual = 10.0
    c.perceptual.path = "timm/vgg16.tv_in1k"
    c.health.min_diversity_z = 0.0  # one small image has nearly one large one

    if arg == "1024":
        c.name += "-1024"
        c.resolution, c.upsampler.input_resolution = 1024, 128
        g.channel_base, g.channel_max = 65536, 640
        g.blocks, g.bank = (4,) * 7 + (3,), (1, 2, 4, 4, 8, 8, 16, 16)
        g.attention_depth = (2, 2, 2, 2, 0, 0, 0, 0)
        d.blocks, d.attention_depth = (1,) * 9, (0, 0, 0, 0, 0, 0, 2, 2, 0)
    elif arg == "bytes":
        c.name += "-bytes"
        c.text.encoder, c.text.path, c.text.length = "bytes", "", 256
        c.loss.clip, c.loss.perceptual, c.loss.pixel = (0.0, 0.0), 0.0, 100.0
    elif arg == "tiny":
        shrink(c)
    elif arg:
        raise ValueError(f"configs/laion_upsampler.py has no variant {arg!r}; known: 1024, bytes, tiny")
    return c


def shrink(c: ConfigDict) -> None:
    """The same parts at toy width: 8 to 32 px, without a download."""
    c.name += "-tiny"
    c.dtype = "float32"
    c.resolution, c.upsampler.input_resolution, c.upsampler.bottleneck = 32, 8, 4
    c.batch_size = 8
    c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg, c.log_kimg = 0.8, 0.4, 0.4, 0.08
    c.text.length, c.text.width = 48, 32
    c.text.encoder, c.text.path = "auto", ""
    c.loss.clip, c.loss.perceptual, c.loss.pixel = (0.0, 0.0), 0.0, 100.0
    g, d = c.generator, c.discriminator
    g.z_dim, g.w_dim = 16, 32
    g.channel_base, g.channel_max = 256, 32
    g.blocks, g.bank, g.attention_depth = (2, 1, 1, 1), (1, 2, 2, 2), (1, 1, 0, 0)
    d.channel_base, d.channel_max = 256, 32
    d.blocks, d.attention_depth = (1, 1, 1, 1), (0, 0, 1, 0)
    d.input_levels, d.output_levels, d.head_width = 2, 3, 16
    c.loss.level_weights = (0.5, 0.5)
    for net in (g, d):
        net.text.width, net.text.depth, net.text.heads = 32, 1, 2
        net.attention.heads, net.attention.head_dim = 2, 16
    c.snapshot.seeds = 4

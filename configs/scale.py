"""The paper's base model past a billion parameters: `--config=configs/scale.py:SIZE` with 1b, 3b or 10b (of the generator).

    python -m gigagan_jax.train --config=configs/scale.py:10b --workdir=DIR --config.data.path='gs://bucket/{00000..01234}.tar'

The rule. Width and depth of configs/laion.py grow by one factor m, 1.21, 1.72 and 2.48, in G and D alike: parameters by
about m^3, and D keeps its share (0.56 to 0.57 of G). Depth costs little compile time, since equal blocks are one scanned
program, or up to three with attention between them; width alone would make the largest array, which one chip holds whole
while it is used, grow as the model does.
  - Widths (channels, w, T, attention, heads of D) are the multiple of 128 next to m times that of laion.py: matrix units
    are full, and every mesh of up to fsdp x tensor = 128 divides. z, the filter banks and the frozen networks stay.
  - Depths (blocks, attention layers, layers of T) are m times that of laion.py, rounded. Residual gains go by m^-1/2:
    those of G, of D's attention and of T, so that the variance of a sum over m times as many branches stays. That of D's
    blocks, (skip + gain f(x)) / sqrt(1 + gain^2), too: of the variance a block keeps 1 / (1 + gain^2), so that what is
    left of the image after m times as many is about the same.
  - Learning rate 0.0025 / m. A hidden layer's output moves by a full step where Adam's step goes by 1 / width (muP: Yang et
    al., 2022). With an equalized learning rate a weight is stored times sqrt(width), so half of that is already there:
    m^-1/2 is left. m times as many branches of gain m^-1/2, all of which move the sum the same way, ask for another m^-1/2
    (Yang et al., 2023, for Adam). GAT (2025) found 1 / width in plain parametrisation at GANs of this kind. It is a
    starting point: the paper has one rate for both of its widths, and nobody trained these sizes.

`:SIZE-bytes` needs no CLIP; `:SIZE-paper` has the paper's heads of D and losses. Hardware: 64 TPU v5p chips or more, or 256
v5e or v6e, at batch 1024 (docs/planning.md: figures of `:SIZE-paper`; docs/meshes.md: which mesh). Parameters are cut over
16 chips, those of 10b over 64, which 16 GiB a chip ask for (v5p: `--config.mesh.fsdp=16`, which sends less). With fewer
devices, `--config.mesh.fsdp=8`.
"""

from ml_collections import ConfigDict

from configs import laion

SIZES = {"1b": 1.21, "3b": 1.72, "10b": 2.48}  # m
MULTIPLE = 128


def get_config(arg: str = "1b") -> ConfigDict:
    """Variants: 1b, 3b, 10b; each with -bytes for a text encoder that needs no download, or -paper for the paper's losses."""
    size, _, variant = arg.partition("-")
    known = [f"{size}{end}" for end in ("", "-bytes", "-paper") for size in SIZES]
    if arg not in known:
        raise ValueError(f"configs/scale.py has no variant {arg!r}; known: {', '.join(known)}")
    c = laion.get_config(variant)
    c.name = f"scale-{arg}"
    m = SIZES[size]
    width = lambda n: round(n * m / MULTIPLE) * MULTIPLE
    depths = lambda values: tuple(round(n * m) for n in values)

    g, d = c.generator, c.discriminator
    for net in (g, d):
        net.channel_base = width(net.channel_base // c.resolution) * c.resolution
        net.channel_max = width(net.channel_max)
        net.blocks, net.attention_depth = depths(net.blocks), depths(net.attention_depth)
        net.attention.heads = width(net.attention.heads * net.attention.head_dim) // net.attention.head_dim
        net.text.width, net.text.depth = width(net.text.width), round(net.text.depth * m)
        net.text.heads = net.text.width // 64
    g.w_dim, d.head_width = width(g.w_dim), width(d.head_width)
    g.residual_gain, g.attention_gain = g.residual_gain / m**0.5, g.attention_gain / m**0.5
    d.residual_gain, d.attention_gain = d.residual_gain / m**0.5, d.attention_gain / m**0.5
    for text in (g.text, d.text):
        text.residual_gain /= m**0.5
    for o in (c.g_optimizer, c.d_optimizer):
        o.learning_rate /= m
    c.mesh.data, c.mesh.fsdp = -1, 64 if size == "10b" else 16
    c.remat = True  # laion.py does without; here what would be kept is what does not fit
    return c

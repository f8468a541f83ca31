"""GigaGAN (Kang et al., CVPR 2023, arXiv:2303.05511) in PyTorch: generator, upsampler, discriminator, vision-aided heads.

This file needs torch and nothing else: copy it, and go on training. Sections and equations are those of the paper.
Images are [N, 3, R, R] in [-1, 1]. `config` is the content of a converted checkpoint's config.json.

    config = json.loads(Path("config.json").read_text())
    generator = Generator(config)
    generator.load_state_dict(safetensors.torch.load_file("model.safetensors"))
    tokens = tokenize(["a handwritten seven"], config["text"])
    images = generator(torch.randn(1, generator.z_dim), tokens)[-1]

An upsampler's config gives `Upsampler(config)`, which takes a small image too; `make_generator(config)` builds either.
Weights are drawn from N(0, 1) and scaled where they are used (equalized learning rate; Karras et al., 2018).
"""

import itertools
import math
import re
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRAINED_ENCODERS = ("bytes", "words")
# The tokenizers of bytes and words: pad, begin, end; then bytes, or hashed words.
BYTE_VOCABULARY = 259
PAD_ID, BEGIN_ID, END_ID = 0, 1, 2


def tokenize(captions: list[str], text: dict) -> Tensor:
    """Captions -> tokens [N, C] of a trained encoder: begin, bytes or words, end, pads.

    A frozen encoder (CLIP, T5) has a tokenizer of its own, in transformers.
    """
    length, rows = text["length"], []
    for caption in captions:
        if text["encoder"] == "words":
            words = re.findall(r"\w+", caption.casefold())
            ids = [3 + zlib.crc32(word.encode("utf-8", "replace")) % (text["buckets"] ** 2 - 3) for word in words]
            ids = ids[: length - 2]
        else:
            # A character that does not fit whole is left out.
            data = caption.encode("utf-8", "replace")[: length - 2].decode("utf-8", "ignore").encode()
            ids = [byte + 3 for byte in data]
        row = [BEGIN_ID, *ids, END_ID]
        rows.append(row + [PAD_ID] * (length - len(row)))
    return torch.tensor(rows)


# ---------------------------------------------------------------- layers


def leaky_relu(x: Tensor) -> Tensor:
    """max(x, 0.2 x) sqrt(2): keeps the second moment of a normal input."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2.0)


def normalize(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _filter(x: Tensor, gain: float, padding: tuple[int, int], stride: int) -> Tensor:
    """[1, 3, 3, 1] x [1, 3, 3, 1], normalised to `gain`, on each channel of [N, C, H, W]."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    kernel = gain * taps[:, None] * taps[None, :]
    channels = x.shape[1]
    x = F.pad(x, (*padding, *padding))
    return F.conv2d(x, kernel.expand(channels, 1, 4, 4), stride=stride, groups=channels)


def upsample(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W]"""
    n, c, h, w = x.shape
    # Zeros between the samples, then the filter.
    spread = x.new_zeros(n, c, h, 2, w, 2)
    spread[:, :, :, 0, :, 0] = x
    return _filter(spread.reshape(n, c, 2 * h, 2 * w), 4.0, (2, 1), 1)


def downsample(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H / 2, W / 2]"""
    return _filter(x, 1.0, (1, 1), 2)


def enlarge(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W] by Lanczos interpolation (a = 3), border pixels repeated outside."""
    # For the place a quarter of a sample behind each; the place before it has the same weights backwards.
    sinc = lambda t: math.sin(math.pi * t) / (math.pi * t)
    distances = [k - 0.25 for k in range(-3, 4)]
    behind = [sinc(d) * sinc(d / 3) if abs(d) < 3 else 0.0 for d in distances]
    taps = torch.tensor([behind[::-1], behind], dtype=x.dtype, device=x.device) / sum(behind)
    c = x.shape[1]
    for _ in range(2):
        # Along the last axis, which is then swapped with the other.
        pair = F.conv2d(F.pad(x, (3, 3, 0, 0), mode="replicate"), taps.repeat(c, 1)[:, None, None], groups=c)
        x = pair.unflatten(1, (c, 2)).movedim(2, -1).flatten(3).transpose(2, 3)
    return x


def image_pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """Real images [N, 3, R, R] -> `levels` images, high to low, by area averaging."""
    images = [x]
    for _ in range(levels - 1):
        images.append(F.avg_pool2d(images[-1], 2))
    return images


class Linear(nn.Module):
    """y = x W^T lr_mul / sqrt(in) + b lr_mul."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        bias: float | None = 0.0,
        lr_mul: float = 1.0,
        zero: bool = False,
        fan_in: int | None = None,
    ):
        super().__init__()
        self.lr_mul, self.scale = lr_mul, lr_mul / math.sqrt(fan_in or n_in)
        self.weight = nn.Parameter(torch.zeros(n_out, n_in) if zero else torch.randn(n_out, n_in) / lr_mul)
        self.bias = None if bias is None else nn.Parameter(torch.full((n_out,), bias / lr_mul))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, None if self.bias is None else self.bias * self.lr_mul)


class Conv(nn.Module):
    """k x k convolution; `down` halves the resolution with the filter in front of a stride of two."""

    def __init__(
        self, n_in: int, n_out: int, kernel: int, down: bool = False, bias: bool = True, fan_in: int | None = None
    ):
        super().__init__()
        self.down, self.scale = down, 1.0 / math.sqrt(kernel * kernel * (fan_in or n_in))
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, side = self.weight * self.scale, self.weight.shape[-1]
        if not self.down:
            return F.conv2d(x, weight, self.bias, padding=side // 2)
        if side == 1:
            return F.conv2d(downsample(x), weight, self.bias)
        return F.conv2d(_filter(x, 1.0, (2, 2), 1), weight, self.bias, stride=2)


class AdaptiveConv(nn.Module):
    """Sample-adaptive kernel selection, modulation and demodulation (sec. 3.1, eq. 1 and 2)."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        w_dim: int,
        kernel: int = 3,
        bank: int = 1,
        up: bool = False,
        demodulate: bool = True,
        activation: bool = True,
        gain: float = 1.0,
    ):
        super().__init__()
        self.up, self.demodulate, self.activation = up, demodulate, activation
        self.scale = gain / math.sqrt(kernel * kernel * n_in)
        self.filters = nn.Parameter(torch.randn(bank, n_out, n_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.style = Linear(w_dim, n_in, bias=1.0)
        self.select = Linear(w_dim, bank) if bank > 1 else None

    def make_kernels(self, w: Tensor) -> Tensor:
        """w [N, w_dim] -> a kernel a sample, [N, out, in, k, k]"""
        filters = self.filters * self.scale
        if self.select is None:
            kernels = filters.expand(w.shape[0], *filters.shape[1:])
        else:
            # eq. 1: a kernel a sample, mixed from the bank.
            kernels = torch.einsum("nb,boikl->noikl", self.select(w).softmax(-1), filters)
        # eq. 2: modulation of the input channels, and demodulation of each output filter.
        kernels = kernels * self.style(w)[:, None, :, None, None]
        if self.demodulate:
            kernels = kernels * torch.rsqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        return kernels

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, in, H, W], w [N, w_dim] -> [N, out, H', W']"""
        n, n_out, side = x.shape[0], self.filters.shape[1], self.filters.shape[-1]
        kernels = self.make_kernels(w)
        if self.up:
            x = upsample(x)
        h, width = x.shape[2:]
        y = F.conv2d(x.reshape(1, -1, h, width), kernels.flatten(0, 1), padding=side // 2, groups=n)
        y = y.reshape(n, n_out, h, width) + self.bias[:, None, None]
        return leaky_relu(y) if self.activation else y


class RmsNorm(nn.Module):
    """x / rms(x) * gain over the last axis."""

    def __init__(self, features: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, 1e-6) * self.gain


def make_norm(features: int, kind: str) -> nn.Module:
    """The normalisation before a branch: "rms" or "none"."""
    return RmsNorm(features) if kind == "rms" else nn.Identity()


# ---------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str, mask: Tensor | None = None, mask_self: bool = False) -> Tensor:
    """Softmax attention: "dot" q.k / sqrt(d), "l2" -|q - k|^2 / sqrt(8 d) (sec. 3.1).

    q [N, T, heads, d], k and v [N, S, heads, d], mask bool [N, S] of the keys that may be seen -> [N, T, heads * d]
    """
    d = q.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2)
    if kind == "dot":
        logits = logits / math.sqrt(d)
    else:
        squares = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]
        logits = (2.0 * logits - squares) / math.sqrt(8.0 * d)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -1e30)
    if mask_self:
        itself = torch.eye(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        logits = logits.masked_fill(itself, -1e30)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention branch; with `extra` one more token, w, is looked at. Query and key are one projection for "l2"."""

    def __init__(self, features: int, a: dict, extra: int = 0, zero: bool = False):
        super().__init__()
        self.heads, self.kind, self.mask_self = a["heads"], a["kind"], a["mask_self"]
        inner = self.heads * round(a["head_dim"] * a["dim_multiplier"])
        self.norm = make_norm(features, a["norm"])
        self.to_query = Linear(features, inner, bias=None)
        self.to_key = Linear(features, inner, bias=None) if self.kind == "dot" else None
        self.to_value = Linear(features, inner, bias=None)
        self.out = Linear(inner, features, zero=zero)
        self.to_extra = Linear(extra, features) if extra else None

    def forward(self, x: Tensor, extra: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [N, T, C], extra [N, E], mask bool [N, T] -> [N, T, C]"""
        h = self.norm(x)
        tokens = h if self.to_extra is None else torch.cat([h, self.to_extra(extra)[:, None]], dim=1)
        split = lambda y: y.unflatten(-1, (self.heads, -1))
        key = self.to_query(tokens) if self.to_key is None else self.to_key(tokens)
        query, key, value = split(self.to_query(h)), split(key), split(self.to_value(tokens))
        return self.out(attend(query, key, value, self.kind, mask, self.mask_self))


class CrossAttention(nn.Module):
    """Dot-product attention from the feature map to text."""

    def __init__(self, features: int, context: int, a: dict, zero: bool = False):
        super().__init__()
        self.heads = a["heads"]
        inner = self.heads * round(a["head_dim"] * a["dim_multiplier"])
        self.norm, self.context_norm = make_norm(features, a["norm"]), make_norm(context, a["norm"])
        self.to_query = Linear(features, inner, bias=None)
        self.to_key = Linear(context, inner, bias=None)
        self.to_value = Linear(context, inner, bias=None)
        self.out = Linear(inner, features, zero=zero)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x [N, T, C], context [N, S, D], mask bool [N, S] -> [N, T, C]"""
        split = lambda y: y.unflatten(-1, (self.heads, -1))
        context = self.context_norm(context)
        query, key, value = self.to_query(self.norm(x)), self.to_key(context), self.to_value(context)
        return self.out(attend(split(query), split(key), split(value), "dot", mask))


class FeedForward(nn.Module):
    """C -> C ratio -> C branch."""

    def __init__(self, features: int, ratio: float, norm: str, zero: bool = False):
        super().__init__()
        hidden = round(features * ratio)
        self.norm = make_norm(features, norm)
        self.up, self.down = Linear(features, hidden), Linear(hidden, features, zero=zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(leaky_relu(self.up(self.norm(x))))


# ---------------------------------------------------------------- conditions


class TrainedEncoder(nn.Module):
    """The text encoder over bytes or words: an embedding, a place, and a depthwise convolution over neighbours.

    A word's id is a pair of rows of two tables, id % buckets and id // buckets.
    """

    def __init__(self, text: dict):
        super().__init__()
        width, words = text["width"], text["encoder"] == "words"
        self.buckets = text["buckets"]
        self.embedding = nn.Parameter(torch.randn(self.buckets if words else BYTE_VOCABULARY, width))
        self.quotient_embedding = nn.Parameter(torch.randn(self.buckets, width)) if words else None
        self.position = nn.Parameter(torch.randn(text["length"], width))
        self.mix = nn.Parameter(torch.randn(3, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [N, C] -> [N, C, width]"""
        if self.quotient_embedding is None:
            x = self.embedding[tokens]
        else:
            pair = self.embedding[tokens % self.buckets] + self.quotient_embedding[tokens // self.buckets]
            x = pair / math.sqrt(2.0)
        x = x + self.position
        seen = (tokens != PAD_ID)[:, :, None]
        neighbours = F.pad(x * seen, (0, 0, 1, 1))
        mix = self.mix / math.sqrt(3.0)
        near = neighbours[:, :-2] * mix[0] + x * mix[1] + neighbours[:, 2:] * mix[2]
        return x + leaky_relu(near + self.bias)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, t: dict):
        super().__init__()
        self.gain = t["residual_gain"]
        a = {"heads": t["heads"], "head_dim": t["width"] // t["heads"], "dim_multiplier": 1.0}
        self.attention = SelfAttention(t["width"], a | {"kind": "dot", "mask_self": False, "norm": "rms"})
        self.feed_forward = FeedForward(t["width"], t["mlp_ratio"], "rms")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.gain * self.attention(x, mask=mask)
        return x + self.gain * self.feed_forward(x)


class TextTransformer(nn.Module):
    """T (eq. 3a): features of the text encoder -> t_global, t_local and the mask of t_local."""

    def __init__(self, n_in: int, t: dict):
        super().__init__()
        self.project = Linear(n_in, t["width"]) if n_in != t["width"] else None
        self.blocks = nn.ModuleList(TransformerBlock(t) for _ in range(t["depth"]))
        self.norm = RmsNorm(t["width"])

    def forward(self, x: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, C, n_in], end [N] place of the end token -> ([N, D], [N, C - 1, D], bool [N, C - 1])"""
        n, c = x.shape[:2]
        place = torch.arange(c, device=x.device)
        mask = place <= end[:, None]
        x = x if self.project is None else self.project(x)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        # All positions but that of the end token.
        rest = torch.arange(c - 1, device=x.device)
        rest = rest + (rest >= end[:, None])
        local = x.gather(1, rest[:, :, None].expand(-1, -1, x.shape[-1]))
        return x[torch.arange(n, device=x.device), end], local, mask.gather(1, rest)


class Conditioner(nn.Module):
    """Captions or classes -> (t_global, t_local, mask); parts that do not apply are None.

    A frozen text encoder is no part of it: its features [N, C, D] come in beside the tokens.
    """

    def __init__(self, config: dict, transformer: dict):
        super().__init__()
        self.kind, text = config["condition"], config["text"]
        self.width = {"text": transformer["width"], "class": config["generator"]["w_dim"], "none": 0}[self.kind]
        if self.kind == "text":
            trained = text["encoder"] in TRAINED_ENCODERS
            self.end_id = END_ID if trained else text["end_id"]
            self.encoder = TrainedEncoder(text) if trained else None
            self.transformer = TextTransformer(text["width"] if trained else text["encoder_width"], transformer)
        elif self.kind == "class":
            self.embedding = nn.Parameter(torch.randn(config["num_classes"] or 1000, self.width))

    def forward(
        self, tokens: Tensor | None = None, labels: Tensor | None = None, features: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.kind == "none":
            return None, None, None
        if self.kind == "class":
            return self.embedding[labels], None, None
        end = (tokens == self.end_id).int().argmax(1)
        return self.transformer(features if self.encoder is None else self.encoder(tokens), end)


# ---------------------------------------------------------------- the generator


class Mapping(nn.Module):
    """M: w = M(z, t_global) (eq. 3b); an upsampler's reads the noise level too, as `extra` features."""

    def __init__(self, g: dict, global_width: int, extra: int = 0):
        super().__init__()
        widths, lr_mul = [g["z_dim"] + global_width, *([g["w_dim"]] * g["mapping_depth"])], g["mapping_lr_mul"]
        # The first layer and that of the extra features are one layer of all inputs, in two parts.
        both = widths[0] + extra
        self.layers = nn.ModuleList(
            Linear(a, b, lr_mul=lr_mul, fan_in=None if i else both)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.extra = Linear(extra, g["w_dim"], None, lr_mul, fan_in=both) if extra else None

    def forward(self, z: Tensor, t_global: Tensor | None, extra: Tensor | None = None) -> Tensor:
        x = normalize(z) if t_global is None else torch.cat([normalize(z), normalize(t_global)], dim=-1)
        first, *rest = self.layers
        x = leaky_relu(first(x) if self.extra is None else first(x) + self.extra(extra))
        for layer in rest:
            x = leaky_relu(layer(x))
        return x


class AttentionLayer(nn.Module):
    """g_attn and g_xa of eq. 5, each with its feed-forward, x + gain f(x); g_attn may stay within windows of the map."""

    def __init__(self, g: dict, features: int, context: int):
        super().__init__()
        a, zero = g["attention"], g["attention_zero_init"]
        self.gain, self.window = g["attention_gain"], a["window"]
        mlp = lambda wanted: FeedForward(features, a["mlp_ratio"], a["norm"], zero) if wanted else None
        self.attention = SelfAttention(features, a, g["w_dim"] if g["w_token"] else 0, zero)
        self.self_mlp = mlp(g["mlp_after_self"])
        self.cross = CrossAttention(features, context, a, zero) if context else None
        self.cross_mlp = mlp(context and g["mlp_after_cross"])

    def forward(self, x: Tensor, w: Tensor, local: Tensor | None, mask: Tensor | None) -> Tensor:
        """x [N, C, H, W] -> the same shape"""
        shape = x.shape
        x = (x + self.gain * self.attend(x, w)).flatten(2).transpose(1, 2)
        if self.self_mlp is not None:
            x = x + self.gain * self.self_mlp(x)
        if self.cross is not None:
            x = x + self.gain * self.cross(x, local, mask)
        if self.cross_mlp is not None:
            x = x + self.gain * self.cross_mlp(x)
        return x.transpose(1, 2).reshape(shape)

    def attend(self, x: Tensor, w: Tensor) -> Tensor:
        """Self-attention of each window of a fixed grid, or of the whole map: [N, C, H, W] -> the same shape"""
        c, h, width = x.shape[1:]
        rows, columns = (self.window or h), (self.window or width)
        down, across = h // rows, width // columns
        # A window is an example of its own; each sees the w of its image.
        windows = x.reshape(-1, c, down, rows, across, columns).permute(0, 2, 4, 3, 5, 1)
        style = w[:, None].expand(-1, down * across, -1).flatten(0, 1) if self.attention.to_extra is not None else None
        y = self.attention(windows.reshape(-1, rows * columns, c), style)
        y = y.reshape(-1, down, across, rows, columns, c).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(-1, c, h, width)


class SynthesisBlock(nn.Module):
    """Two adaptive convolutions with a skip (eq. 5), and the attention layers behind them."""

    def __init__(self, g: dict, n_in: int, n_out: int, bank: int, up: bool, single: bool, attention: int, context: int):
        super().__init__()
        self.up, self.gain, scale = up, g["residual_gain"], g["layer_scale"]
        self.conv0 = AdaptiveConv(n_in, n_out, g["w_dim"], bank=bank, up=up)
        self.conv1 = None if single else AdaptiveConv(n_out, n_out, g["w_dim"], bank=bank)
        self.norm = RmsNorm(n_in) if scale else None
        self.layer_scale = nn.Parameter(torch.full((n_out,), scale)) if scale else None
        self.skip = Conv(n_in, n_out, 1, bias=False) if n_in != n_out else None
        self.attention = nn.ModuleList(AttentionLayer(g, n_out, context) for _ in range(attention))
        self.attends_first = g["attention_placement"] == "every"

    def forward(
        self, x: Tensor, w: Tensor, local: Tensor | None, mask: Tensor | None, encoded: Tensor | None = None
    ) -> Tensor:
        """x [N, n_in, H, W] -> [N, n_out, H', W']; `encoded` is of that shape and is added."""
        h = x if self.norm is None else self.norm(x.movedim(1, -1)).movedim(-1, 1)
        h = self.conv0(h, w)
        h = h if self.conv1 is None else self.conv1(h, w)
        x = upsample(x) if self.up else x
        x = x if self.skip is None else self.skip(x)
        x = x + (self.gain if self.layer_scale is None else self.layer_scale[:, None, None]) * h
        # Before the attention behind the block, but after attention that is part of every block.
        if encoded is not None and not self.attends_first:
            x = x + encoded
        for layer in self.attention:
            x = layer(x, w, local, mask)
        return x + encoded if encoded is not None and self.attends_first else x


def channels_at(net: dict, side: int) -> int:
    """Channels of a network's features at a resolution: min(base / resolution, max) (Table A2)."""
    return min(net["channel_base"] // side, net["channel_max"])


class SynthesisLevel(nn.Module):
    """One resolution: blocks, attention, and what is added to the image (Fig. 4).

    `lowest` is the side of level 0; `single` gives the first block one convolution; without `rgb` nothing is added; `sharp`
    enlarges the image below as a picture, by `enlarge`.
    """

    def __init__(
        self,
        g: dict,
        index: int,
        n_in: int,
        context: int,
        lowest: int = 4,
        single: bool = False,
        rgb: bool = True,
        sharp: bool = False,
    ):
        super().__init__()
        self.enlarge = enlarge if sharp else upsample
        features = channels_at(g, lowest << index)
        count, depth, placement = g["blocks"][index], g["attention_depth"][index], g["attention_placement"]
        # Behind the k-th of d attention layers there are ceil(k B / d) blocks; or "every" block has layers; or the last has all.
        behind = {
            "spread": [[-(-(k + 1) * count // depth) - 1 for k in range(depth)].count(b) for b in range(count)],
            "last": [0] * (count - 1) + [depth],
            "every": [depth] * count,
        }[placement]
        self.blocks = nn.ModuleList(
            SynthesisBlock(
                g,
                features if b else n_in,
                features,
                g["bank"][index],
                up=index > 0 and b == 0,
                single=single and b == 0,
                attention=behind[b],
                context=context,
            )
            for b in range(count)
        )
        kind = {"kernel": 1, "demodulate": False, "activation": False, "gain": g["rgb_gain"]}
        self.to_rgb = AdaptiveConv(features, 3, g["w_dim"], **kind) if rgb else None

    def forward(
        self,
        x: Tensor,
        image: Tensor | None,
        w: Tensor,
        local: Tensor | None,
        mask: Tensor | None,
        encoded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Features and image of the level below -> those of this one; `encoded` is added behind the first block."""
        for i, block in enumerate(self.blocks):
            x = block(x, w, local, mask, encoded if i == 0 else None)
        if self.to_rgb is None:
            return x, image
        rgb = self.to_rgb(x, w)
        return x, rgb if image is None else self.enlarge(image) + rgb


class Generator(nn.Module):
    """(z, caption) -> images, low to high (eq. 3 and 4)."""

    def __init__(self, config: dict):
        super().__init__()
        g = config["generator"]
        self.z_dim = g["z_dim"]
        self.conditioner = Conditioner(config, g["text"])
        self.mapping = Mapping(g, self.conditioner.width)
        context = self.conditioner.width if g["cross_attention"] and config["condition"] == "text" else 0
        features = channels_at(g, 4)
        self.constant = nn.Parameter(torch.randn(features, 4, 4))
        # The mean of w, to which truncation pulls.
        self.register_buffer("w_avg", torch.zeros(g["w_dim"]))
        self.levels = nn.ModuleList()
        for i in range(len(g["blocks"])):
            # One convolution behind the constant.
            self.levels.append(SynthesisLevel(g, i, features, context, single=i == 0))
            features = channels_at(g, 4 << i)

    def map(self, z: Tensor, t_global: Tensor | None) -> Tensor:
        """z [N, z_dim] -> w [N, w_dim]"""
        return self.mapping(z, t_global)

    def synthesize(self, w: Tensor, local: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        """w [N, w_dim] -> images [N, 3, r, r], r = 4, 8, ..."""
        x = self.constant.expand(w.shape[0], *self.constant.shape)
        image, images = None, []
        for level in self.levels:
            x, image = level(x, image, w, local, mask)
            images.append(image)
        return images

    def forward(
        self,
        z: Tensor,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        truncation: float = 1.0,
    ) -> list[Tensor]:
        """z [N, z_dim] and captions or classes -> images low to high; truncation pulls w towards its mean of all prompts."""
        t_global, local, mask = self.conditioner(tokens, labels, features)
        w = self.map(z, t_global)
        return self.synthesize(self.w_avg + truncation * (w - self.w_avg), local, mask)


# ---------------------------------------------------------------- the upsampler


class ResidualBlock(nn.Module):
    """(skip + gain f(x)) / sqrt(1 + gain^2): of the upsampler's encoder and of the discriminator."""

    def __init__(self, n_in: int, n_out: int, down: bool, gain: float):
        super().__init__()
        self.gain = gain
        self.conv0, self.conv1 = Conv(n_in, n_in, 3), Conv(n_in, n_out, 3, down=down)
        self.skip = Conv(n_in, n_out, 1, down=True, bias=False) if down else None

    def forward(self, x: Tensor) -> Tensor:
        y = leaky_relu(self.conv1(leaky_relu(self.conv0(x))))
        skip = x if self.skip is None else self.skip(x)
        return (skip + self.gain * y) / math.sqrt(1.0 + self.gain**2)


def embed_noise_level(level: Tensor) -> Tensor:
    """[N] in [0, 1] -> [N, 8]: sqrt(2) times sines and cosines of level * pi / 2 * (1, 2, 4, 8)."""
    angles = level[:, None] * (0.5 * math.pi) * 2.0 ** torch.arange(4, device=level.device)
    return math.sqrt(2.0) * torch.cat([angles.sin(), angles.cos()], dim=-1)


class Encoder(nn.Module):
    """The way down of the U-Net (sec. 3.4): residual blocks from the small image to the bottleneck."""

    def __init__(self, u: dict, g: dict):
        super().__init__()
        side = u["input_resolution"]
        self.stem = Conv(3, channels_at(g, side), 3)
        self.stages = nn.ModuleList()
        while side > u["bottleneck"]:
            features, below = channels_at(g, side), channels_at(g, side // 2)
            same = [ResidualBlock(features, features, False, 1.0) for _ in range(u["encoder_blocks"] - 1)]
            self.stages.append(nn.ModuleList([*same, ResidualBlock(features, below, True, 1.0)]))
            side //= 2

    def forward(self, low: Tensor) -> list[Tensor]:
        """low [N, 3, h, w] -> features [N, C, h', w'], from the bottleneck up to the image's resolution"""
        x, features = leaky_relu(self.stem(low)), []
        for stage in self.stages:
            *same, down = stage.children()
            for block in same:
                x = block(x)
            features.append(x)
            x = down(x)
        return [x, *features[::-1]]


class Upsampler(nn.Module):
    """(z, small image, caption) -> larger images, low to high (sec. 3.4).

    The small image may have any size whose sides are multiples of the encoder's strides and of the attention's windows.
    """

    def __init__(self, config: dict):
        super().__init__()
        u, g = config["upsampler"], config["generator"]
        self.z_dim, self.skip_gain, self.image_skip = g["z_dim"], u["skip_gain"], u["image_skip"]
        self.conditioner = Conditioner(config, g["text"])
        self.mapping = Mapping(g, self.conditioner.width, extra=8)
        context = self.conditioner.width if g["cross_attention"] and config["condition"] == "text" else 0
        self.encoder = Encoder(u, g)
        # The mean of w, which a run keeps. An upsampler has no truncation.
        self.register_buffer("w_avg", torch.zeros(g["w_dim"]))
        lowest = u["bottleneck"]
        features = channels_at(g, lowest)
        self.levels = nn.ModuleList()
        for i in range(len(g["blocks"])):
            side = lowest << i
            # Where the image starts as the small one, only levels above its size add to it.
            rgb = not u["image_skip"] or side > u["input_resolution"]
            self.levels.append(SynthesisLevel(g, i, features, context, lowest, rgb=rgb, sharp=u["image_skip"]))
            features = channels_at(g, side)

    def map(self, z: Tensor, t_global: Tensor | None, noise_level: Tensor) -> Tensor:
        """z [N, z_dim], noise_level [N] -> w [N, w_dim]"""
        return self.mapping(z, t_global, embed_noise_level(noise_level))

    def synthesize(self, w: Tensor, local: Tensor | None, mask: Tensor | None, low: Tensor) -> list[Tensor]:
        """w [N, w_dim], low [N, 3, h, w] -> images [N, 3, h', w'], each twice as large as the one before"""
        encoded = self.encoder(low)
        x, image, images = encoded[0], None, []
        for i, level in enumerate(self.levels):
            if self.image_skip and image is None and level.to_rgb is not None:
                image = low
            x, image = level(x, image, w, local, mask, self.skip_gain * encoded[i] if 0 < i < len(encoded) else None)
            if level.to_rgb is not None:
                images.append(image)
        return images

    def forward(
        self,
        z: Tensor,
        low: Tensor,
        noise_level: Tensor,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
    ) -> list[Tensor]:
        """z [N, z_dim], low [N, 3, h, w] in [-1, 1], noise_level [N] in [0, 1] of the noise in `low` -> images low to high"""
        t_global, local, mask = self.conditioner(tokens, labels, features)
        return self.synthesize(self.map(z, t_global, noise_level), local, mask, low)


def make_generator(config: dict) -> Generator | Upsampler:
    """The network of config.json: an upsampler where it has a small image."""
    return Upsampler(config) if config["upsampler"]["input_resolution"] else Generator(config)


# ---------------------------------------------------------------- the discriminator


class DiscriminatorAttention(nn.Module):
    """Self-attention, and a feed-forward where D has them."""

    def __init__(self, d: dict, features: int):
        super().__init__()
        a, self.gain = d["attention"], d["attention_gain"]
        self.attention = SelfAttention(features, a)
        self.feed_forward = FeedForward(features, a["mlp_ratio"], a["norm"]) if d["mlp"] else None

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)
        x = x + self.gain * self.attention(x)
        x = x if self.feed_forward is None else x + self.gain * self.feed_forward(x)
        return x.transpose(1, 2).reshape(shape)


class Epilogue(nn.Module):
    """4 x 4 px to one vector, with the deviation over groups of images (ProGAN, sec. 3)."""

    def __init__(self, d: dict, features: int):
        super().__init__()
        self.group = d["minibatch_std"]
        self.conv = Conv(features, features, 3)
        fan_in = features + 1 if d["minibatch_std_equalized"] else 1
        self.conv_std = Conv(1, features, 3, bias=False, fan_in=fan_in) if self.group else None
        self.dense = Linear(16 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.conv_std is not None:
            groups = x.unflatten(0, (-1, self.group)).flatten(2)
            deviation = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean(-1).repeat_interleave(self.group)
            y = y + self.conv_std(deviation[:, None, None, None].expand(-1, 1, 4, 4))
        # Positions first, then channels.
        return leaky_relu(self.dense(leaky_relu(y).movedim(1, -1).flatten(1)))[:, :, None, None]


class ModulatedHead(nn.Module):
    """psi(phi, t_D) + Conv1x1(phi) (eq. 7)."""

    def __init__(self, features: int, width: int, depth: int, condition: int, kernel: int = 1):
        super().__init__()
        self.unconditional = Conv(features, 1, 1)
        widths = [features, *([width] * (depth - 1)), 1]
        self.layers = nn.ModuleList()
        for i in range(depth if condition else 0):
            last = i == depth - 1
            layer = AdaptiveConv(widths[i], widths[i + 1], condition, kernel, demodulate=not last, activation=not last)
            self.layers.append(layer)

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        """x [N, C, h, w], t [N, D] -> [N, h * w]"""
        logits = self.unconditional(x)
        if t is not None:
            for layer in self.layers:
                x = layer(x, t)
            logits = logits + x
        return logits.flatten(1)


class ProjectionHead(nn.Module):
    """<embedding, phi> / sqrt(C) + Conv1x1(phi) (Miyato and Koyama, 2018)."""

    def __init__(self, features: int, condition: int):
        super().__init__()
        self.unconditional = Conv(features, 1, 1)
        self.embed = Linear(condition, features, bias=None)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        conditional = (x * self.embed(t)[:, :, None, None]).sum(1) / math.sqrt(x.shape[1])
        return (self.unconditional(x)[:, 0] + conditional).flatten(1)


class DiscriminatorLevel(nn.Module):
    """One resolution of the trunk: fromRGB, blocks, attention, the way down, the head (Fig. 5)."""

    def __init__(self, d: dict, index: int, condition: int):
        super().__init__()
        last = len(d["blocks"]) - 1
        side, gain = 4 << (last - index), d["residual_gain"]
        features = channels_at(d, side)
        below = features if index == last else channels_at(d, side // 2)
        # So many levels enter, from the output image down, and so many leave, from the last one up.
        entries = (d["input_levels"] or last + 1) if d["multi_scale_input"] else 1
        exits = (d["output_levels"] or last + 1) if d["multi_scale_output"] else 1
        self.entry = Conv(3, features, 1) if index < entries else None
        self.blocks = nn.ModuleList(
            ResidualBlock(features, features, False, gain) for _ in range(d["blocks"][index] - 1)
        )
        self.attention = nn.ModuleList(DiscriminatorAttention(d, features) for _ in range(d["attention_depth"][index]))
        self.down = Epilogue(d, features) if index == last else ResidualBlock(features, below, True, gain)
        self.head: nn.Module | None = None
        if index > last - exits:
            modulated = lambda: ModulatedHead(below, d["head_width"], d["head_depth"], condition)
            self.head = modulated() if d["head"] == "modulated" else ProjectionHead(below, condition)

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.blocks, *self.attention, self.down):
            x = part(x)
        return x


class Discriminator(nn.Module):
    """Image pyramid, high to low, and a caption -> a prediction for each (entry level, exit) (sec. 3.3)."""

    def __init__(self, config: dict):
        super().__init__()
        d = config["discriminator"]
        self.conditioner = Conditioner(config, d["text"])
        width, lr_mul = self.conditioner.width, config["generator"]["mapping_lr_mul"]
        self.class_mapping = nn.ModuleList(Linear(width, width, lr_mul=lr_mul) for _ in range(d["class_mapping_depth"]))
        self.levels = nn.ModuleList(DiscriminatorLevel(d, i, width) for i in range(len(d["blocks"])))

    def condition(
        self, tokens: Tensor | None = None, labels: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor | None:
        """t_D [N, D]"""
        t = self.conditioner(tokens, labels, features)[0]
        if t is not None and len(self.class_mapping):
            t = normalize(t)
            for layer in self.class_mapping:
                t = leaky_relu(layer(t))
        return t

    def forward(self, images: list[Tensor], t: Tensor | None) -> dict[tuple[int, int], Tensor]:
        """images [N, 3, r, r], t [N, D] -> {(level, exit): [N, h * w]}, level 0 the output image, exits high to low"""
        logits = {}
        for i, image in enumerate(images):
            entry = self.levels[i].entry
            if entry is None:
                continue
            x = leaky_relu(entry(image))
            for j in range(i, len(self.levels)):
                x = self.levels[j](x)
                if self.levels[j].head is not None:
                    logits[i, j] = self.levels[j].head(x, t)
        # By exit, then by level.
        return dict(sorted(logits.items(), key=lambda item: (item[0][1], item[0][0])))


class VisionHead(ModulatedHead):
    """A head of the vision-aided discriminator: a 3x3 convolution, then as eq. 7 with 3x3 kernels."""

    def __init__(self, v: dict, condition: int):
        super().__init__(v["head_width"], v["head_width"], v["head_depth"], condition, kernel=3)
        self.entry = Conv(v["projection"], v["head_width"], 3)

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        return super().forward(leaky_relu(self.entry(x)), t)


class VisionAided(nn.Module):
    """Projected features of a frozen image tower, [N, C, h, w] a layer, and captions -> logits [N, h * w] a layer."""

    def __init__(self, config: dict):
        super().__init__()
        v = config["vision_aided"]
        self.conditioner = Conditioner(config, v["text"])
        width = self.conditioner.width
        self.mix = Linear(width, width) if width else None
        self.heads = nn.ModuleList(VisionHead(v, width) for _ in v["layers"])

    def condition(
        self, tokens: Tensor | None = None, labels: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor | None:
        """[N, D]"""
        t = self.conditioner(tokens, labels, features)[0]
        return t if t is None or self.mix is None else leaky_relu(self.mix(normalize(t)))

    def forward(self, features: list[Tensor], t: Tensor | None) -> list[Tensor]:
        return [head(x, t) for head, x in zip(self.heads, features, strict=True)]

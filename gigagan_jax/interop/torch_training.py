"""The training step of a GigaGAN in PyTorch, for models of torch_gigagan.py: losses, R1, AdamW, the moving average.

Copy it beside torch_gigagan.py. It needs torch, and safetensors to read and write folders.

    run = Training.load("digits_torch", device="cuda")
    metrics = run.step(images, tokens)     # images uint8 [N, 3, R, R]
    run.save("digits_torch_later")

Equations are those of the paper (arXiv:2303.05511). Contrastive CLIP loss, vision-aided loss, finite differences and what
trains an upsampler are not here.
"""

import copy
import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import torch_gigagan as networks
except ImportError:
    from gigagan_jax.interop import torch_gigagan as networks

Logits = dict[tuple[int, int], Tensor]

# ---------------------------------------------------------------- weights and losses


def entry_count(config: dict) -> int:
    """Pyramid levels that the discriminator sees, from the output image down."""
    d = config["discriminator"]
    return (d["input_levels"] or len(d["blocks"])) if d["multi_scale_input"] else 1


def level_weights(config: dict) -> list[float]:
    """Weight of each pyramid level in the loss, high to low."""
    count = entry_count(config)
    own = config["loss"]["level_weights"]
    return list(own) if own else [(2.0 if i == 0 else 1.0) / (count + 1) for i in range(count)]


def over_pairs(config: dict, intermediate: float, each: Logits) -> Tensor:
    """eq. 6: the sum over (level, exit) of means over the batch; exits before the last weigh less."""
    last, levels = len(config["discriminator"]["blocks"]) - 1, level_weights(config)
    weigh = lambda level, exit_: levels[level] * (1.0 if exit_ == last else intermediate)
    return sum((weigh(*pair) * x.mean() for pair, x in each.items()), torch.zeros(()))


def match_g(form: str, wrong: Tensor) -> Tensor:
    """G's matching-aware loss, of logits for generated images with a wrong caption."""
    if form == "min_max":
        return -F.softplus(wrong)
    return F.softplus(-wrong if form == "non_saturating" else wrong)


def contrast(own: Tensor, others: Tensor, valid: Tensor) -> Tensor:
    """-log softmax of the own caption among the others: own [N, P], others [N, M, P], valid bool [N, M] -> [N, P]"""
    differences = (others - own[:, None]).masked_fill(~valid[:, :, None], -1e30)
    return F.softplus(differences.logsumexp(1))


# ---------------------------------------------------------------- what is drawn in a step


@dataclasses.dataclass
class Draws:
    """The random numbers of a step.

    z_d, z_g: [N, z_dim] of D's half and of G's
    wrong_d, wrong_g: [N] whose caption each image gets as a wrong one
    signs: {"real" or "fake": [N, predictions]} of R1 and R2, +1 or -1
    """

    z_d: Tensor
    z_g: Tensor
    wrong_d: Tensor
    wrong_g: Tensor
    signs: dict[str, Tensor]


def same_captions(tokens: Tensor | None, labels: Tensor | None, count: int) -> Tensor:
    """bool [N, N], examples with equal captions, or with equal labels."""
    same = torch.eye(count, dtype=torch.bool)
    if tokens is not None:
        same = same.to(tokens.device) | (tokens[:, None] == tokens[None]).all(-1)
    if labels is not None:
        same = same.to(labels.device) | ((labels[:, None] == labels[None]) & (labels >= 0)[:, None])
    return same


def draw(config: dict, same: Tensor) -> Draws:
    """Random numbers of a step for a batch with these captions."""
    n, device, z_dim = len(same), same.device, config["generator"]["z_dim"]
    exits = len(config["discriminator"]["blocks"]) ** 2
    wrong = lambda: torch.where(same, -1.0, torch.rand(n, n, device=device)).argmax(1)
    signs = lambda: torch.randint(0, 2, (n, exits), device=device) * 2.0 - 1.0
    z = lambda: torch.randn(n, z_dim, device=device)
    return Draws(z(), z(), wrong(), wrong(), {"real": signs(), "fake": signs()})


# ---------------------------------------------------------------- the step


class Training:
    """A run: generator, its moving average, discriminator, their optimizers.

    Args:
      config: content of config.json.
      device: of all of it.

    Raises:
      NotImplementedError: the config has a loss that is not here.
    """

    def __init__(self, config: dict, device: str = "cpu"):
        loss = config["loss"]
        for name, absent in (
            ("upsampler.input_resolution", config["upsampler"]["input_resolution"]),
            ("loss.clip", max(loss["clip"])),
            ("loss.vision_aided", loss["vision_aided"]),
            ("loss.r1_form", loss["r1_form"] != "gradient"),
            ("data.caption_dropout", config["data"]["caption_dropout"]),
        ):
            if absent:
                raise NotImplementedError(f"this value of {name} is not implemented in torch_training.py")
        self.config, self.device = config, torch.device(device)
        self.generator, self.discriminator = (
            networks.Generator(config).to(device),
            networks.Discriminator(config).to(device),
        )
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        interval = loss["r1_interval"]
        # Lazy regularisation (StyleGAN2, appendix B): D's rates are those of interval / (interval + 1) of a step.
        self._lazy = {"generator": 1.0, "discriminator": interval / (interval + 1)}
        self.optimizers = {
            "generator": self._make_optimizer(self.generator, config["g_optimizer"], 1.0),
            "discriminator": self._make_optimizer(
                self.discriminator, config["d_optimizer"], self._lazy["discriminator"]
            ),
        }
        self.steps = self.images = 0
        # Of the folder that it came from: the position in the data and the identities of frozen networks.
        self.facts: dict = {"data": {}, "frozen": {}}

    @staticmethod
    def _make_optimizer(network: nn.Module, o: dict, lazy: float) -> torch.optim.AdamW:
        attention = set()
        for module in network.modules():
            if isinstance(
                module,
                networks.SelfAttention
                | networks.CrossAttention
                | networks.AttentionLayer
                | networks.DiscriminatorAttention,
            ):
                attention |= {id(p) for p in module.parameters()}
        groups: dict[float, list[Tensor]] = {}
        for parameter in network.parameters():
            decay = o["attention_weight_decay"] if id(parameter) in attention else o["weight_decay"]
            # Biases and gains have none.
            groups.setdefault(decay if parameter.ndim > 1 else 0.0, []).append(parameter)
        betas = (o["beta1"] ** lazy if o["beta1"] else 0.0, o["beta2"] ** lazy)
        parts = [{"params": params, "weight_decay": decay} for decay, params in groups.items()]
        return torch.optim.AdamW(parts, lr=0.0, betas=betas, eps=o["epsilon"])

    def learning_rate(self, name: str) -> float:
        """Of "generator" or "discriminator", after `images` images: warm-up, constant, cosine to the end."""
        o, kimg = self.config[f"{name[0]}_optimizer"], self.images / 1000
        rate = o["learning_rate"] * self._lazy[name]
        if o["warmup_kimg"]:
            rate *= min(1.0, kimg / o["warmup_kimg"])
        if o["decay_kimg"]:
            progress = (kimg - (self.config["total_kimg"] - o["decay_kimg"])) / o["decay_kimg"]
            progress = min(1.0, max(0.0, progress))
            rate *= o["final_ratio"] + (1 - o["final_ratio"]) * 0.5 * (1 + math.cos(math.pi * progress))
        return rate

    def _gamma(self) -> float:
        first, last = self.config["loss"]["r1_gamma"]
        end = self.config["loss"]["ramp_kimg"] or self.config["total_kimg"]
        return first + (last - first) * min(1.0, self.images / 1000 / end)

    def step(
        self,
        images: Tensor,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        draws: Draws | None = None,
    ) -> dict[str, float]:
        """One step of D and one of G.

        Args:
          images: uint8 [N, 3, R, R].
          tokens, labels, features: what the images are conditioned on, as the networks take it.
          draws: the random numbers; None draws them.

        Returns:
          losses by name
        """
        c = self.config
        reals = networks.image_pyramid(images.to(self.device).float() / 127.5 - 1.0, len(level_weights(c)))
        given = (tokens, labels, features)
        # A folder of an earlier version has no such field, and was trained so.
        masked = c["loss"].get("mask_same_labels", True)
        same = same_captions(tokens, labels if masked else None, len(images))
        draws = draw(c, same) if draws is None else draws
        metrics = self._d_step(reals, given, same, draws)
        metrics |= self._g_step(reals, given, same, draws)
        self.steps += 1
        self.images += len(images)
        return {name: float(value.detach()) for name, value in metrics.items()}

    def _levels(self, images: list[Tensor]) -> list[Tensor]:
        return images[::-1][: entry_count(self.config)]

    def _judge(self, images: list[Tensor], t: Tensor | None) -> Logits:
        return self.discriminator(images, t)

    def _wrong(self, t: Tensor, same: Tensor, chosen: Tensor) -> tuple[list[Tensor], Tensor]:
        """(wrong captions, [N, D] each; bool [N, M] which of them are wrong)"""
        if self.config["loss"]["match_d_form"] == "logistic":
            return [t[chosen]], (~same.gather(1, chosen[:, None])).to(t.device)
        size = min(len(t), self.config["loss"]["mismatch_group"] or len(t))
        place = torch.arange(len(t), device=t.device)
        rows = [place // size * size + (place + k) % size for k in range(1, size)]
        return [t[row] for row in rows], torch.stack([~same.to(t.device)[place, row] for row in rows], dim=1)

    def _matches(self) -> bool:
        loss = self.config["loss"]
        return self.config["condition"] == "text" and loss["match_d"] > 0

    def _match_loss(self, images: list[Tensor], own: Logits, t: list[Tensor], valid: Tensor) -> Logits:
        """Contrastive matching, for each prediction."""
        others = [self._judge(images, wrong) for wrong in t]
        stack = lambda pair: torch.stack([logits[pair] for logits in others], dim=1)
        return {pair: contrast(x, stack(pair), valid) for pair, x in own.items()}

    def _d_step(self, reals: list[Tensor], given: tuple, same: Tensor, draws: Draws) -> dict[str, Tensor]:
        loss = self.config["loss"]
        with torch.no_grad():
            fakes = self._levels(self.generator(draws.z_d, *given))
        t = self.discriminator.condition(*given)
        real, fake = self._judge(reals, t), self._judge(fakes, t)
        if loss["pairing"] == "relativistic":
            gan = {pair: F.softplus(fake[pair] - x) for pair, x in real.items()}
        else:
            gan = {pair: F.softplus(fake[pair]) + F.softplus(-x) for pair, x in real.items()}
        metrics = {"loss/d_gan": over_pairs(self.config, loss["intermediate_gan"], gan)}
        total = metrics["loss/d_gan"]
        if self._matches():
            wrong, valid = self._wrong(t, same, draws.wrong_d)
            if loss["match_d_form"] == "contrastive":
                match = self._match_loss(reals, real, wrong, valid)
            else:
                # eq. 8: with a wrong caption a real image is a fake too.
                real_wrong, fake_wrong = self._judge(reals, wrong[0]), self._judge(fakes, wrong[0])
                own = real if loss["match_relativistic"] else dict.fromkeys(real, 0.0)
                match = {p: (F.softplus(x - own[p]) + F.softplus(fake_wrong[p])) * valid for p, x in real_wrong.items()}
            metrics["loss/d_match"] = over_pairs(self.config, loss["intermediate_match"], match)
            total = total + loss["match_d"] * metrics["loss/d_match"]
        if loss["centring"]:
            centre = {pair: (x + fake[pair]).square() for pair, x in real.items()}
            total = total + loss["centring"] * over_pairs(self.config, loss["intermediate_gan"], centre)
        if self.steps % loss["r1_interval"] == 0:
            sources = {"real": reals} | ({"fake": fakes} if loss["r2"] else {})
            paid = {name: self.penalty(levels, given, draws.signs[name]) for name, levels in sources.items()}
            metrics["loss/r1"] = paid["real"]
            total = total + 0.5 * self._gamma() * loss["r1_interval"] * sum(paid.values())
        self._update("discriminator", total)
        return metrics | {"loss/d": total}

    def penalty(self, levels: list[Tensor], given: tuple, signs: Tensor) -> Tensor:
        """R1 (of real images) or R2 (of generated ones): the squared gradient of D by its images.

        Each exit counts by its weight in the loss and with a random sign for each image: of the sum's square only the squares of
        the exits are left in the mean, so that no exit can hide the gradient of another.
        """
        loss, weights = self.config["loss"], level_weights(self.config)
        in_loss = loss["r1_exits"] == "signs"
        weights = weights if in_loss else [1.0] * len(weights)
        weights = weights[:1] if loss["r1_levels"] == "full" else weights
        inputs = [x.detach().requires_grad_() for x in levels]
        logits = self._judge(inputs, self.discriminator.condition(*given))
        last = len(self.config["discriminator"]["blocks"]) - 1
        total = torch.zeros((), device=self.device)
        for k, ((level, exit_), x) in enumerate(logits.items()):
            if level < len(weights):
                weight = 1.0 if exit_ == last else loss["intermediate_gan"]
                total = total + ((weight * signs[:, k] if in_loss else 1.0) * x.mean(-1)).sum()
        gradients = torch.autograd.grad(total, inputs[: len(weights)], create_graph=True)
        squares = [weight * g.square().sum((1, 2, 3)).mean() for weight, g in zip(weights, gradients, strict=True)]
        return sum(squares, torch.zeros((), device=self.device))

    def _g_step(self, reals: list[Tensor], given: tuple, same: Tensor, draws: Draws) -> dict[str, Tensor]:
        loss = self.config["loss"]
        self.discriminator.requires_grad_(False)
        t_global, local, mask = self.generator.conditioner(*given)
        w = self.generator.map(draws.z_g, t_global)
        images = self._levels(self.generator.synthesize(w, local, mask))
        t = self.discriminator.condition(*given)
        fake = self._judge(images, t)
        if loss["pairing"] == "relativistic":
            real = self._judge(reals, t)
            gan = {pair: F.softplus(real[pair] - x) for pair, x in fake.items()}
        else:
            gan = {pair: F.softplus(-x) for pair, x in fake.items()}
        metrics = {"loss/g_gan": over_pairs(self.config, loss["intermediate_gan"], gan)}
        total = metrics["loss/g_gan"]
        form = loss["match_g_form"]
        if self.config["condition"] == "text" and loss["match_g"] and form != "off":
            wrong, valid = self._wrong(t, same, draws.wrong_g)
            if form == "contrastive":
                match = self._match_loss(images, fake, wrong, valid)
            else:
                each = [self._judge(images, other) for other in wrong]
                stack = lambda pair: torch.stack([match_g(form, x[pair]) for x in each], dim=1)
                match = {pair: stack(pair) * valid[:, :, None] for pair in fake}
            metrics["loss/g_match"] = over_pairs(self.config, loss["intermediate_match"], match)
            total = total + loss["match_g"] * metrics["loss/g_match"]
        self._update("generator", total)
        self.discriminator.requires_grad_(True)
        self._update_averages(w.detach().mean(0))
        return metrics | {"loss/g": total}

    def _update(self, name: str, total: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(name)
        optimizer.step()

    @torch.no_grad()
    def _update_averages(self, w: Tensor) -> None:
        """The moving averages of G and of w; the half-life is in images."""
        ema = self.config["ema"]
        half = ema["half_life_kimg"] * 1000
        if ema["rampup"]:
            half = min(half, self.images * ema["rampup"])
        keep = 0.5 ** (self.config["batch_size"] / max(half, 1e-6))
        for mean, now in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            mean.lerp_(now, 1 - keep)
        keep_w = self.config["generator"]["w_avg_decay"] or keep
        moved = w if self.steps == 0 else w + (self.generator.w_avg - w) * keep_w
        self.generator.w_avg.copy_(moved)
        self.average.w_avg.copy_(moved)

    # -- folders

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "Training":
        """A folder of tools/convert_checkpoint.py. Without its `training` part G is the average and D starts anew."""
        folder = Path(folder)
        run = cls(json.loads((folder / "config.json").read_text()), device)
        average = read_tensors(folder, "model.safetensors")
        run.average.load_state_dict(average)
        run.generator.load_state_dict(average)
        training = folder / "training"
        if not training.is_dir():
            return run
        counts = json.loads((training / "training.json").read_text())
        run.steps, run.images = counts["step"], counts["images"]
        run.facts = {name: counts.get(name, {}) for name in run.facts}
        for name, optimizer in run.optimizers.items():
            network = getattr(run, name)
            if (state := read_tensors(training, f"{name}.safetensors")) is not None:
                network.load_state_dict(state)
            if (moments := read_tensors(training, f"{name}_optimizer.safetensors")) is not None:
                steps = torch.tensor(float(counts["optimizer_steps"][name]))
                for key, parameter in network.named_parameters():
                    square = moments[f"exp_avg_sq.{key}"].to(device)
                    mean = moments.get(f"exp_avg.{key}", torch.zeros_like(square)).to(device)
                    optimizer.state[parameter] = {"step": steps.clone(), "exp_avg": mean, "exp_avg_sq": square}
        return run

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load` and tools/convert_checkpoint.py --from=pytorch read."""
        import safetensors.torch

        folder = Path(folder)
        (folder / "training").mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        write = lambda state, name: safetensors.torch.save_file(
            {key: x.detach().cpu().contiguous() for key, x in state.items()}, str(folder / name), {"format": "pt"}
        )
        write(self.average.state_dict(), "model.safetensors")
        steps = {}
        for name, optimizer in self.optimizers.items():
            network = getattr(self, name)
            write(network.state_dict(), f"training/{name}.safetensors")
            moments: dict[str, Tensor] = {}
            for key, parameter in network.named_parameters():
                state = optimizer.state.get(parameter)
                empty = torch.zeros_like(parameter)
                moments[f"exp_avg_sq.{key}"] = empty if state is None else state["exp_avg_sq"]
                if self.config[f"{name[0]}_optimizer"]["beta1"]:
                    moments[f"exp_avg.{key}"] = empty.clone() if state is None else state["exp_avg"]
                steps[name] = 0 if state is None else int(state["step"])
            write(moments, f"training/{name}_optimizer.safetensors")
        counts = {"step": self.steps, "images": self.images, "optimizer_steps": steps} | self.facts
        (folder / "training" / "training.json").write_text(json.dumps(counts))


def read_tensors(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors of a file, or of its shards; None where there is neither."""
    import safetensors.torch

    if (folder / name).exists():
        return safetensors.torch.load_file(str(folder / name))
    index = folder / ("model.safetensors.index.json" if name == "model.safetensors" else f"{name}.index.json")
    if not index.exists():
        return None
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {key: x for shard in shards for key, x in safetensors.torch.load_file(str(folder / shard)).items()}

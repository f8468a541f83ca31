"""Trains here and in torch_training.py from one state, on the same batches and random numbers, and compares losses and pictures.

    python tools/measure_torch_training.py --config=configs/digits.py --steps=300

Both start from the newest checkpoint of `--workdir`, else from the seed. Losses are means over the last sixth of the steps.
The config's judge, where it has one, judges the moving averages of both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax import cli
from gigagan_jax.checkpoint.manager import Checkpoints, with_shardings
from gigagan_jax.checkpoint.run_folder import workdir_argument
from gigagan_jax.cli.config_file import load_config
from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.evaluation.judges import make_judge
from gigagan_jax.inference.images import to_uint8
from gigagan_jax.inference.latents import z_of_seed
from gigagan_jax.interop import model_folder
from gigagan_jax.interop.checkpoint_arrays import open_original, state_networks
from gigagan_jax.interop.torch_table import to_torch
from gigagan_jax.models.discriminator import prediction_pairs
from gigagan_jax.parallel import sharding
from gigagan_jax.training.input_pipeline import make_pipeline, make_tokenizers
from gigagan_jax.training.mismatched_captions import draw_mismatch, group_size
from gigagan_jax.training.penalties import draw_signs
from gigagan_jax.training.state import GanState, Networks
from gigagan_jax.training.step import TrainStep

LOSSES = ("loss/d", "loss/g", "loss/d_gan", "loss/g_gan", "loss/d_match")
_LAST = 1 / 6


def draws_of(config: Config, key: jax.Array, step: int, tokens: np.ndarray, labels: np.ndarray | None = None) -> Any:
    """The random numbers of a step, as training/step.py draws them, for `Training.step`."""
    import torch

    from gigagan_jax.interop.torch_training import Draws

    n, z_dim = config.batch_size, config.generator.z_dim
    key_d, key_g = jax.random.split(jax.random.fold_in(key, step))
    key_d, key_g = jax.random.fold_in(key_d, 0), jax.random.fold_in(key_g, 0)
    (z_d, wrong_d), (z_g, wrong_g) = jax.random.split(key_d), jax.random.split(key_g)
    labels = np.full(n, -1) if labels is None else labels
    wrong = lambda key: draw_mismatch(key, jnp.asarray(tokens), jnp.asarray(labels))[0]
    signs, _ = jax.random.split(jax.random.fold_in(key_d, 3))
    pairs = len(prediction_pairs(config.discriminator))
    to = lambda x: torch.from_numpy(np.array(x))
    normal = lambda key: to(jax.random.normal(key, (n, z_dim)))
    return Draws(
        normal(z_d),
        normal(z_g),
        to(wrong(wrong_d)).long(),
        to(wrong(wrong_g)).long(),
        {name: to(draw_signs(jax.random.fold_in(signs, i), n, pairs)) for i, name in enumerate(("real", "fake"))},
    )


def start_both(config: Config, workdir: Path | None) -> tuple[Networks, GanState, Any]:
    """(networks, state here, `Training` in torch with the same)"""
    import torch

    from gigagan_jax.interop.torch_training import Training

    networks, mesh = Networks(config), sharding.make_mesh(config.mesh, jax.devices()[:1])
    if workdir is not None:
        checkpoints = Checkpoints(workdir)
        where = with_shardings(networks.abstract(), networks.shardings(mesh))
        state, _ = checkpoints.restore(checkpoints.require_valid_step(), where)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "torch"
            model_folder.write_folder(out, open_original(workdir), model_folder.CHOICES, "pytorch")
            return networks, state, Training.load(out)
    state = networks.init(mesh)
    theirs = Training(json.loads(json.dumps(model_folder.torch_config(config))))
    parts = {"generator": state.g.params, "average": state.g_ema, "discriminator": state.d.params}
    by_name = {network.name: network for network in state_networks(config).values()}
    for name, params in parts.items():
        tensors = to_torch(by_name[name if name != "average" else "generator"], config, params)
        getattr(theirs, name).load_state_dict({k: torch.from_numpy(x.copy()) for k, x in tensors}, strict=False)
    return networks, state, theirs


def train_both(config: Config, networks: Networks, state: GanState, theirs: Any, steps: int) -> tuple[GanState, Any]:
    """The state after so many steps, and the losses of both sides: {name: [steps, 2]}."""
    import torch

    mesh, step = sharding.make_mesh(config.mesh, jax.devices()[:1]), TrainStep(networks)
    key, batches = jax.random.key(config.seed), make_pipeline(config, None)

    def run(state: GanState, batch: dict[str, Any], with_r1: bool) -> Any:
        with sharding.use_mesh(mesh, config.rules):
            return step(state, batch, key, with_r1=with_r1)

    compiled = jax.jit(run, static_argnums=2, donate_argnums=0)
    matches = config.condition == "text" and config.loss.match_d > 0
    losses: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES if matches or name != "loss/d_match"}
    progress = ProgressBar("training in both", steps)
    first = int(state.step)
    for number in range(first, first + steps):
        batch = {k: np.asarray(x) for k, x in next(batches).items() if k in ("image", "tokens", "label")}
        pictures = torch.from_numpy(np.moveaxis(batch["image"], -1, 1).copy())
        tokens = torch.from_numpy(batch["tokens"]).long()
        # With loss.mask_same_labels they tell which captions are no wrong ones.
        labels = batch["label"] if config.loss.mask_same_labels else None
        draws = draws_of(config, key, number, batch["tokens"], labels)
        found = theirs.step(pictures, tokens, torch.from_numpy(batch["label"]).long(), draws=draws)
        state, metrics = compiled(state, batch, number % config.loss.r1_interval == 0)
        for name in losses:
            losses[name].append((float(metrics[name]), found[name]))
        progress.step()
    return state, {name: np.array(values) for name, values in losses.items()}


def judge_both(config: Config, networks: Networks, state: GanState, theirs: Any) -> list[tuple[str, ...]]:
    """Rows of the judge's figures."""
    import torch

    judge, tokenizer = make_judge(config.evaluators[0], config), make_tokenizers(config)[0]
    ours = jax.jit(lambda p, z, tokens: networks.g.bind(p)(z, tokens)[0][-1])

    def here(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        z = z_of_seed(jnp.asarray(seeds, jnp.uint32), config.generator.z_dim)
        return to_uint8(np.asarray(ours(state.g_ema, z, tokenizer(list(prompts)))))

    def there(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        z = torch.from_numpy(np.array(z_of_seed(jnp.asarray(seeds, jnp.uint32), config.generator.z_dim)))
        with torch.no_grad():
            images = theirs.average(z, torch.from_numpy(tokenizer(list(prompts))).long())[-1]
        return to_uint8(np.moveaxis(images.numpy(), 1, -1))

    a, b = judge.evaluate(here), judge.evaluate(there)
    return [
        (f"{config.evaluators[0]}/{name}", f"{a[name]:.4f}", f"{b[name]:.4f}", f"{b[name] - a[name]:+.4f}")
        for name in a
    ]


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="as for train; --config.KEY=VALUE changes it")
    parser.add_argument("--steps", type=int, default=300, help="of training (300)")
    parser.add_argument("--workdir", type=workdir_argument, help="of a run to start from")
    parser.add_argument("--json", type=Path, help="file for the losses of every step")
    args, overrides = parser.parse_known_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps={args.steps} must be positive")
    cli.check_writable(args.json)
    config = load_config(args.config, overrides)
    if group_size(config.batch_size, config.loss.mismatch_group) != config.batch_size:
        raise UserError(
            "--config.loss.mismatch_group must be the batch: the random numbers of smaller groups are not drawn here"
        )
    from gigagan_jax.interop.torch_training import Training

    try:
        Training(json.loads(json.dumps(model_folder.torch_config(config))))
    except NotImplementedError as error:
        raise UserError(str(error)) from error
    networks, state, theirs = start_both(config, args.workdir)
    state, losses = train_both(config, networks, state, theirs, args.steps)
    last = max(1, round(args.steps * _LAST))
    rows: list[tuple[str, ...]] = []
    for name, values in losses.items():
        a, b = values[-last:].mean(0)
        rows.append((f"{name}, last {last} steps", f"{a:.4f}", f"{b:.4f}", f"{(b - a) / abs(a):+.2%}"))
    if config.evaluators:
        rows += judge_both(config, networks, state, theirs)
    print(format_table(rows, ("", "here", "torch", "difference")))
    if args.json:
        args.json.write_text(json.dumps({name: values.tolist() for name, values in losses.items()}) + "\n")
    return 0


if __name__ == "__main__":
    cli.main(verb)

"""What a run would be: modules, shapes, parameters, shardings and memory, worked out without allocating anything."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.config import Config, digest
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import table
from gigagan_jax.models.network import Module, is_spec, path_name
from gigagan_jax.parallel import sharding
from gigagan_jax.training.batch import abstract_batch, batch_shardings
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

_MODULE_DEPTH = 2  # rows of the short table are "entry/0", "rest/1", ...


def _million(n: float) -> str:
    return f"{n / 1e6:,.2f}"


def summary(networks: Networks, mesh: Any) -> str:
    """A row for each group of modules: parameters in all and on one device."""
    rows = []
    for module, _ in networks.trained().values():
        whole: dict[str, int] = defaultdict(int)
        local: dict[str, int] = defaultdict(int)
        for path, spec, where in _parameters(module, mesh, networks.config):
            key = "/".join(path.split("/")[:_MODULE_DEPTH])
            whole[key] += math.prod(spec.shape)
            local[key] += math.prod(where.shard_shape(spec.shape))
        rows += [(f"{module.name}/{k}", _million(whole[k]), _million(local[k])) for k in whole]
        rows.append((f"{module.name}", _million(sum(whole.values())), _million(sum(local.values()))))
    for tower in networks.frozen.towers.values():
        name = f"frozen {tower.role} ({tower.path})"
        where = tower.module.shardings(mesh, networks.config.rules)
        here = sum(
            math.prod(w.shard_shape(a.shape))
            for a, w in zip(jax.tree.leaves(tower.module.abstract()), jax.tree.leaves(where), strict=True)
        )
        rows.append((name, _million(tower.module.count()), _million(here)))
    shape = ", ".join(f"{k}={v}" for k, v in mesh.shape.items())
    return table(rows, ("module", "M parameters", "M a device")) + f"\nmesh: {shape}"


def _parameters(module: Module, mesh: Any, config: Config) -> list[tuple[str, Any, Any]]:
    specs = jax.tree_util.tree_leaves_with_path(module.specs, is_leaf=is_spec)
    places = jax.tree.leaves(module.shardings(mesh, config.rules))
    return [(path_name(p), s, w) for (p, s), w in zip(specs, places, strict=True)]


def _bytes_per_device(abstract: Any, shardings: Any) -> int:
    pairs = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in pairs)


def state_memory(networks: Networks, mesh: Any) -> dict[str, int]:
    """Bytes of one device for what stays from step to step, by kind: exact, from the shardings."""
    state, where = networks.abstract(), networks.shardings(mesh)
    part = lambda get: _bytes_per_device(get(state), get(where))
    return {
        "parameters": part(lambda s: [n.params for n in (s.g, s.d, s.v) if n is not None]),
        "optimizer": part(lambda s: [n.opt for n in (s.g, s.d, s.v) if n is not None]),
        "ema": part(lambda s: (s.g_ema, s.w_avg)),
        "frozen": _bytes_per_device(networks.frozen.abstract(), networks.frozen.shardings(mesh)),
    }


def batch_memory(config: Config, mesh: Any) -> int:
    """Bytes of one device for its part of the batch, as it comes from the data."""
    return _bytes_per_device(abstract_batch(config), batch_shardings(config, mesh))


def memory(networks: Networks, mesh: Any) -> dict[str, int]:
    """Bytes that one device needs, by kind. All but the activations are exact.

    The activations are what the backward pass of the larger half (G's or D's loss) keeps, from its trace: an estimate,
    since the compiler adds temporaries and may save some. Nothing is allocated.
    """
    config = networks.config
    state, where = networks.abstract(), networks.shardings(mesh)
    part = lambda get: _bytes_per_device(get(state), get(where))
    out = state_memory(networks, mesh) | {
        "gradients": max(part(lambda s: s.g.params), part(lambda s: (s.d.params, s.v.params if s.v else ()))),
        "activations": math.ceil(_kept(networks) / sharding.batch_shards(mesh, config.rules)),
    }
    return out | {"total": sum(out.values())}


def _uncut_moments(networks: Networks, mesh: Any) -> list[str]:
    """Parameters whose moments would be cut over `rules.optimizer` if that divided one of their dimensions."""
    config, names = networks.config, []
    size = math.prod(mesh.shape[a] for a in config.rules[sharding.OPTIMIZER].split(",") if a)
    if size == 1 or not config.mesh.shard_optimizer:
        return []
    for module, _ in networks.trained().values():
        cut = jax.tree.leaves(module.shardings(mesh, config.rules, sharding.optimizer_spec))
        for (path, spec, own), moments in zip(_parameters(module, mesh, config), cut, strict=True):
            if own == moments and math.prod(spec.shape) >= sharding.LEAST_CUT:
                names.append(f"{module.name}/{path} {spec.shape}")
    return names


def _kept(networks: Networks) -> int:
    """Bytes that the backward pass of one micro-batch keeps over all devices, weights aside."""
    step = TrainStep(networks)
    config = networks.config
    micro = config.batch_size // config.micro_batches
    batch = {k: jax.ShapeDtypeStruct((micro, *x.shape[1:]), x.dtype) for k, x in abstract_batch(config).items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen = networks.frozen.abstract()
    batch = jax.eval_shape(step.encode, batch, frozen)
    pg, critics = networks.g.abstract(), step.critics(networks.abstract())
    g_loss = lambda p, c, b, k, f: step.g_loss(p, c, b, k, f, b.get("clip_text"))
    most = 0
    both = ((g_loss, pg, (critics, batch, key, frozen)), (step.d_loss, critics, (pg, batch, key, frozen)))
    for loss, own, args in both:
        pullback = jax.eval_shape(lambda p, *a, loss=loss: jax.vjp(lambda q: loss(q, *a)[0], p)[1], own, *args)
        sized = [x for x in jax.tree.leaves(pullback) if hasattr(x, "shape") and x.shape]
        # What has the micro-batch in front (or a multiple of it: levels and sources joined to it) is an activation.
        kept = [x for x in sized if any(n >= micro and n % micro == 0 for n in x.shape[:2])]
        most = max(most, sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in kept if _plain(x)))
    return most


def _plain(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def report(config: Config, devices: int, workdir: Path | None) -> str:
    """The whole dry run as text; also `dry_run.json` in the workdir, if there is one.

    Raises:
      UserError: the mesh does not fit the devices, a parameter does not fit the mesh, the batch does not divide.
    """
    mesh = sharding.abstract_mesh(config.mesh, devices)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh, config.rules)
    networks = Networks(config)
    rows, modules = [], []
    for module, _ in networks.trained().values():
        for path, spec, where in _parameters(module, mesh, config):
            name, shape = f"{module.name}/{path}", "x".join(map(str, spec.shape))
            rows.append((name, shape, f"{math.prod(spec.shape):,}", str(tuple(where.spec)).replace("'", "")))
            modules.append({"name": name, "shape": list(spec.shape), "axes": list(spec.axes), "spec": str(where.spec)})
    need = memory(networks, mesh)
    uncut = _uncut_moments(networks, mesh)
    data = {
        "name": config.name,
        "config": digest(config),
        "devices": devices,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "parameters": {"generator": networks.g.count(), "discriminator": networks.d.count()},
        "bytes_per_device": need,
        "uncut_moments": uncut,
        "modules": modules,
    }
    if workdir is not None:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "dry_run.json").write_text(json.dumps(data, indent=1))
        except OSError as e:
            raise UserError(f"--workdir={workdir} cannot be written: {e.strerror or e}") from None
    gib = [(k, f"{v / 2**30:,.3f}") for k, v in need.items()]
    notes = []
    if uncut:
        names = ", ".join(uncut[:5]) + (f" and {len(uncut) - 5} more" if len(uncut) > 5 else "")
        notes = [
            f"moments and average not cut over {config.rules[sharding.OPTIMIZER]}, which divides no dimension of: {names}"
        ]
    return "\n\n".join(
        [
            table(rows, ("parameter", "shape", "count", "sharding")),
            summary(networks, mesh),
            table(gib, (f"memory of one of {devices} devices", "GiB")) + "\nactivations: estimated from the trace",
            *notes,
            f"{config.name}: generator {_million(networks.g.count())} M, discriminator {_million(networks.d.count())} M "
            f"parameters; batch {config.batch_size} = {config.batch_size // sharding.batch_shards(mesh, config.rules)} a device",
        ]
    )

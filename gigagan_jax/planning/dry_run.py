"""The dry run: modules, shapes, parameters, shardings and memory of a run, computed without allocating arrays."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.config import Config, config_digest
from gigagan_jax.core import hardware
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.core.workdir_files import DRY_RUN_FILE
from gigagan_jax.models.network import Network
from gigagan_jax.parallel import sharding
from gigagan_jax.training.batch import abstract_batch, batch_shardings
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import critic_params
from gigagan_jax.training.upsampler_objective import make_objective

_MODULE_DEPTH = 3  # rows of the short table are "levels/0/entry", "mapping/first", ...


def _format_millions(n: float) -> str:
    return f"{n / 1e6:,.2f}"


def summarize_modules(networks: Networks, mesh: Any) -> str:
    """A table with a row for each group of modules: parameters in total and on one device."""
    rows = []
    for module, _ in networks.trained().values():
        total: dict[str, int] = defaultdict(int)
        local: dict[str, int] = defaultdict(int)
        for path, spec, where in _list_parameters(module, mesh, networks.config):
            key = "/".join(path.split("/")[:_MODULE_DEPTH])
            total[key] += math.prod(spec.shape)
            local[key] += math.prod(where.shard_shape(spec.shape))
        rows += [(f"{module.name}/{k}", _format_millions(total[k]), _format_millions(local[k])) for k in total]
        rows.append((f"{module.name}", _format_millions(sum(total.values())), _format_millions(sum(local.values()))))
    for tower in networks.frozen.towers.values():
        name = f"frozen {tower.role} ({tower.path})"
        where = tower.module.shardings(mesh, networks.config.rules)
        # Frozen towers have no gradients and no optimizer state, so they get one row each.
        per_device = sum(
            math.prod(w.shard_shape(a.shape))
            for a, w in zip(jax.tree.leaves(tower.module.abstract()), jax.tree.leaves(where), strict=True)
        )
        rows.append((name, _format_millions(tower.module.count()), _format_millions(per_device)))
    shape = ", ".join(f"{k}={v}" for k, v in mesh.shape.items())
    return format_table(rows, ("module", "M parameters", "M a device")) + f"\nmesh: {shape}"


def _list_parameters(module: Network, mesh: Any, config: Config) -> list[tuple[str, Any, Any]]:
    places = jax.tree.leaves(module.shardings(mesh, config.rules))
    return [(path, s, w) for (path, s), w in zip(module.specs_by_path().items(), places, strict=True)]


def _bytes_per_device(abstract: Any, shardings: Any) -> int:
    pairs = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in pairs)


def state_memory(networks: Networks, mesh: Any) -> dict[str, int]:
    """Bytes of one device for the state that persists between steps, by kind: exact, from the shardings."""
    state, where = networks.abstract(), networks.shardings(mesh)
    part = lambda get: _bytes_per_device(get(state), get(where))
    # The critic of vision-aided training, `v`, exists only where a config uses it.
    return {
        "parameters": part(lambda s: [n.params for n in (s.g, s.d, s.v) if n is not None]),
        "optimizer": part(lambda s: [n.opt for n in (s.g, s.d, s.v) if n is not None]),
        "ema": part(lambda s: (s.g_ema, s.w_avg)),
        "frozen": _bytes_per_device(networks.frozen.abstract(), networks.frozen.shardings(mesh)),
    }


def batch_memory(config: Config, mesh: Any) -> int:
    """Bytes of one device for its shard of the batch, in the types of the input pipeline."""
    return _bytes_per_device(abstract_batch(config), batch_shardings(config, mesh))


def memory_per_device(networks: Networks, mesh: Any) -> dict[str, int]:
    """Bytes that one device needs, by kind. All but the activations are exact.

    The activations are the residuals of the larger backward pass, of G's or of D's loss, from its trace. They are an
    estimate: the compiler adds temporaries and may drop residuals.
    """
    config = networks.config
    state, where = networks.abstract(), networks.shardings(mesh)
    part = lambda get: _bytes_per_device(get(state), get(where))
    by_kind = state_memory(networks, mesh) | {
        # G and D are updated in turn, so only the larger set of gradients is alive at a time.
        "gradients": max(part(lambda s: s.g.params), part(lambda s: (s.d.params, s.v.params if s.v else ()))),
        "activations": math.ceil(_residual_bytes(networks) / sharding.batch_shards(mesh, config.rules)),
    }
    return by_kind | {"total": sum(by_kind.values())}


def _describe_card(needed: int) -> str:
    """Which graphics card holds so many bytes a device, in one line."""
    size = hardware.smallest_card(needed)
    if size is None:
        return f"no graphics card of {hardware.CARDS[-1]} GB holds it: shard it over more devices (docs/meshes.md)"
    share = size * 1e9 * hardware.JAX_SHARE / 2**30
    return f"fits a graphics card of {size} GB, of which JAX takes {share:.1f} GiB"


def _replicated_moments(networks: Networks, mesh: Any) -> list[str]:
    """Large parameters with unsharded moments, because `rules.optimizer` divides none of their dimensions."""
    config, names = networks.config, []
    size = math.prod(mesh.shape[a] for a in config.rules[sharding.OPTIMIZER].split(",") if a)
    if size == 1 or not config.mesh.shard_optimizer:
        return []
    for module, _ in networks.trained().values():
        cut = jax.tree.leaves(module.shardings(mesh, config.rules, sharding.optimizer_spec))
        for (path, spec, own), moments in zip(_list_parameters(module, mesh, config), cut, strict=True):
            # Small parameters stay unsharded on purpose; only large ones are worth a note.
            if own == moments and math.prod(spec.shape) >= sharding.MIN_ELEMENTS_TO_SHARD:
                names.append(f"{module.name}/{path} {spec.shape}")
    return names


def _residual_bytes(networks: Networks) -> int:
    """Bytes of the residuals of one micro-batch over all devices, without the weights."""
    objective = make_objective(networks)
    config = networks.config
    micro = config.batch_size // config.micro_batches
    batch = {k: jax.ShapeDtypeStruct((micro, *x.shape[1:]), x.dtype) for k, x in abstract_batch(config).items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen = networks.frozen.abstract()
    batch = jax.eval_shape(objective.encode_captions, batch, frozen)
    pg, critics = networks.g.abstract(), critic_params(networks.abstract())
    g_loss = lambda p, c, b, k, f: objective.g_loss(p, c, b, k, f, b.get("clip_text"))
    largest = 0
    both = ((g_loss, pg, (critics, batch, key, frozen)), (objective.d_loss, critics, (pg, batch, key, frozen)))
    for loss, own, args in both:
        # The residuals are the arrays that the pullback closes over; eval_shape computes their shapes only.
        pullback = jax.eval_shape(lambda p, *a, loss=loss: jax.vjp(lambda q: loss(q, *a)[0], p)[1], own, *args)
        sized = [x for x in jax.tree.leaves(pullback) if hasattr(x, "shape") and x.shape]
        # An array with the micro-batch, or a multiple of it, among its first two axes is an activation.
        # Multiples come from levels and sources that are joined to the batch. Other arrays are weights.
        kept = [x for x in sized if any(n >= micro and n % micro == 0 for n in x.shape[:2])]
        largest = max(largest, sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in kept if _is_plain_array(x)))
    return largest


def _is_plain_array(x: Any) -> bool:
    # Random keys have an extended dtype, which numpy gives no item size.
    return not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def report_dry_run(config: Config, devices: int, workdir: Path | None) -> str:
    """The dry run as text; also writes `dry_run.json` to the workdir, if there is one.

    Raises:
      UserError: the mesh does not fit the devices, a parameter does not fit the mesh, or the batch does not divide.
    """
    # An abstract mesh needs no devices, so any machine can plan for any number of them.
    mesh = sharding.abstract_mesh(config.mesh, devices)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh, config.rules)
    networks = Networks(config)
    rows, modules = [], []
    for module, _ in networks.trained().values():
        for path, spec, where in _list_parameters(module, mesh, config):
            name, shape = f"{module.name}/{path}", "x".join(map(str, spec.shape))
            rows.append((name, shape, f"{math.prod(spec.shape):,}", str(tuple(where.spec)).replace("'", "")))
            modules.append({"name": name, "shape": list(spec.shape), "axes": list(spec.axes), "spec": str(where.spec)})
    need = memory_per_device(networks, mesh)
    unsharded = _replicated_moments(networks, mesh)
    data = {
        "name": config.name,
        "config": config_digest(config),
        "devices": devices,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "parameters": {"generator": networks.g.count(), "discriminator": networks.d.count()},
        "bytes_per_device": need,
        "uncut_moments": unsharded,
        "modules": modules,
    }
    if workdir is not None:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / DRY_RUN_FILE).write_text(json.dumps(data, indent=1))
        except OSError as e:
            raise UserError(f"--workdir={workdir} cannot be written: {e.strerror or e}") from None
    gib = [(k, f"{v / 2**30:,.3f}") for k, v in need.items()]
    notes = []
    if unsharded:
        # Five names keep the note on one line; the JSON file has all.
        names = ", ".join(unsharded[:5]) + (f" and {len(unsharded) - 5} more" if len(unsharded) > 5 else "")
        notes = [
            f"moments and average not cut over {config.rules[sharding.OPTIMIZER]}, "
            f"which divides no dimension of: {names}"
        ]
    images_per_device = config.batch_size // sharding.batch_shards(mesh, config.rules)
    return "\n\n".join(
        [
            format_table(rows, ("parameter", "shape", "count", "sharding")),
            summarize_modules(networks, mesh),
            format_table(gib, (f"memory of one of {devices} devices", "GiB"))
            + f"\nactivations: estimated from the trace\n{_describe_card(need['total'])}",
            *notes,
            f"{config.name}: generator {_format_millions(networks.g.count())} M, "
            f"discriminator {_format_millions(networks.d.count())} M "
            f"parameters; batch {config.batch_size} = {images_per_device} a device",
        ]
    )

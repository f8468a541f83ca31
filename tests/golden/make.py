"""Where every parameter of every config lies, as text: `python -m tests.golden.make` writes specs/*.txt anew.

One section a mesh; in it one line for each way in which arrays are placed:

    LOGICAL AXES -> SPEC of the parameter | SPEC of its moments and average where it differs: arrays, elements

"whole" are the arrays that no axis cuts, with the largest of them, and "digest" is of name, shape and place of every single
one. A mesh that a config does not fit is one line, the error.
"""

import hashlib
import importlib
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from configs import ablation, scale
from gigagan_jax.config import Config, MeshConfig, from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import Spec, is_spec, path_name
from gigagan_jax.parallel import sharding
from gigagan_jax.training.state import Networks

FOLDER = Path(__file__).parent / "specs"
VARIANTS = (
    *(("digits", arg) for arg in ("", "tiny")),
    *(("shapes", arg) for arg in ("", "16", "scenes", "64", "tiny")),
    *(("emoji", arg) for arg in ("", "all", "tiny")),
    *(("laion", arg) for arg in ("", "paper", "tiny", "bytes", "small", "unconditional", "unconditional-tiny")),
    *(("emoji_upsampler", arg) for arg in ("", "none", "clean", "tiny")),
    *(("photos", arg) for arg in ("", "tiny")),
    *(("own", arg) for arg in ("", "tiny", "class-mini-32", "unconditional-large-256")),
    *(("laion_upsampler", arg) for arg in ("", "1024", "bytes", "tiny")),
    *(
        ("imagenet", arg)
        for arg in ("", "tiny", "upsampler", "upsampler-tiny", "sr", "sr-tiny", "unconditional", "unconditional-tiny")
    ),
    *(("ablation", row) for row in ablation.ROWS),
    *(("scale", size + end) for end in ("", "-bytes") for size in scale.SIZES),
)
# Devices -> what a run on so many would choose from (docs/meshes.md): data, fsdp, tensor, slices.
MESHES = {
    8: ((-1, 1, 1), (1, -1, 1), (2, 2, 2)),
    64: ((-1, 1, 1), (-1, 16, 1), (1, -1, 1), (8, 4, 2), (-1, 8, 1, 2)),
    512: ((-1, 1, 1), (-1, 16, 1), (1, -1, 1), (-1, 64, 1), (4, 64, 2), (-1, 64, 1, 2)),
}


class Placed(NamedTuple):
    """One array: its parameter, where it lies, and where its moments do (None for a frozen one)."""

    name: str
    spec: Spec
    own: jax.sharding.NamedSharding
    moments: jax.sharding.NamedSharding | None


def load(name: str, arg: str) -> Config:
    """A config by file and variant."""
    return from_dict(importlib.import_module(f"configs.{name}").get_config(*filter(None, [arg])))


def placed(networks: Networks, mesh: object) -> Iterator[Placed]:
    """Every parameter of G, D, V and the frozen networks on a mesh."""
    rules = networks.config.rules
    trained = [module for module, _ in networks.trained().values()]
    others = (networks.frozen.projection, networks.frozen.perceptual)
    frozen = [*(t.module for t in networks.frozen.towers.values()), *others]
    for module in (*trained, *filter(None, frozen)):
        specs = jax.tree_util.tree_leaves_with_path(module.specs, is_leaf=is_spec)
        own = jax.tree.leaves(module.shardings(mesh, rules))
        moments = jax.tree.leaves(module.shardings(mesh, rules, sharding.optimizer_spec))
        for (path, s), o, m in zip(specs, own, moments, strict=True):
            yield Placed(f"{module.name}/{path_name(path)}", s, o, m if module in trained else None)


def section(networks: Networks, devices: int, sizes: tuple[int, ...]) -> list[str]:
    """The lines of one mesh."""
    mesh = sharding.abstract_mesh(MeshConfig(*sizes), devices)
    lines = [f"[{devices} devices: {', '.join(f'{k}={v}' for k, v in mesh.shape.items() if v > 1)}]"]
    groups: dict[str, list[int]] = defaultdict(list)
    whole: list[tuple[int, str]] = []
    digest = hashlib.sha256()
    try:
        for name, s, own, moments in placed(networks, mesh):
            size = math.prod(s.shape)
            spec = _text(own.spec)
            more = "" if moments is None or moments == own else f" | {_text(moments.spec)}"
            digest.update(f"{name} {s.shape} {spec}{more}\n".encode())
            if own.is_fully_replicated and not more:
                whole.append((size, name))
            else:
                groups[f"{' '.join(a or '-' for a in s.axes)} -> {spec}{more}"].append(size)
    except UserError as e:
        return [*lines, f"error: {e}"]
    lines += [f"{k}: {len(v)}, {sum(v)}" for k, v in sorted(groups.items())]
    lines.append(f"whole: {len(whole)}, {sum(n for n, _ in whole)}; {max(whole)[0]} {max(whole)[1]}")
    return [*lines, f"digest {digest.hexdigest()[:16]}"]


def _text(spec: jax.sharding.PartitionSpec) -> str:
    return " ".join("-" if e is None else e if isinstance(e, str) else "+".join(e) for e in spec) or "()"


def text(networks: Networks) -> str:
    """The whole file of a config."""
    lines = [f"{networks.config.name}: generator {networks.g.count()}, discriminator {networks.d.count()}"]
    for devices, meshes in MESHES.items():
        for sizes in meshes:
            lines += ["", *section(networks, devices, sizes)]
    return "\n".join(lines) + "\n"


def file(name: str, arg: str) -> Path:
    """Where a config's text is kept."""
    return FOLDER / f"{'-'.join(filter(None, [name, arg]))}.txt"


def main() -> None:
    """Writes all files, and removes those of configs that are gone."""
    FOLDER.mkdir(exist_ok=True)
    for old in set(FOLDER.glob("*.txt")) - {file(*v) for v in VARIANTS}:
        old.unlink()
    for variant in VARIANTS:
        file(*variant).write_text(text(Networks(load(*variant))))


if __name__ == "__main__":
    main()

"""The process that tools/bench_against.py starts in each checkout: compiles the train step once, then measures on request.

    PYTHONPATH=CHECKOUT python bench_runner.py '{"config": "FILE.py:variant", "overrides": [], "with_r1": false, "core": null}'

It uses only what every checkout has. Lines of stdout that begin with "@bench " are for the caller; the first says that it is
ready. Each line of stdin, {"steps": 1, "core": 0}, is answered by {"seconds": of a step, "cpu_seconds": of a step}.
"""

import contextlib
import functools
import importlib
import json
import os
import platform
import sys
import time
from typing import Any


def say(what: dict[str, Any]) -> None:
    """One line to the caller."""
    print("@bench " + json.dumps(what), flush=True)


def pin(core: int | None) -> None:
    """Moves all threads of this process to one core."""
    if core is None:
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # one that has just ended
            os.sched_setaffinity(int(thread), {core})


def draw(specs: dict[str, Any], shardings: dict[str, Any]) -> dict[str, Any]:
    """A batch of noise with captions that all differ and labels that are not known."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    out = {}
    for name, spec in specs.items():
        if name == "image":
            value = rng.integers(0, 256, spec.shape, np.uint8)
        elif name == "tokens":
            value = rng.integers(3, 259, spec.shape, np.int32)
            value[:, -1] = 2
        else:
            value = np.full(spec.shape, -1, np.int32)
        out[name] = jax.device_put(value, shardings[name])
    return out


def imported(*places: str) -> Any:
    """The first of "module" or "module:name" that this checkout has."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            found = importlib.import_module(module)
            return getattr(found, name) if name else found
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"this checkout has none of {', '.join(places)}: it is too old for --against")


def main() -> None:
    """Answers until stdin ends."""
    asked = json.loads(sys.argv[1])
    pin(asked["core"])  # before JAX: it makes as many threads as there are cores
    import jax

    import gigagan_jax
    from gigagan_jax import cli
    from gigagan_jax.training.batch import abstract_batch
    from gigagan_jax.training.state import Networks
    from gigagan_jax.training.step import TrainStep

    # The other checkout may be older: each of these has had another place.
    sharding = imported("gigagan_jax.parallel.sharding", "gigagan_jax.sharding")
    tune_malloc = imported("gigagan_jax.core.processes:tune_malloc", "gigagan_jax.memory:keep_memory")
    CompiledStep = imported("gigagan_jax.training.compiled_step:CompiledStep", "gigagan_jax.training.step:CompiledStep")

    tune_malloc()
    config = cli.load_config(asked["config"], asked["overrides"])
    if config.condition != "text" or config.text.encoder not in ("bytes", "words"):
        raise SystemExit("--against compares configs of a trained text encoder, such as configs/laion.py:small")
    mesh = sharding.make_mesh(config.mesh)
    networks = Networks(config)
    step = CompiledStep(TrainStep(networks), mesh)
    state = networks.init(mesh)
    batch, key, one = draw(abstract_batch(config), step.batch_shardings), step.key(), step.scalar(1.0)
    run = functools.partial(step, with_r1=asked["with_r1"])
    start = time.perf_counter()
    state, metrics = run(state, batch, key, {}, one)
    jax.block_until_ready(metrics)
    first = time.perf_counter() - start
    say(
        {
            "package": os.path.dirname(os.path.dirname(gigagan_jax.__file__)),
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
            "parameters": [networks.g.count(), networks.d.count()],
            "first_step_seconds": first,
        }
    )
    for line in sys.stdin:
        wish = json.loads(line)
        pin(wish["core"])
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(wish["steps"]):
            state, metrics = run(state, batch, key, {}, one)
        jax.block_until_ready((state, metrics))
        steps = wish["steps"]
        say({"seconds": (time.perf_counter() - start) / steps, "cpu_seconds": (time.process_time() - cpu) / steps})


if __name__ == "__main__":
    main()

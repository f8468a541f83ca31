"""How fast a run is: images a second, of a chip, and the share of the chips' peak (MFU)."""

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from gigagan_jax import __version__
from gigagan_jax.config import Config, config_digest
from gigagan_jax.core.hardware import count_chips, peak_flops
from gigagan_jax.telemetry.goodput import Goodput
from gigagan_jax.training.batch import abstract_batch
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

_log = logging.getLogger(__name__)


def model_flops(config: Config) -> float:
    """FLOPs that training needs for one image: of the trace, nothing recomputed, steps with R1 weighed by their interval."""
    # MFU is of the model: what `remat` does twice is not done better for it.
    networks = Networks(dataclasses.replace(config, remat=False))
    step = TrainStep(networks)
    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    # Abstract arguments: the count is of the trace, no device is used.
    arguments = networks.abstract(), abstract_batch(config), key, networks.frozen.abstract()
    plain, with_r1 = (count_flops(functools.partial(step, with_r1=r1), *arguments) for r1 in (False, True))
    interval = config.loss.r1_interval
    return (plain * (interval - 1) + with_r1) / interval / config.batch_size


def run_info(config: Config, networks: Networks, mesh: Any) -> dict[str, Any]:
    """What a process says of itself: model, devices, versions."""
    devices = mesh.devices.reshape(-1).tolist()
    return {
        "config": config.name,
        "parameters": {module.name: module.count() for module, _ in networks.trained().values()},
        "batch_size": config.batch_size,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "chips": count_chips(devices),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "gigagan_jax": __version__,
    }


class ThroughputMeter:
    """Turns a rate into the figures that are logged.

    MFU is only there in bfloat16, on chips whose peak is known (core/hardware.py), and once the model's FLOPs are counted.

    Args:
      config: of the run.
      devices: that it trains on.
      goodput: of the run; it keeps the FLOPs for the processes that come after.
    """

    def __init__(self, config: Config, devices: Sequence[Any], goodput: Goodput):
        self._config, self._goodput = config, goodput
        # FLOPs are kept in the run's goodput file: a restart need not trace again.
        self._name = f"{config_digest(config)} {__version__}"
        self.chips = count_chips(devices)
        self.peak = peak_flops(devices) if config.dtype == "bfloat16" else None
        # The last process of this run that counted them, for this config and version.
        known = (session.about.get("flops_per_image") for session in reversed(goodput.account.sessions))
        self.flops = next((k["flops"] for k in known if k and k["of"] == self._name), None)
        self._thread: threading.Thread | None = None

    def learn_model_flops(self) -> None:
        """Begins to count FLOPs in a thread, once, if they are needed: tracing takes a while, and training goes on."""
        if self.peak and self.flops is None and self._thread is None and jax.process_index() == 0:
            self._thread = threading.Thread(target=self._count_model_flops, daemon=True, name="flops")
            self._thread.start()

    def _count_model_flops(self) -> None:
        try:
            flops = model_flops(self._config)
        except Exception as e:
            _log.warning("the FLOPs of the model could not be counted, MFU is not shown: %s: %s", type(e).__name__, e)
            return
        self._goodput.record_facts({"flops_per_image": {"of": self._name, "flops": flops}})
        self.flops = flops

    def metrics_of_rate(self, rate: float | None) -> dict[str, float]:
        """Metrics of a rate in images a second; nothing of None."""
        if rate is None:
            return {}
        out = {"images_per_second": rate, "images_per_second_per_chip": rate / self.chips}
        if self.peak and self.flops:
            out["mfu"] = rate * self.flops / self.peak
        return out


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of one call with arguments like `args` (arrays or ShapeDtypeStructs); recomputation included."""
    return count_jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def count_jaxpr_flops(jaxpr: Any) -> int:
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            # Two operations, a product and a sum, for each output and contracted element.
            (contracted, _), _ = e.params["dimension_numbers"]
            shape = e.invars[0].aval.shape
            total += 2 * math.prod(e.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif e.primitive.name == "conv_general_dilated":
            kernel, numbers = e.invars[1].aval.shape, e.params["dimension_numbers"]
            per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            # A stride of the backward pass is a dilation of the input: the zeros between cost nothing.
            zeros = math.prod(e.params["lhs_dilation"])
            total += 2 * math.prod(e.outvars[0].aval.shape) * per_output // zeros
        # A scan's body is traced once and run `length` times.
        trips = e.params["length"] if e.primitive.name == "scan" else 1
        total += trips * sum(count_jaxpr_flops(inner) for inner in core.jaxprs_in_params(e.params))
    return total

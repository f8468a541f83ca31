"""The jobs of a bench, in order of worth: ceilings, steps, sampling, all of them in turns, kernels. Training: bench_training.py.

Each job returns what its line says. Programs that were compiled stay for the jobs after.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_inputs import draw_tokens, random_frozen, synthetic_batch
from bench_kernels import profile
from bench_measure import Budget, Program, calls_of_a_run, compile_split, figures, peak_bytes, take_turns, with_memory
from bench_output import spread
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax.config import Config
from gigagan_jax.core.hardware import chip_name, count_chips, peak_flops
from gigagan_jax.inference.latents import truncate_w, z_of_seed
from gigagan_jax.models.pretrained.frozen import FrozenNetworks
from gigagan_jax.models.pretrained.text_encoder import text_spec
from gigagan_jax.parallel import sharding
from gigagan_jax.planning.topology import BANDWIDTHS
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.state import GanState, Networks
from gigagan_jax.training.step import TrainStep
from gigagan_jax.training.throughput import count_flops

FIRST_RUNS = 3  # of a program that was just compiled; the figures that count are those of the turns
TRACED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      steps: calls of a run; None for as many as take a second.
      repeats: runs of each program in the turns.
      sample_batch: images that sampling makes at once on each device.
      product: side of the matrices whose product is the ceiling; 0 for what suits the device.
      copy_bytes: size of the array that is copied; 0 likewise.
    """

    steps: int | None = None
    repeats: int = 7
    sample_batch: int = 1
    product: int = 0
    copy_bytes: int = 0


class Bench:
    """What the jobs share: config, mesh, state and frozen weights, made when they are first needed.

    Args:
      config: what is measured.
      budget: seconds that are left.
      sizes: how much is measured.
      random: draw the weights of the frozen networks instead of reading them.

    Attributes:
      programs: that were compiled, by name.
      rates: images/s, seconds and shares of each program as last measured.
      ceilings: FLOP/s of one device as measured, by precision.
    """

    def __init__(self, config: Config, budget: Budget, sizes: Sizes, *, random: bool):
        self.config, self.budget, self.sizes, self.random = config, budget, sizes, random
        self.mesh = sharding.make_mesh(config.mesh)
        self.shards = sharding.batch_shards(self.mesh, config.rules)
        sharding.check_batch(config.batch_size, config.micro_batches, self.mesh, config.rules)
        self.networks = Networks(config)
        self.programs: dict[str, Program] = {}
        self.rates: dict[str, dict[str, Any]] = {}
        self.ceilings: dict[str, float] = {}
        self.state: GanState | None = None
        self._weights: Any = None
        self._calls: dict[str, int] = {}  # of a run, by program
        self._steps: dict[int, CompiledStep] = {}  # by batch: programs that kinds of step share are compiled once

    def fresh(self) -> GanState:
        """The state; a new one where a step that failed has taken the last."""
        if self.state is None:
            self.state = self.networks.init(self.mesh)
        return self.state

    def weights(self, frozen: FrozenNetworks) -> Any:
        """Parameters of the frozen networks of the step, or of `frozen` where that has others."""
        if self._weights is None:
            own = self.networks.frozen
            self._weights = random_frozen(own, self.mesh) if self.random else own.load(self.mesh)[0]
        if frozen.towers.keys() <= self._weights.keys():
            return {k: self._weights[k] for k in frozen.abstract()}
        return random_frozen(frozen, self.mesh) if self.random else frozen.load(self.mesh)[0]

    def forget_state(self) -> None:
        """Frees the state."""
        self.state = None

    def close(self) -> None:
        """Frees all there is."""
        self.programs.clear()
        self._steps.clear()
        self.state = self._weights = None

    # -- jobs

    def ceiling_job(self) -> dict[str, Any]:
        """A large matrix product and a copy on one device, beside what its maker promises."""
        device = jax.devices()[0]
        cpu = device.platform == "cpu"
        side = self.sizes.product or (1024 if cpu else 8192)
        size = self.sizes.copy_bytes or (2**27 if cpu else 2**30)
        steps, repeats = (2, 3) if cpu else (20, 5)
        peak = peak_flops([device])
        products: dict[str, Any] = {}
        for dtype in dict.fromkeys(("float32" if cpu else "bfloat16", self.config.dtype)):
            if cpu and dtype != "float32":
                continue  # emulated there
            a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.dtype(dtype)) for i in range(2))
            product = functools.partial(jax.jit(jnp.matmul), a, b)
            rate = self._rate(product, steps, repeats, 2 * side**3)
            self.ceilings[dtype] = rate["median"]
            products[dtype] = {"side": side, "flops_per_second": rate}
            if dtype == "bfloat16" and peak:
                products[dtype] |= {"peak": peak, "share_of_peak": rate["median"] / peak}
        x = jnp.ones(size // 4, jnp.float32)
        # A sign changed: what is only copied might not be copied at all.
        rate = self._rate(functools.partial(jax.jit(jnp.negative), x), steps, repeats, 2 * size)
        copy: dict[str, Any] = {"array_bytes": size, "bytes_per_second": rate}
        network = BANDWIDTHS.get(chip_name(device.device_kind) or "")
        if network is not None:
            peak_bandwidth = network.memory * count_chips([device])
            copy |= {"peak": peak_bandwidth, "share_of_peak": rate["median"] / peak_bandwidth}
        return {"products": products, "copy": copy}

    def _rate(self, run: Callable[[], Any], steps: int, repeats: int, work: int) -> dict[str, float]:
        jax.block_until_ready(run())
        rates = []
        for _ in range(repeats):
            start = time.perf_counter()
            out = None
            for _ in range(steps):
                out = run()
            jax.block_until_ready(out)
            rates.append(work * steps / (time.perf_counter() - start))
        return spread(rates)

    def step_job(self, name: str, with_r1: bool) -> dict[str, Any]:
        """Compiles the train step and measures it alone."""

        def attempt(batch: int) -> dict[str, Any]:
            return self._measure_alone(self._step(name, with_r1, batch))

        return self._within_memory(name, attempt, self.config.batch_size, self.shards * self.config.micro_batches)

    def sampling_job(self) -> dict[str, Any]:
        """Compiles sampling, from tokens to images, and measures it alone."""

        def attempt(batch: int) -> dict[str, Any]:
            return self._measure_alone(self._sampling(batch))

        return self._within_memory("sampling", attempt, self.sizes.sample_batch * self.shards, self.shards)

    def _within_memory(self, name: str, job: Callable[[int], dict[str, Any]], batch: int, least: int) -> dict[str, Any]:
        def clean() -> None:
            self.programs.pop(name, None)
            self.forget_state()

        done = with_memory(job, batch, least, clean)
        notes: dict[str, Any] = {"notes": list(done.notes)} if done.notes else {}
        return ({"out_of_memory": True} if done.result is None else done.result) | notes

    def _measure_alone(self, program: Program) -> dict[str, Any]:
        self._calls[program.name] = self.sizes.steps or calls_of_a_run(program)
        times = take_turns({program: self._calls[program.name]}, FIRST_RUNS, self._enough)[program.name]
        self.programs[program.name] = program
        return program.facts() | self._figures(program, times) | {"device_bytes": peak_bytes()}

    def _figures(self, program: Program, times: list[float]) -> dict[str, Any]:
        dtype = self.config.dtype
        peak = peak_flops(list(self.mesh.devices.flat)) if dtype == "bfloat16" else None
        # A CPU has no products of bfloat16: there its ceiling is that of float32.
        ceiling = self.ceilings.get(dtype) or self.ceilings.get("float32")
        self.rates[program.name] = figures(
            program, self._calls[program.name], times, peak, ceiling, self.mesh.devices.size
        )
        return self.rates[program.name]

    def _enough(self, longest: float) -> bool:
        return not self.budget.fits(2 * longest)

    def _step(self, name: str, with_r1: bool, batch: int) -> Program:
        config = dataclasses.replace(self.config, batch_size=batch)
        networks = self.networks if batch == self.config.batch_size else Networks(config)
        step = self._steps.setdefault(batch, CompiledStep(TrainStep(networks), self.mesh))
        programs, seconds = compile_split(lambda: step.compile(with_r1=with_r1))
        weights = self.weights(networks.frozen)
        data, key, one = synthetic_batch(config, step.batch_shardings), step.key(), step.scalar(1.0)

        def run() -> Any:
            self.state, metrics = step(self.fresh(), data, key, weights, one, with_r1=with_r1)
            return metrics

        return Program(name, run, batch, step.flops(with_r1=with_r1), list(programs.values()), seconds)

    def _sampling(self, batch: int) -> Program:
        config, mesh = self.config, self.mesh
        module, z_dim = self.networks.g, config.generator.z_dim
        frozen = FrozenNetworks(config, roles=("text",))
        text = config.condition == "text"

        def generate(params: Any, w_avg: jax.Array, given: dict[str, jax.Array], psi: jax.Array, weights: Any) -> Any:
            with sharding.use_mesh(mesh, config.rules):
                generator = module.bind(params)
                said = frozen.encode_captions(weights, given["tokens"]) if frozen.towers else {}
                condition = generator.condition(given.get("tokens"), given["label"], said.get("features"))
                z = z_of_seed(given["seed"], z_dim)
                if config.is_upsampler:
                    # Of images at the size of training, without noise.
                    w = generator.map(z, condition, jnp.zeros(batch))
                    return generator.synthesize(w, condition, given["low"])[-1]
                w = generator.map(z, condition)
                w = truncate_w(generator, w, condition, w_avg, psi, psi, z_dim)
                return generator.synthesize(w, condition)[-1]

        rng = np.random.default_rng(0)
        given = {"label": np.zeros(batch, np.int32), "seed": np.arange(batch, dtype=np.uint32)}
        if config.is_upsampler:
            side = config.upsampler.input_resolution
            given["low"] = rng.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
        if text:
            spec = text_spec(config.text)
            given["tokens"] = draw_tokens(rng, (batch, config.text.length), spec.vocab_size, spec.end_id)
        row = lambda *shape: NamedSharding(
            mesh,
            sharding.partition_spec(("batch", *(None,) * len(shape)), (batch, *shape), mesh, config.rules, "prompt"),
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        where = {k: row(*x.shape[1:]) for k, x in given.items()}
        params = module.shardings(mesh, config.rules)
        jitted = jax.jit(
            generate,
            in_shardings=(params, everywhere, where, everywhere, frozen.shardings(mesh)),
            out_shardings=row(config.resolution, config.resolution, 3),
        )
        abstract = (
            module.abstract(),
            jax.ShapeDtypeStruct((config.generator.w_dim,), jnp.float32),
            {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in given.items()},
            jax.ShapeDtypeStruct((), jnp.float32),
            frozen.abstract(),
        )
        compiled, seconds = compile_split(lambda: jitted.lower(*abstract).compile())
        weights = self.weights(frozen)
        placed = {k: jax.device_put(x, where[k]) for k, x in given.items()}
        psi = jax.device_put(np.float32(1.0), everywhere)

        def run() -> Any:
            state = self.fresh()
            # An average that is cut further than its parameters is put together first, as sampling does.
            return compiled(jax.device_put(state.g_ema, params), state.w_avg, placed, psi, weights)

        return Program("sampling", run, batch, count_flops(generate, *abstract), [compiled], seconds)

    def turns_job(self) -> dict[str, Any]:
        """All programs in turn, A B C A B C ...: what is compared was measured within the same seconds."""
        programs = list(self.programs.values())
        # A third of what is left: the jobs after this one need the rest.
        until = self.budget.spent + self.budget.left / 3
        enough = lambda longest: self.budget.spent + longest > until
        times = take_turns({p: self._calls[p.name] for p in programs}, self.sizes.repeats, enough)
        rows = {p.name: self._figures(p, times[p.name]) for p in programs}
        out: dict[str, Any] = {"results": rows, "device_bytes": peak_bytes()}
        if {"step", "step_with_r1"} <= rows.keys():
            interval = self.config.loss.r1_interval
            batches = {rows[k]["batch"] for k in ("step", "step_with_r1")}
            if len(batches) == 1:
                plain, r1 = (rows[k]["seconds"]["median"] for k in ("step", "step_with_r1"))
                mean = (plain * (interval - 1) + r1) / interval
                out["mean_step"] = {"seconds": mean, "images_per_second": batches.pop() / mean}
        return out

    def kernels_job(self) -> dict[str, Any]:
        """The table of kernels and modules of each step, from a trace of a few."""
        rows = {}
        for name in ("step", "step_with_r1"):
            if name in self.programs:
                program = self.programs[name]
                texts = [compiled.as_text() for compiled in program.compiled]
                rows[name] = profile(program.run, texts, TRACED_STEPS)
        return {"results": rows}

    # -- what they are expected to take

    def compile_guess(self) -> float:
        """Seconds that the first program of a config is expected to take, by its size; from there on it is measured."""
        return guess(self.networks)

    def turn_seconds(self) -> float:
        """Seconds of one run of each program."""
        return sum(self._calls[n] * self.rates[n]["seconds"]["median"] for n in self.programs)


def guess(networks: Networks) -> float:
    """Seconds to compile a step and to begin."""
    return 15.0 + 0.1e-6 * (networks.g.count() + networks.d.count())

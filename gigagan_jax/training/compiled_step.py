"""The train step as compiled programs on a mesh.

On TPUs and GPUs a step is one program, with R1 or without. On CPUs it is two, the critics' half and the generator's: both
kinds of step share the second, so that a third less is compiled, and compiling needs half the memory. What is computed is
the same.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax import sharding
from gigagan_jax.models.abstract import Params
from gigagan_jax.training.batch import Batch, abstract_batch, batch_shardings
from gigagan_jax.training.flops import count_flops
from gigagan_jax.training.state import GanState
from gigagan_jax.training.step import NOTHING, HalfStep, Metrics, TrainStep

# LLVM's last level of optimisation costs a sixth of the compile time on CPUs and makes no step faster (docs/performance.md).
_CPU_OPTIONS = {"xla_backend_optimization_level": 1}
_COMPILERS = 2  # programs compiled side by side: each holds gigabytes while it is

CRITICS, GENERATOR, WHOLE = "critics", "generator", "whole"


def _options(platform: str) -> dict[str, Any]:
    """Arguments of jax.jit for this platform; what XLA_FLAGS sets stays as it is set."""
    if platform != "cpu" or any(name in os.environ.get("XLA_FLAGS", "") for name in _CPU_OPTIONS):
        return {}
    return {"compiler_options": _CPU_OPTIONS}


class CompiledStep:
    """The step on a mesh: state donated, everything sharded.

    Frozen networks are an argument of their own, sharded and not donated.

    Args:
      step: what a step computes.
      mesh: devices; their platform decides how many programs a step is.

    Attributes:
      traces: `with_r1` of each tracing so far; two entries in a healthy run.
    """

    def __init__(self, step: TrainStep, mesh: Any):
        self.step, self.mesh = step, mesh
        self.config = step.config
        self.traces: list[bool] = []
        self.state_shardings = step.networks.shardings(mesh)
        self.batch_shardings = batch_shardings(self.config, mesh)
        self.frozen_shardings = step.networks.frozen.shardings(mesh)
        everywhere = self.key_sharding = NamedSharding(mesh, PartitionSpec())
        platform = mesh.devices.flat[0].platform if isinstance(mesh, jax.sharding.Mesh) else ""
        self.halves = platform == "cpu"
        where, options = self.state_shardings, _options(platform)
        judges, rest = self._cut(where)
        inputs = (self.batch_shardings, everywhere, self.frozen_shardings, everywhere)
        self._whole = jax.jit(
            self._run,
            static_argnames="with_r1",
            donate_argnums=0,
            in_shardings=(where, *inputs),
            out_shardings=(where, everywhere),
            **options,
        )
        self._critics = jax.jit(
            self._run_critics,
            static_argnames="with_r1",
            donate_argnums=0,
            in_shardings=(judges, rest, *inputs),
            out_shardings=(judges, None),
            **options,
        )
        self._generator = jax.jit(
            self._run_generator,
            donate_argnums=0,
            in_shardings=(rest, judges, None, *inputs),
            out_shardings=(rest, everywhere),
            **options,
        )
        self._ahead: dict[tuple[str, bool], Future] = {}
        self._ahead_for: Any = None

    # -- what is traced

    def _run(
        self, state: GanState, batch: Batch, key: jax.Array, frozen: Params, lr_scale: jax.Array, with_r1: bool
    ) -> tuple[GanState, Metrics]:
        self.traces.append(with_r1)
        with sharding.use(self.mesh, self.config.rules):
            return self.step(state, batch, key, frozen, lr_scale, with_r1=with_r1)

    def _run_critics(
        self,
        judges: Any,
        rest: GanState,
        batch: Batch,
        key: jax.Array,
        frozen: Params,
        lr_scale: jax.Array,
        with_r1: bool,
    ) -> tuple[Any, HalfStep]:
        self.traces.append(with_r1)
        with sharding.use(self.mesh, self.config.rules):
            state = self._joined(judges, rest)
            state, half = self.step.update_critics(state, batch, key, frozen, lr_scale, with_r1=with_r1)
        return self._cut(state)[0], half

    def _run_generator(
        self,
        rest: GanState,
        judges: Any,
        half: HalfStep,
        batch: Batch,
        key: jax.Array,
        frozen: Params,
        lr_scale: jax.Array,
    ) -> tuple[GanState, Metrics]:
        with sharding.use(self.mesh, self.config.rules):
            state = self._joined(judges, rest)
            state, metrics = self.step.update_generator(state, half, batch, key, frozen, lr_scale)
        return self._cut(state)[1], metrics

    @staticmethod
    def _cut(state: Any) -> tuple[Any, GanState]:
        """((D, V), all else)"""
        return (state.d, state.v), state.replace(d=None, v=None)

    @staticmethod
    def _joined(judges: Any, rest: Any) -> GanState:
        return rest.replace(d=judges[0], v=judges[1])

    # -- what is called

    def __call__(
        self,
        state: GanState,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NOTHING,
        lr_scale: jax.Array | None = None,
        *,
        with_r1: bool,
    ) -> tuple[GanState, Metrics]:
        inputs = (batch, key, frozen, self._one if lr_scale is None else lr_scale)
        if not self.halves:
            ahead = self._program(WHOLE, with_r1)
            return ahead(state, *inputs) if ahead else self._whole(state, *inputs, with_r1)
        judges, rest = self._cut(state)
        ahead = self._program(CRITICS, with_r1)
        first = (judges, rest, *inputs)
        judges, half = ahead(*first) if ahead else self._critics(*first, with_r1)
        penalty = half.penalty(with_r1)
        rest, metrics = (self._program(GENERATOR, False) or self._generator)(rest, judges, half, *inputs)
        return self._joined(judges, rest), metrics | penalty

    def _program(self, name: str, with_r1: bool) -> Callable[..., Any] | None:
        """A program that was compiled ahead, waited for; None where there is none."""
        future = self._ahead.get((name, with_r1))
        return None if future is None else future.result()

    def compile_ahead(self, state: GanState, batch: Batch, key: jax.Array, frozen: Params, lr_scale: jax.Array) -> None:
        """Starts to compile all programs of steps with arguments like these, side by side, those of a step with R1 first.

        A call waits for the programs that it needs.
        """
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        arguments = jax.tree.map(like, (state, batch, key, frozen, lr_scale))
        if arguments == self._ahead_for:
            return
        self._ahead_for = arguments
        state, *inputs = arguments
        judges, rest = self._cut(state)
        traced_half: Future = Future()

        def whole(with_r1: bool) -> Any:
            return self._whole.lower(state, *inputs, with_r1).compile()

        def critics(with_r1: bool) -> Any:
            try:
                traced = self._critics.trace(judges, rest, *inputs, with_r1)
            except BaseException as e:
                if with_r1:
                    traced_half.set_exception(e)
                raise
            if with_r1:
                traced_half.set_result(traced.out_info[1])
            return traced.lower().compile()

        def generator() -> Any:
            half = jax.tree.map(like, traced_half.result())
            return self._generator.lower(rest, judges, half, *inputs).compile()

        pool = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="compile")
        if self.halves:
            self._ahead[CRITICS, True] = pool.submit(critics, True)
            self._ahead[GENERATOR, False] = pool.submit(generator)
            self._ahead[CRITICS, False] = pool.submit(critics, False)
        else:
            for with_r1 in (True, False):
                self._ahead[WHOLE, with_r1] = pool.submit(whole, with_r1)
        pool.shutdown(wait=False)

    def compile(self, *, with_r1: bool) -> dict[str, Any]:
        """Compiles the programs of one kind of step, one after the other; calls run them. Returns them by name.

        A program that was compiled before is not compiled again: on CPUs both kinds of step share the generator's half.
        """
        key = jax.eval_shape(functools.partial(jax.random.key, 0))
        nets = self.step.networks
        state = nets.abstract()
        inputs = (abstract_batch(self.config), key, nets.frozen.abstract(), jax.ShapeDtypeStruct((), jnp.float32))

        def keep(name: str, r1: bool, program: Any) -> Any:
            future = self._ahead[name, r1] = Future()
            future.set_result(program)
            return program

        if not self.halves:
            return {WHOLE: self._program(WHOLE, with_r1) or keep(WHOLE, with_r1, self.lower(with_r1=with_r1).compile())}
        judges, rest = self._cut(state)
        critics, generator = self._program(CRITICS, with_r1), self._program(GENERATOR, False)
        if critics is None or generator is None:
            traced = self._critics.trace(judges, rest, *inputs, with_r1)
            if critics is None:
                critics = keep(CRITICS, with_r1, traced.lower().compile())
            if generator is None:
                half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced.out_info[1])
                lowered = self._generator.lower(rest, judges, half, *inputs)
                generator = keep(GENERATOR, False, lowered.compile())
        return {CRITICS: critics, GENERATOR: generator}

    # -- what is looked at

    def flops(self, *, with_r1: bool) -> int:
        """Floating-point operations of one step over all devices, from its trace; see flops.py."""
        key = jax.eval_shape(functools.partial(jax.random.key, 0))
        nets = self.step.networks

        def run(*args: Any) -> Any:
            with sharding.use(self.mesh, self.config.rules):
                return self.step(*args, with_r1=with_r1)

        return count_flops(run, nets.abstract(), abstract_batch(self.config), key, nets.frozen.abstract())

    def lower(self, *, with_r1: bool) -> Any:
        """The whole step as one program, lowered for abstract arguments: to look at, or for a device that is not here."""
        key = jax.eval_shape(functools.partial(jax.random.key, 0))
        nets = self.step.networks
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        batch = abstract_batch(self.config)
        return self._whole.lower(nets.abstract(), batch, key, nets.frozen.abstract(), scale, with_r1)

    def key(self) -> jax.Array:
        """The run's key, the same on all hosts."""
        data = jax.random.key_data(jax.random.key(self.config.seed))
        host = jax.device_get(data)
        return jax.random.wrap_key_data(jax.make_array_from_callback(host.shape, self.key_sharding, lambda i: host[i]))

    @functools.cached_property
    def _one(self) -> jax.Array:
        return self.scalar(1.0)

    def scalar(self, value: float) -> jax.Array:
        """A number as the step takes it: float32, on all devices."""
        return jax.make_array_from_callback((), self.key_sharding, lambda i: np.float32(value))

"""The train step as compiled programs on a mesh.

On TPUs and GPUs a step is one program, with R1 or without. On CPUs it is several, one after the other: gradients of the
critics, those of R1 on top, the critics' update, and the generator's half. Both kinds of step share all but R1's, so that
less is compiled, in smaller pieces that need less memory. What is computed is the same.
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

from gigagan_jax.core.processes import release_memory
from gigagan_jax.models.network import Params
from gigagan_jax.parallel import sharding
from gigagan_jax.training.batch import Batch, abstract_batch, batch_axes, batch_shardings
from gigagan_jax.training.objectives import NO_FROZEN, Metrics
from gigagan_jax.training.state import GanState
from gigagan_jax.training.step import CriticGradients, HalfStep, TrainStep, critic_params
from gigagan_jax.training.throughput import count_flops

# LLVM's last level of optimisation costs a sixth of the compile time on CPUs and makes no step faster (docs/performance.md).
_CPU_OPTIONS = {"xla_backend_optimization_level": 1}
_COMPILERS = 2  # programs compiled side by side: each holds gigabytes while it is

# Programs of a step on CPUs, in the order in which a step with R1 calls them, and the whole step elsewhere.
CRITICS, R1, UPDATE, GENERATOR = "critic_gradients", "r1", "update_critics", "generator"
STEP, STEP_WITH_R1 = "step", "step_with_r1"


def _cpu_options(platform: str) -> dict[str, Any]:
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
      traces: names of the programs traced so far; each once in a healthy run.
    """

    def __init__(self, step: TrainStep, mesh: Any):
        self.step, self.mesh = step, mesh
        self.config = step.config
        self.traces: list[str] = []
        self.state_shardings = step.networks.shardings(mesh)
        self.batch_shardings = batch_shardings(self.config, mesh)
        self.frozen_shardings = step.networks.frozen.shardings(mesh)
        self.key_sharding = NamedSharding(mesh, PartitionSpec())
        platform = mesh.devices.flat[0].platform if isinstance(mesh, jax.sharding.Mesh) else ""
        self.in_parts = platform == "cpu"
        self._jitted = (
            self._jit_parts(**_cpu_options(platform))
            if self.in_parts
            else self._jit_whole_step(**_cpu_options(platform))
        )
        self._compiled: dict[str, Future] = {}
        self._compiled_for: Any = None
        self._pool: ThreadPoolExecutor | None = None

    def _jit_whole_step(self, **options: Any) -> dict[str, Any]:
        """The whole step, of each kind, as jitted functions by name."""
        where, everywhere = self.state_shardings, self.key_sharding
        # One order of arguments for all programs, which the compiler's threads rely on.
        inputs = (self.batch_shardings, everywhere, self.frozen_shardings, everywhere)
        kinds = {STEP: False, STEP_WITH_R1: True}
        return {
            name: jax.jit(
                functools.partial(self._trace_whole_step, name, with_r1),
                donate_argnums=0,
                in_shardings=(where, *inputs),
                out_shardings=(where, everywhere),
                **options,
            )
            for name, with_r1 in kinds.items()
        }

    def _jit_parts(self, **options: Any) -> dict[str, Any]:
        """The parts of a step as jitted functions by name."""
        # The critics' parameters are an argument of their own: their program donates them and no more.
        critics, rest = self._split_state(self.state_shardings)
        batch, frozen, everywhere = self.batch_shardings, self.frozen_shardings, self.key_sharding
        features = self._features_shardings()
        where: Any = self.state_shardings
        gradients = CriticGradients(critic_params(where), *(everywhere,) * 2, features)  # type: ignore[arg-type]
        half = HalfStep(features, *(everywhere,) * 4)  # type: ignore[arg-type]
        return {
            CRITICS: jax.jit(
                self._critic_gradients,
                in_shardings=(critics, rest, batch, everywhere, frozen),
                out_shardings=gradients,
                **options,
            ),
            R1: jax.jit(
                self._add_r1,
                donate_argnums=2,
                in_shardings=(critics, rest, gradients, batch, everywhere, frozen),
                out_shardings=gradients,
                **options,
            ),
            UPDATE: jax.jit(
                self._update_critics,
                donate_argnums=0,
                in_shardings=(critics, rest, gradients, everywhere),
                out_shardings=(critics, half),
                **options,
            ),
            GENERATOR: jax.jit(
                self._update_generator,
                donate_argnums=0,
                in_shardings=(rest, critics, half, batch, everywhere, frozen, everywhere),
                out_shardings=(rest, everywhere),
                **options,
            ),
        }

    def _features_shardings(self) -> dict[str, NamedSharding]:
        """Where the step puts the features of frozen text encoders."""
        batch, frozen = abstract_batch(self.config), self.step.networks.frozen.abstract()
        # Known only by tracing the encoders, which costs no computation.
        encoded = jax.eval_shape(self.step.objective.encode_captions, batch, frozen)
        return {
            k: NamedSharding(
                self.mesh, sharding.partition_spec(batch_axes(k), x.shape, self.mesh, self.config.rules, k)
            )
            for k, x in encoded.items()
            if k not in batch
        }

    # -- what is traced

    def _trace_whole_step(
        self,
        name: str,
        with_r1: bool,
        state: GanState,
        batch: Batch,
        key: jax.Array,
        frozen: Params,
        lr_scale: jax.Array,
    ) -> tuple[GanState, Metrics]:
        self.traces.append(name)
        with sharding.use_mesh(self.mesh, self.config.rules):
            return self.step(state, batch, key, frozen, lr_scale, with_r1=with_r1)

    def _critic_gradients(
        self, critics: Any, rest: GanState, batch: Batch, key: jax.Array, frozen: Params
    ) -> CriticGradients:
        self.traces.append(CRITICS)
        with sharding.use_mesh(self.mesh, self.config.rules):
            return self.step.critic_gradients(self._join_state(critics, rest), batch, key, frozen)

    def _add_r1(
        self,
        critics: Any,
        rest: GanState,
        gradients: CriticGradients,
        batch: Batch,
        key: jax.Array,
        frozen: Params,
    ) -> CriticGradients:
        self.traces.append(R1)
        with sharding.use_mesh(self.mesh, self.config.rules):
            return self.step.add_r1(self._join_state(critics, rest), gradients, batch, key, frozen)

    def _update_critics(
        self, critics: Any, rest: GanState, gradients: CriticGradients, lr_scale: jax.Array
    ) -> tuple[Any, HalfStep]:
        self.traces.append(UPDATE)
        with sharding.use_mesh(self.mesh, self.config.rules):
            state, half = self.step.update_critics(self._join_state(critics, rest), gradients, lr_scale)
        return self._split_state(state)[0], half

    def _update_generator(
        self,
        rest: GanState,
        critics: Any,
        half: HalfStep,
        batch: Batch,
        key: jax.Array,
        frozen: Params,
        lr_scale: jax.Array,
    ) -> tuple[GanState, Metrics]:
        self.traces.append(GENERATOR)
        with sharding.use_mesh(self.mesh, self.config.rules):
            state, metrics = self.step.update_generator(
                self._join_state(critics, rest), half, batch, key, frozen, lr_scale
            )
        return self._split_state(state)[1], metrics

    @staticmethod
    def _split_state(state: Any) -> tuple[Any, GanState]:
        """((D, V), all else)"""
        return (state.d, state.v), state.replace(d=None, v=None)

    @staticmethod
    def _join_state(critics: Any, rest: Any) -> GanState:
        return rest.replace(d=critics[0], v=critics[1])

    # -- what is called

    def __call__(
        self,
        state: GanState,
        batch: Batch,
        key: jax.Array,
        frozen: Params = NO_FROZEN,
        lr_scale: jax.Array | None = None,
        *,
        with_r1: bool,
    ) -> tuple[GanState, Metrics]:
        scale = self._unit_scale if lr_scale is None else lr_scale
        if not self.in_parts:
            return self._wait_for_program(STEP_WITH_R1 if with_r1 else STEP)(state, batch, key, frozen, scale)
        critics, rest = self._split_state(state)
        gradients = self._wait_for_program(CRITICS)(critics, rest, batch, key, frozen)
        if with_r1:
            # R1's gradient is added to D's, in buffers that are given away: no second copy exists.
            gradients = self._wait_for_program(R1)(critics, rest, gradients, batch, key, frozen)
        critics, half = self._wait_for_program(UPDATE)(critics, rest, gradients, scale)
        penalty = half.penalty_metrics(with_r1)
        # G's program sees the critics after their update, as in the whole step.
        rest, metrics = self._wait_for_program(GENERATOR)(rest, critics, half, batch, key, frozen, scale)
        return self._join_state(critics, rest), metrics | penalty

    def _wait_for_program(self, name: str) -> Callable[..., Any]:
        """The program that was compiled ahead, waited for; where there is none, one that compiles when it is called."""
        future = self._compiled.get(name)
        return self._jitted[name] if future is None else future.result()

    # -- compiling ahead

    def programs(self, *, with_r1: bool) -> tuple[str, ...]:
        """Names of the programs of a step, in the order in which they are called."""
        if not self.in_parts:
            return (STEP_WITH_R1 if with_r1 else STEP,)
        return (CRITICS, R1, UPDATE, GENERATOR) if with_r1 else (CRITICS, UPDATE, GENERATOR)

    def compile_ahead(self, state: GanState, batch: Batch, key: jax.Array, frozen: Params, lr_scale: jax.Array) -> None:
        """Starts to compile all programs of steps with arguments like these, side by side.

        A call waits for the programs that it needs.
        """
        arguments = jax.tree.map(_abstract_like, (state, batch, key, frozen, lr_scale))
        # A changed shape, such as another batch size, compiles anew; the same one does not.
        if arguments == self._compiled_for:
            return
        self._compiled_for = arguments
        compiler = _Compiler(self, arguments)
        # In the order of need, but for R1's, the shortest: a long one that starts last would be waited for.
        order = (CRITICS, UPDATE, GENERATOR, R1) if self.in_parts else (STEP_WITH_R1, STEP)
        self.cancel_compiling()
        pool = self._pool = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="compile")
        for name in order:
            self._compiled[name] = pool.submit(compiler.compile, name)

    def cancel_compiling(self) -> None:
        """Leaves programs out that are not being compiled yet: a process ends when those that are have been."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if any(future.cancelled() for future in self._compiled.values()):
            self._compiled, self._compiled_for = {}, None

    def is_compiled(self, *, with_r1: bool) -> bool:
        """Are all programs of this kind of step there?"""
        futures = [self._compiled.get(name) for name in self.programs(with_r1=with_r1)]
        return all(future is not None and future.done() for future in futures)

    def compile(self, *, with_r1: bool) -> dict[str, Any]:
        """Compiles the programs of one kind of step, one after the other; calls run them. Returns them by name.

        A program that was compiled before is not compiled again: on CPUs the kinds of step share all but R1's.
        """
        out = {}
        for name in self.programs(with_r1=with_r1):
            if name not in self._compiled:
                compiled = self._compiler.compile(name)
                self._compiled[name] = Future()
                self._compiled[name].set_result(compiled)
            out[name] = self._compiled[name].result()
        return out

    @functools.cached_property
    def _compiler(self) -> "_Compiler":
        return _Compiler(self, self._abstract_arguments())

    def _abstract_arguments(self) -> tuple[Any, ...]:
        key = jax.eval_shape(functools.partial(jax.random.key, 0))
        nets = self.step.networks
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        return nets.abstract(), abstract_batch(self.config), key, nets.frozen.abstract(), scale

    # -- what is looked at

    def flops(self, *, with_r1: bool) -> int:
        """Floating-point operations of one step over all devices, from its trace; see throughput.py."""

        def run(*args: Any) -> Any:
            with sharding.use_mesh(self.mesh, self.config.rules):
                return self.step(*args, with_r1=with_r1)

        return count_flops(run, *self._abstract_arguments()[:-1])

    def lower(self, *, with_r1: bool) -> Any:
        """The whole step as one program, lowered for abstract arguments: to look at, or for a device that is not here."""
        return self._jit_whole_step()[STEP_WITH_R1 if with_r1 else STEP].lower(*self._abstract_arguments())

    def key(self) -> jax.Array:
        """The run's key, the same on all hosts."""
        # Made on the host and placed: each process would otherwise have a key on its own devices only.
        data = jax.random.key_data(jax.random.key(self.config.seed))
        host = jax.device_get(data)
        return jax.random.wrap_key_data(jax.make_array_from_callback(host.shape, self.key_sharding, lambda i: host[i]))

    @functools.cached_property
    def _unit_scale(self) -> jax.Array:
        return self.scalar(1.0)

    def scalar(self, value: float) -> jax.Array:
        """A number as the step takes it: float32, on all devices."""
        return jax.make_array_from_callback((), self.key_sharding, lambda i: np.float32(value))


def _abstract_like(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


class _Compiler:
    """Compiles the programs of a step for given arguments, each traced once; from several threads at a time.

    Args:
      step: whose programs.
      arguments: (state, batch, key, frozen, lr_scale), abstract.
    """

    def __init__(self, step: CompiledStep, arguments: tuple[Any, ...]):
        self._jitted = step._jitted
        self._arguments = arguments
        self._judges, self._rest = step._split_state(arguments[0])
        self._gradients: Future = Future()  # abstract CriticGradients, known when that program is traced
        self._half: Future = Future()  # abstract HalfStep

    def compile(self, name: str) -> Any:
        """The compiled program; waits for what the trace of another one tells."""
        # Two programs' outputs are inputs of others: their shapes are handed on as soon as they are traced.
        tells = {CRITICS: self._gradients, UPDATE: self._half}.get(name)
        try:
            traced = self._jitted[name].trace(*self._arguments_of(name))
        except BaseException as e:
            if tells is not None and not tells.done():
                tells.set_exception(e)
            raise
        if tells is not None and not tells.done():
            out = traced.out_info if name == CRITICS else traced.out_info[1]
            tells.set_result(jax.tree.map(_abstract_like, out))
        # Lowering holds Python's lock, compiling does not: two programs overlap.
        compiled = traced.lower().compile()
        release_memory()
        return compiled

    def _arguments_of(self, name: str) -> tuple[Any, ...]:
        _, batch, key, frozen, scale = self._arguments
        if name == CRITICS:
            return self._judges, self._rest, batch, key, frozen
        if name == R1:
            return self._judges, self._rest, self._gradients.result(), batch, key, frozen
        if name == UPDATE:
            return self._judges, self._rest, self._gradients.result(), scale
        if name == GENERATOR:
            return self._rest, self._judges, self._half.result(), batch, key, frozen, scale
        return self._arguments

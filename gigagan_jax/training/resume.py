"""How a run goes on from its newest checkpoint, and what it says and records of that which changed meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.config import OWN_FIELDS, Config, changed_fields, to_dict
from gigagan_jax.data.pipeline import Pipeline
from gigagan_jax.telemetry.history import record_event
from gigagan_jax.training import losses
from gigagan_jax.training.fine_tuning import InitFrom
from gigagan_jax.training.health.recovery import HealthGuard
from gigagan_jax.training.state import GanState

_log = logging.getLogger(__name__)


class _Run(Protocol):
    """What is needed of a `loop.Run`."""

    config: Config
    accept: frozenset[str]
    init_from: InitFrom | None

    @property
    def workdir(self) -> Path: ...

    def abstract_state(self) -> GanState: ...


def resume(
    run: _Run, checkpoints: Checkpoints, data: Pipeline, identities: Mapping[str, str], guard: HealthGuard
) -> tuple[GanState, int] | None:
    """Restores the newest intact checkpoint, and brings the data to its position.

    Args:
      run: that goes on.
      checkpoints: of its workdir.
      data: is moved to the position of the checkpoint.
      identities: {role: SHA-256} of the frozen networks.
      guard: gets back the judgement of earlier steps.

    Returns:
      (state, step); None without a checkpoint

    Raises:
      UserError: a damaged checkpoint, other frozen networks, or other data that the user did not accept.
    """
    step = checkpoints.latest_valid_step()
    if step is None:
        return None
    _log.info("resume: restoring checkpoint %d", step)
    # Launchers run the same command again.
    if run.init_from is not None:
        _log.info("--init_from=%s was for the start: the run goes on from its own checkpoint", run.init_from.path)
    checkpoints.check_frozen(step, identities)
    # Not config.json, which has the new settings as soon as they were accepted once.
    before = checkpoints.read_config(step)
    # From the example after the last one trained on: none is lost, none comes twice. A converted checkpoint may have
    # no position. Before the state: other data is refused at once.
    position = checkpoints.data_position(step)
    is_new_data = bool(position) and data.restore(position, accept_data="data" in run.accept)
    warn_of_rising_rates(before, run.config)
    state, _ = checkpoints.restore(step, run.abstract_state())
    images = int(state.images)
    warn_of_moved_ramps(before, run.config, images)
    _record_settings(run, before, step, images)
    if is_new_data:
        _record_data(run, position, data.state(), step, images)
    # Checkpoints written before there was a monitor have no entry for it.
    guard.monitor.restore(position.get("health"))
    return state, step


def _record_data(run: _Run, before: Mapping[str, Any], now: Mapping[str, Any], step: int, images: int) -> None:
    """Says and records that another data set took the place of the checkpoint's."""
    # States of before have no number of examples.
    old, new = ({"identity": x["source"], "examples": x.get("examples")} for x in (before, now))
    _log.warning(
        "the data set is another one from step %d on, as --accept=data allows: %s -> %s examples in a new order; the first epoch "
        "over them begins at image %d",
        step,
        "?" if old["examples"] is None else old["examples"],
        new["examples"],
        now["examples_seen"],
    )
    # The others have found the same: one writer keeps the lines whole.
    if jax.process_index() == 0:
        record_event(run.workdir, "data", step=step, images=images, old=old, new=new)


def _record_settings(run: _Run, before: Config, step: int, images: int) -> None:
    """Says and records what differs from the settings that the checkpoint was written with."""
    # Paths and readers may differ between the machines of one run.
    changes = [c for c in changed_fields(to_dict(before), run.config) if c.name not in OWN_FIELDS]
    if not changes:
        return
    _log.info("settings changed since step %d: %s", step, "; ".join(map(str, changes)))
    if jax.process_index() == 0:
        # Both values: config.json of before is gone.
        fields = {c.name: [c.stored, c.current] for c in changes}
        record_event(run.workdir, "settings", step=step, images=images, fields=fields)


def warn_of_rising_rates(before: Config, now: Config) -> None:
    """A longer run moves the end of a learning rate's decay: what had fallen may rise again."""
    # A rate that is constant knows no length.
    for name, optimizer in (("G", now.g_optimizer), ("D", now.d_optimizer), ("V", now.v_optimizer)):
        if optimizer.decay_kimg and before.total_kimg < now.total_kimg:
            _log.warning(
                "total_kimg was %g and is now %g: the learning rate of %s, which decays over the last %g kimg, may rise",
                before.total_kimg,
                now.total_kimg,
                name,
                optimizer.decay_kimg,
            )


def warn_of_moved_ramps(before: Config, now: Config, images: int) -> None:
    """A run of another length, or with other ends, has its ramps elsewhere: a weight of the loss may jump at the resume."""
    end = lambda config: config.loss.ramp_kimg or config.total_kimg
    was, new = (losses.ramped_weights(config, images) for config in (before, now))
    # By what the step computes: a moved end that both are past changes nothing.
    jumps = [f"loss.{name} from {was[name]:.5g} to {x:.5g}" for name, x in new.items() if x != was[name]]
    if not jumps:
        return
    if all(getattr(before.loss, name) == getattr(now.loss, name) for name in new):
        _log.warning(
            "weights jump at this resume, %.10g kimg into the run: %s; their ramps ended at %.10g kimg and now end at %.10g: "
            "--config.loss.ramp_kimg=%.10g keeps the old ramps",
            images / 1000,
            ", ".join(jumps),
            end(before),
            end(now),
            end(before),
        )
    else:
        # Asked for: no length of the ramps would undo it.
        _log.warning("weights jump at this resume, %.10g kimg into the run: %s", images / 1000, ", ".join(jumps))

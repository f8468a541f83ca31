"""Checks before the first step that all processes of a run have the same config, data and workdir."""

import json
import time
from collections.abc import Mapping
from typing import Any

import jax

from gigagan_jax.checkpoint.run_folder import Place, RunFolder
from gigagan_jax.config import OWN_FIELDS, Config, flatten_fields, to_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel import communication

# A network disk may show the write of another machine this late.
_VISIBILITY_SECONDS = 120.0


def assert_same_on_all_processes(
    config: Config, identity: str, workdir: Place, seconds: float = _VISIBILITY_SECONDS
) -> None:
    """Compares this process with process 0.

    Args:
      config: config of this process
      identity: identity of its data set
      workdir: workdir of the run, which process 0 has locked (run_lock.py)
      seconds: time to wait until the heartbeat of process 0 is visible

    Raises:
      UserError: another config, other data, or another folder of the same name.
    """
    if jax.process_count() == 1:
        return
    place = RunFolder.open(workdir)
    own_values = _comparable_values(config, identity)
    # The broadcast is collective: every process reaches it, whatever its config says.
    main_values, run = communication.broadcast_from_main([own_values, place.read_run()])
    names = sorted(k for k in own_values.keys() | main_values.keys() if own_values.get(k) != main_values.get(k))
    if names:
        # Eight fields fit in a message; with another config file hundreds can differ.
        differing = "; ".join(f"{k} is {own_values.get(k)} here and {main_values.get(k)} there" for k in names[:8])
        raise UserError(
            f"process {jax.process_index()} differs from process 0: {differing}; start all with the same config and the same data"
        )
    # The run id is random: only a process that sees the same folder can read it.
    deadline = time.monotonic() + seconds
    while place.read_run() != run:
        if time.monotonic() > deadline:
            raise UserError(
                f"--workdir={place} of process {jax.process_index()} is not that of process 0: it must be in a bucket, or on a "
                "disk that all machines have mounted"
            )
        time.sleep(0.5)


def _comparable_values(config: Config, identity: str) -> dict[str, Any]:
    # OWN_FIELDS (paths, workers) may differ between the machines; identities cover their content.
    values = {f"config.{k}": v for k, v in flatten_fields(to_dict(config)).items() if k not in OWN_FIELDS}
    # Through JSON, as the broadcast sends it: a tuple must compare equal to a list.
    return json.loads(json.dumps(values | {"the data": identity}))


def check_same_frozen(stored: Mapping[str, str], identities: Mapping[str, str], where: str) -> None:
    """Raises UserError where a model was trained with other weights of a frozen network than those of `identities`."""
    for role, identity in identities.items():
        if role in stored and stored[role] != identity:
            raise UserError(
                f"{where} was trained with other weights of the frozen network {role!r} (SHA-256 {stored[role][:12]}..., now "
                f"{identity[:12]}...): use the network it was trained with, or a new --workdir"
            )

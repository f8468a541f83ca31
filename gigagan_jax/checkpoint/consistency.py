"""Are all processes of a run about to do the same? Where they are not, it is said before the first step."""

import json
import time
from pathlib import Path
from typing import Any

import jax

from gigagan_jax.checkpoint import run_lock
from gigagan_jax.config import OWN_FIELDS, Config, flatten, to_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel import communication

_SEEN_SECONDS = 120.0  # until a network disk shows what another machine has written


def check(config: Config, identity: str, workdir: Path, seconds: float = _SEEN_SECONDS) -> None:
    """Compares this process with process 0.

    Args:
      config: of this process
      identity: of its data set
      workdir: of the run, held by process 0 (run_lock.py)
      seconds: to wait for what process 0 has written there

    Raises:
      UserError: another config, other data, or another folder of the same name.
    """
    if jax.process_count() == 1:
        return
    mine = _said(config, identity)
    theirs, run = communication.from_zero([mine, run_lock.read(workdir).get("run")])
    names = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    if names:
        told = "; ".join(f"{k} is {mine.get(k)} here and {theirs.get(k)} there" for k in names[:8])
        raise UserError(
            f"process {jax.process_index()} differs from process 0: {told}; start all with the same config and the same data"
        )
    end = time.monotonic() + seconds
    while run_lock.read(workdir).get("run") != run:
        if time.monotonic() > end:
            raise UserError(
                f"--workdir={workdir} of process {jax.process_index()} is not that of process 0: it must lie on a disk that all "
                "machines have mounted"
            )
        time.sleep(0.5)


def _said(config: Config, identity: str) -> dict[str, Any]:
    values = {f"config.{k}": v for k, v in flatten(to_dict(config)).items() if k not in OWN_FIELDS}
    return json.loads(json.dumps(values | {"the data": identity}))

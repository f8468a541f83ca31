"""What a checkpoint that could not be written means for the run: whose fault it is, and what mends it."""

from __future__ import annotations

import contextlib
import errno

import jax

from gigagan_jax.checkpoint.object_store import ObjectStore
from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.checkpoint.step_folders import BucketSteps
from gigagan_jax.core.errors import Unreachable, UserError, error_chain, first_line, is_transient

# On a disk more space mends them: a full disk, or a quota that is used up.
_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}


class DiskFull(UserError):
    """A checkpoint had no room on its disk."""


def write_error(place: RunFolder, location: str, error: BaseException, known: int | None) -> Exception:
    """The error that a run ends with.

    Args:
      place: of the run.
      location: of its checkpoints.
      error: what Orbax, TensorStore, the system or a client of a bucket raised.
      known: step of the newest checkpoint in a bucket that this process knows to be complete.
    """
    if isinstance(error, UserError):
        return error
    # A lost process: the state could not be copied, or a collective of the save failed. The disk is not the cause.
    if any(isinstance(e, jax.errors.JaxRuntimeError) or "Gloo" in str(e) for e in error_chain(error)):
        return jax.errors.JaxRuntimeError(first_line(error))
    # ENOTEMPTY: another machine reads the old checkpoint that is being deleted, or its entries reappear meanwhile.
    if isinstance(error, TimeoutError) or is_transient(error) or getattr(error, "errno", None) == errno.ENOTEMPTY:
        return Unreachable(
            f"cannot write a checkpoint to {location} now: {first_line(error)}; the same command goes on"
        )
    if place.store is not None:
        return _bucket_write_error(place, location, error, known)
    # TensorStore reports both as ValueError, with the words of the system.
    chain = error_chain(error)
    is_full = any(getattr(e, "errno", None) in _FULL or any(text in str(e) for text in _FULL.values()) for e in chain)
    return (DiskFull if is_full else UserError)(
        f"cannot write a checkpoint to {location}: {first_line(error)}; free some space or mend the folder, "
        "and run the same command again"
    )


def _bucket_write_error(place: RunFolder, location: str, error: BaseException, known: int | None) -> UserError:
    """The line about a checkpoint that could not be written to a bucket.

    Args:
      place: of the run.
      location: of its checkpoints.
      error: what Orbax, TensorStore or a client raised.
      known: step of the newest checkpoint that this process knows to be complete.
    """
    why = first_line(error)[:300]
    if known is None:
        # The server may be away, which may be why this is asked for.
        with contextlib.suppress(UserError, OSError):
            known = max(BucketSteps(ObjectStore(place.address, retry_seconds=5.0)).all_steps(), default=None)
    good = "there is none before it" if known is None else f"the last complete one is of step {known}"
    kind = UserError if any(mark in why for mark in ("PERMISSION_DENIED", "Forbidden", "403")) else Unreachable
    mend = (
        "check the rights of this machine (docs/pods.md)"
        if kind is UserError
        else "check the network and the credentials"
    )
    return kind(f"cannot write a checkpoint to {location}: {why}; {good}; {mend}, and run the same command again")

"""Breaks runs in a bucket on this machine, and looks whether they keep what docs/pods.md promises.

    python tools/measure_bucket.py kills [--count=20] [--processes=1] [--faults=0.1] [--results=FILE]
    python tools/measure_bucket.py locks [--count=20] [--results=FILE]
    python tools/measure_bucket.py size [--gigabytes=1] [--results=FILE]

kills: a run of configs/digits.py:tiny is killed at random moments and inside saves, by SIGKILL and SIGTERM in turn, and resumed;
its end is compared bit for bit with a run in a folder that nobody disturbed. --faults makes this share of all requests fail.
locks: two runs of one workdir are started within a second of each other. size: what a save of a large state sends and holds.
Each result is a line of FILE. The servers come with the extra `test`.
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google_server import google_server

from gigagan_jax import cli
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.progress import ProgressBar

ROOT = Path(__file__).parents[1]
CONFIG = "configs/digits.py:tiny"
# Steps of 16 images between two checkpoints.
INTERVAL = 4
_IMAGES = 16
# Seconds: no life of a run takes longer.
_LIMIT = 600.0


@dataclasses.dataclass
class Job:
    """One start of a run: its processes, and what they print.

    Attributes:
      children: one a process of the run.
      log: what process 0 prints, of all starts.
    """

    children: list[subprocess.Popen]
    log: Path

    def signal(self, number: int) -> None:
        """To all processes, as a machine that goes away."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def wait(self, seconds: float = _LIMIT) -> list[int]:
        """Exit codes; what is left after `seconds` is killed."""
        try:
            return [child.wait(seconds) for child in self.children]
        finally:
            for child in self.children:
                child.kill()


def start(
    workdir: str | Path, log: Path, steps: int, environment: Mapping[str, str], processes: int = 1, *flags: str
) -> Job:
    """Starts the run of a workdir."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gigagan_jax.train", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
    command += [f"--config.total_kimg={steps * _IMAGES / 1000}", "--config.snapshot_kimg=10", "--config.evaluators=()"]
    command += [f"--config.checkpoint_kimg={INTERVAL * _IMAGES / 1000}", "--config.checkpoint.wait=True"]
    children = []
    for i in range(processes):
        joined = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}")
        with open(log if i == 0 else log.with_suffix(f".{i}.log"), "a") as out:
            children.append(
                subprocess.Popen(
                    [*command, *(joined if processes > 1 else ())],
                    cwd=ROOT,
                    env=os.environ | dict(environment) | {"PYTHONPATH": str(ROOT)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    return Job(children, log)


def finished_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints in the folder of a server."""
    return sorted(int(p.parent.name) for p in checkpoints.glob("*/commit_success.txt") if p.parent.name.isdecimal())


def is_saving(checkpoints: Path) -> bool:
    """Whether the folder of a server has a checkpoint that is half written."""
    steps = [p for p in checkpoints.glob("*") if p.name.isdecimal()]
    return any(not (p / "commit_success.txt").exists() for p in steps)


def kill_at_random(
    workdir: str,
    mirror: Path,
    log: Path,
    environment: Mapping[str, str],
    *,
    kills: int,
    steps: int,
    processes: int = 1,
    seed: int = 0,
) -> dict[str, int]:
    """Kills the run of a workdir again and again, and lets it end.

    Args:
      workdir: address of the run.
      mirror: folder of the server that holds its objects.
      log: file for what the run prints.
      environment: of the server.
      kills: so many, alternately SIGKILL and SIGTERM; every other pair inside a save.
      steps: length of the run.
      processes: of the run.
      seed: of the moments.

    Returns:
      {"kills", "inside a save", "lives"}

    Raises:
      UserError: a life of the run failed by itself.
    """
    rng = random.Random(seed)
    inside = lives = 0
    checkpoints = mirror / "checkpoints"
    progress = ProgressBar("kills", kills)
    done = 0
    while done < kills:
        number = signal.SIGKILL if done % 2 == 0 else signal.SIGTERM
        in_save = done // 2 % 2 == 0
        before = max(finished_steps(checkpoints), default=0)
        # The first lives leave room for all kills.
        goal = min(before + rng.randint(1, INTERVAL), steps - INTERVAL)
        job = start(workdir, log, steps, environment, processes)
        lives += 1
        deadline = time.monotonic() + _LIMIT
        while job.children[0].poll() is None:
            if time.monotonic() > deadline:
                job.wait(0.0)
                raise UserError(f"the run did not get on within {_LIMIT:.0f} s: see {log}")
            if is_saving(checkpoints) if in_save else max(finished_steps(checkpoints), default=0) >= goal:
                break
            time.sleep(0.002)
        if job.children[0].poll() is not None:
            codes = job.wait()
            if any(codes):
                raise UserError(f"the run ended with {codes} before it was killed: see {log}")
            break
        time.sleep(rng.uniform(0.0, 0.1 if in_save else 0.3))
        inside += is_saving(checkpoints)
        job.signal(number)
        job.wait()
        done += 1
        progress.step()
    codes = start(workdir, log, steps, environment, processes).wait()
    if any(codes):
        raise UserError(f"the run ended with {codes}: see {log}")
    return {"kills": done, "inside a save": inside, "lives": lives + 1}


def same_end(a: Path, b: Path) -> bool:
    """Whether the newest checkpoints of two workdirs are equal bit for bit, positions in the data included."""
    import jax

    from gigagan_jax.checkpoint.manager import Checkpoints, states_equal, with_shardings
    from gigagan_jax.config import MeshConfig
    from gigagan_jax.parallel import sharding
    from gigagan_jax.training.state import Networks

    ends = []
    for workdir in (a, b):
        checkpoints = Checkpoints(workdir)
        step = checkpoints.require_valid_step()
        networks = Networks(checkpoints.read_config(step))
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        ends.append(checkpoints.restore(step, with_shardings(networks.abstract(), networks.shardings(mesh))))
        checkpoints.close()
    (state_a, data_a), (state_b, data_b) = ends
    return states_equal(state_a, state_b) and all(data_a[k] == data_b[k] for k in ("examples_seen", "seed", "source"))


def logged_steps(workdir: Path) -> list[int]:
    """Steps of metrics.jsonl, parts included."""
    from gigagan_jax.core.files import read_json_lines

    return [line["step"] for line in read_json_lines(workdir / "metrics.jsonl")]


def measure_kills(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`kills`"""
    steps = INTERVAL * (args.count + 3)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    whole = folder / "whole"
    if any(start(whole, folder / "whole.log", steps, cache, args.processes).wait()):
        raise UserError(f"the undisturbed run failed: see {folder / 'whole.log'}")
    began = time.monotonic()
    shares = ("503", "429", "cut", "lost", "slow")
    faults = {kind: args.faults / len(shares) for kind in shares} if args.faults else None
    with google_server(folder / "server", faults) as server:
        mirror = server.folder / server.bucket / "runs" / "cut"
        counts = kill_at_random(
            "gs://bucket/runs/cut",
            mirror,
            folder / "cut.log",
            server.environment() | cache,
            kills=args.count,
            steps=steps,
            processes=args.processes,
        )
        requests = server.proxy.counts if server.proxy else {}
    return {
        "what": "kills",
        "processes": args.processes,
        "faults": args.faults,
        **counts,
        "requests that failed": sum(n for kind, n in requests.items() if kind),
        "requests": sum(requests.values()),
        "bit for bit": same_end(whole, mirror),
        "each step logged once": logged_steps(mirror) == list(range(1, steps + 1)),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def measure_locks(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`locks`"""
    rng = random.Random(0)
    began = time.monotonic()
    trained, refused, both, none = 0, 0, 0, 0
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    progress = ProgressBar("pairs", args.count)
    with google_server(folder / "server") as server:
        for i in range(args.count):
            address, mirror = f"gs://bucket/runs/{i}", server.folder / server.bucket / "runs" / str(i)
            environment = server.environment() | cache
            # Long enough for both to be there at once.
            first = start(address, folder / f"{i}.a.log", 10 * INTERVAL, environment)
            time.sleep(rng.uniform(0.0, 1.0))
            second = start(address, folder / f"{i}.b.log", 10 * INTERVAL, environment)
            codes = first.wait() + second.wait()
            trained += codes.count(0)
            refused += codes.count(UserError.code)
            # Whoever ends without an error has trained, or found the run at its end.
            steps = logged_steps(mirror)
            both += steps != sorted(set(steps))
            none += 0 not in codes
            progress.step()
    return {
        "what": "locks",
        "pairs": args.count,
        "trained": trained,
        "refused": refused,
        "both at once": both,
        "neither": none,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def measure_size(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`size`"""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    import jax
    import jax.numpy as jnp
    import numpy as np

    from configs.digits import get_config
    from gigagan_jax.checkpoint.manager import Checkpoints, states_equal, with_shardings
    from gigagan_jax.checkpoint.run_folder import RunFolder
    from gigagan_jax.config import from_dict

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rows = round(args.gigabytes * 1e9 / 16 / 4096 / 4 / 8) * 8
    # Numbers that no compression makes smaller.
    make = jax.jit(lambda key: jax.random.bits(key, (rows, 4096), jnp.uint32), out_shardings=cut)
    state = {str(i): make(jax.random.key(i)) for i in range(16)}
    jax.block_until_ready(state)
    size = sum(x.nbytes for x in state.values())
    config = from_dict(get_config("tiny"))
    with google_server(folder / "server", counting=True) as server:
        place = RunFolder.open("gs://bucket/runs/size")
        checkpoints = Checkpoints(place, config)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        checkpoints.save(1, state, {}, config)
        checkpoints.wait_until_finished()
        seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        time.sleep(1.0)  # the count is that of a moment ago
        sent = server.proxy.sent_bytes if server.proxy else 0
        scratch = sum(p.stat().st_size for p in place.folder.rglob("*") if p.is_file())
        checkpoints.close()
        checkpoints = Checkpoints(place)
        back = checkpoints.restore_stored(1, with_shardings(jax.eval_shape(lambda: state), dict.fromkeys(state, cut)))
        checkpoints.close()
    return {
        "what": "size",
        "state, bytes": size,
        "sent / state": round(sent / size, 5),
        "scratch, bytes": scratch,
        "host memory above the state / state": round(peak * 1024 / size, 2),
        "seconds": round(seconds, 1),
        "read back equal": states_equal(state, back),
    }


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code: 1 where a promise was broken."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"kills": measure_kills, "locks": measure_locks, "size": measure_size}
    parser.add_argument("what", choices=measures)
    parser.add_argument("--count", type=int, default=20, help="kills, or pairs of runs (20)")
    parser.add_argument("--processes", type=int, default=1, help="of the run that is killed (1)")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that fail (0)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the state (1)")
    parser.add_argument("--results", type=Path, help="a line of JSON is added")
    parser.add_argument("--keep", type=Path, help="folder for the runs and the server, which stays")
    args = parser.parse_args(argv)
    folder = args.keep.resolve() if args.keep else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    result = measures[args.what](args, folder)
    text = json.dumps(result)
    print(text)
    if args.results:
        with open(args.results, "a") as out:
            out.write(text + "\n")
    broken = [k for k in ("both at once", "neither") if result.get(k)]
    broken += [k for k in ("bit for bit", "each step logged once", "read back equal") if result.get(k) is False]
    # What went wrong is in the logs.
    if not broken and not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bool(broken))


if __name__ == "__main__":
    cli.main(verb)

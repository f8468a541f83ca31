"""What one of several processes has noticed reaches all, in the same step."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Asked three times; the second process has a signal the second time.
SCRIPT = """
import argparse
from gigagan_jax.config import MeshConfig
from gigagan_jax.parallel import cluster, communication, sharding

parser = argparse.ArgumentParser()
cluster.add_flags(parser)
args = parser.parse_args()
cluster.join_processes(args)
agreement = communication.Agreement(sharding.make_mesh(MeshConfig()))
print([int(agreement.all_max(15 if args.process_id and k == 1 else 0)) for k in range(3)])
"""


def test_a_signal_to_one_of_two_processes_is_known_to_both():
    # A port that is free now.
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-c", SCRIPT, f"--coordinator={address}", "--num_processes=2"]
    how = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*command, f"--process_id={i}"], **how) for i in range(2)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    # Both see the signal in the second call, and not in the third.
    assert [out.splitlines()[-1] for out, _ in outputs] == ["[0, 15, 0]"] * 2

"""The manifest against Kubernetes' and JobSet's schemas; how --distributed finds the others where a launcher starts it."""

import os
import re
import socket
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from tests.launch.test_launch_commands import GOLDEN, IN_BUCKET, TRAINING

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.33"  # of GKE's channels


def closed(required=(), **properties):
    """A schema of an object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = closed(("name",), name={"type": "string"}, namespace={"type": "string"}, annotations=STRINGS, labels=STRINGS)
COUNT = {"type": "integer", "minimum": 0}
# The part of jobset.x-k8s.io/v1alpha2 that is used here; a Job's spec in it is Kubernetes' own.
JOBSET = closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=METADATA,
    spec=closed(
        ("replicatedJobs",),
        failurePolicy=closed(
            maxRestarts=COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={
                "type": "array",
                "items": closed(
                    ("name", "action"),
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons={
                        "type": "array",
                        "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]},
                    },
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": closed(
                ("name", "template"),
                name={"type": "string"},
                replicas=COUNT,
                template=closed(("spec",), metadata=METADATA, spec={"type": "object"}),
            ),
        },
    ),
)


def check(manifest):
    """Raises where the manifest is not what the cluster takes."""
    jsonschema.validate(manifest, JOBSET)
    for part in manifest["spec"]["replicatedJobs"]:
        name = f"{manifest['metadata']['name']}-{part['name']}-0"
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": part["template"]["spec"]}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def manifest(name):
    return yaml.safe_load((GOLDEN / f"{name}.txt").read_text())


def pod(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "name, slices, hosts, chips, flags, volumes",
    [
        ("gke_bucket", 2, 32, 4, TRAINING, {"disk", "shared-memory"}),
        ("gke_claim_spot", 1, 1, 4, TRAINING, {"disk", "shared-memory"}),
        ("gke_workdir_in_bucket", 1, 32, 4, IN_BUCKET, {"shared-memory"}),
    ],
)
def test_the_manifest_is_valid_and_passes_the_flags_as_they_are(name, slices, hosts, chips, flags, volumes):
    given = manifest(name)
    check(given)
    part = given["spec"]["replicatedJobs"][0]
    job = part["template"]["spec"]
    assert (part["replicas"], job["parallelism"], job["completions"]) == (slices, hosts, hosts)
    (container,) = pod(given)["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["command"] == ["python", "-m", "gigagan_jax.train"]
    as_kubernetes_expands = [a.replace("$$(", "$(") for a in container["args"]]
    assert as_kubernetes_expands == [*flags, "--distributed"]
    assert {v["name"] for v in pod(given)["volumes"]} == volumes
    assert {m["name"] for m in container["volumeMounts"]} == volumes
    assert ("cloud.google.com/gke-spot" in pod(given)["nodeSelector"]) == name.endswith("spot")


def test_the_manifest_starts_all_again_but_not_after_bad_input():
    spec = manifest("gke_bucket")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [2]}}
    assert job["backoffLimit"] == 0
    (policy,) = spec["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] == 100


@pytest.mark.parametrize(
    "path, value",
    [
        (("kind",), "Jobset"),
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "replicatedJobs", 0, "replicas"), "2"),
        (("spec", "replicatedJobs", 0, "template", "spec", "parallelism"), "32"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containrs"), []),
        (("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCode"), {}),
    ],
)
def test_the_schema_sees_a_mistake(path, value):
    given = manifest("gke_bucket")
    place = given
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(given)


# ------------------------------------------------------------------------------------------------ finding the others


@pytest.fixture
def no_cluster(monkeypatch):
    """Neither SLURM nor a TPU in the environment."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "OMPI_")):
            monkeypatch.delenv(name)
    return monkeypatch


def found():
    """(name of the cluster, address of process 0, processes, number of this one)"""
    cluster = next(c for c in clusters.ClusterEnv._cluster_types if not c.opt_in_only_method and c.is_env_present())
    address = cluster.get_coordinator_address(5, None)
    return cluster.name, address, cluster.get_process_count(), cluster.get_process_id()


def test_a_gke_pod_finds_its_slice_by_what_gke_gives_it(no_cluster):
    no_cluster.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    # Set by GKE in every pod of an indexed Job that asks for google.com/tpu.
    given = {"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "localhost,b,c,d", "TPU_SKIP_MDS_QUERY": "true"}
    for name, value in given.items():
        no_cluster.setenv(name, value)
    for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID"):
        no_cluster.setenv(f"MEGASCALE_{name}", "")  # otherwise the metadata server is asked
    assert found() == ("gketpu", "localhost:8482", 4, 3)
    for name, value in {"COORDINATOR_ADDRESS": "localhost:8080", "NUM_SLICES": "2", "SLICE_ID": "1"}.items():
        no_cluster.setenv(f"MEGASCALE_{name}", value)
    assert found() == ("gketpu", "localhost:8482", 8, 7)


def test_a_slurm_task_finds_the_first_node_and_its_own_gpu(no_cluster):
    # srun of 4 nodes with 8 tasks each, as launch/slurm.sh asks for.
    given = {"JOB_ID": "5000", "STEP_NODELIST": "gpu[003-006]", "NTASKS": "32", "PROCID": "13", "LOCALID": "5"}
    for name, value in given.items():
        no_cluster.setenv(f"SLURM_{name}", value)
    assert found() == ("slurm", f"gpu003:{5000 % 4096 + 61440}", 32, 13)
    assert clusters.SlurmCluster.get_local_process_id() == 5


def test_two_slurm_tasks_join(stand):
    """launch/slurm.sbatch starts two real processes, which join by what srun tells them and nothing else."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = stand.folder / "join.py"
    script.write_text(
        "import argparse, sys, jax\n"
        "from gigagan_jax.parallel import cluster\n"
        "parser = argparse.ArgumentParser()\n"
        "cluster.add_flags(parser)\n"
        "cluster.join_processes(parser.parse_known_args()[0])\n"
        # In one write: the two share a pipe, and an unbuffered print writes word by word.
        "sys.stdout.write(f'{jax.process_index()} {jax.process_count()}\\n')\n"
    )
    # `python -m gigagan_jax.train FLAGS`: the joining of it, without the training.
    python = stand.program("joins", f'shift 2; PYTHONPATH={ROOT} exec "{sys.executable}" "{script}" "$@"\n')
    srun = """
    while [[ $1 == --* ]]; do shift; done
    export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
    for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
    for task in "${tasks[@]}"; do wait "$task" || code=$?; done
    exit "${code:-0}"
    """
    stand.program("srun", srun)
    environment = {"SLURM_JOB_ID": "17", "JAX_COORDINATOR_PORT": str(port), "PYTHON": str(python), "RESTARTS": "0"}
    environment |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = stand.run("bash", "launch/slurm.sbatch", *TRAINING, **environment)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 2", "1 2"]


def test_the_images_and_the_machines_install_extras_that_there_are():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, first in (("Dockerfile.tpu", "tpu"), ("Dockerfile.gpu", "cuda"), ("tpu_vm_worker.sh", "tpu")):
        (named,) = re.findall(rf"\[({first}[a-z0-9,]*)\]", (ROOT / "launch" / name).read_text())
        assert set(named.split(",")) <= set(extras)
        # For data and workdirs in a bucket.
        assert "gcs" in named.split(",")

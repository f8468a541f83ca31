"""What each launcher would run, compared with golden files; bad input; shellcheck and hadolint.

GOLDEN=write python -m pytest tests/launch/test_launch_commands.py     writes the golden files anew
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
AWKWARD = ("--config.data.path=gs://b/{00..10}.tar", """--config.name=it's $(HOME) `x` * "y" \\""", "--config.seed=0")
TRAINING = ("--config=configs/laion.py", "--workdir=/mnt/gigagan/run 1", *AWKWARD)
IN_BUCKET = ("--config=configs/laion.py", "--workdir=gs://bucket/run 1", *AWKWARD)
TPU = ("--name=pod", "--zone=us-east5-a", "--topology=v5p:4x4x8")
GKE = ("--name=pod", "--image=registry.example/gigagan:1", "--topology=v5p:4x4x8")
XPK = ("--name=pod", "--cluster=c", "--zone=us-east5-a", "--image=registry.example/gigagan:1")
DRY_RUNS = {
    "local": ("local.sh", "--dry-run", *TRAINING),
    "tpu_vm_run": ("tpu_vm.sh", "run", "--dry-run", *TPU, "--spot", "--mount=gs://bucket", *TRAINING),
    "tpu_vm_workdir_in_bucket": ("tpu_vm.sh", "run", "--dry-run", *TPU, *IN_BUCKET),
    "tpu_vm_keep_two_slices": (
        *("tpu_vm.sh", "keep", "--dry-run", "--name=pod", "--zone=us-west4-a", "--topology", "v5e:16x16", "--slices=2"),
        *("--project=p", "--repo=https://example.com/gigagan_jax.git", "--commit=v1", "--mount=10.0.0.2:/share"),
        *TRAINING,
    ),
    "tpu_vm_direct": (
        *("tpu_vm.sh", "run", "--dry-run", "--direct", "--name=one", "--zone=us-central2-b", "--topology=v4:2x2x1"),
        *("--config", "configs/digits.py", "--workdir", "/home/me/runs", "--config.seed", "1"),
    ),
    "tpu_vm_status": ("tpu_vm.sh", "status", "--dry-run", "--name=pod", "--zone=us-east5-a"),
    "tpu_vm_stop": ("tpu_vm.sh", "stop", "--dry-run", "--name=pod", "--zone=us-east5-a"),
    "tpu_vm_delete": ("tpu_vm.sh", "delete", "--dry-run", "--name=pod", "--zone=us-east5-a"),
    "gke_bucket": ("gke.sh", "--dry-run", *GKE, "--slices=2", "--bucket=bucket", "--namespace=gan", *TRAINING),
    "gke_workdir_in_bucket": ("gke.sh", "--dry-run", *GKE, *IN_BUCKET),
    "gke_claim_spot": (
        *("gke.sh", "--dry-run", "--name=one", "--image=registry.example/gigagan:1", "--topology=v6e:2x2", "--spot"),
        *("--claim=filestore", *TRAINING),
    ),
    "xpk": ("xpk.sh", "--dry-run", *XPK, "--topology=v6e-256", "--slices=2", *TRAINING),
    "xpk_workdir_in_bucket": ("xpk.sh", "--dry-run", *XPK, "--topology=v6e-256", *IN_BUCKET),
    "slurm": (
        *("slurm.sh", "--dry-run", "--name=gan", "--nodes=4", "--gpus=8", "--cpus=12", "--time=1-00:00:00"),
        *("--partition=h100", "--sbatch=--signal=TERM@600", *TRAINING, "--", "--heartbeat_seconds=60"),
    ),
}


def launch(*arguments, path=None):
    environment = dict(os.environ) if path is None else {"PATH": path}
    command = [shutil.which("bash"), f"launch/{arguments[0]}", *arguments[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory):
    """A PATH with what every machine has; gcloud, kubectl, xpk and sbatch are not on it."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("bash", "dirname", "sed", "git"):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_what_it_would_run(name, bare_path):
    done = launch(*DRY_RUNS[name], path=bare_path)
    assert (done.returncode, done.stderr) == (0, "")
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(done.stdout)
    assert done.stdout == file.read_text(), "GOLDEN=write writes it anew"


def test_every_golden_file_is_compared():
    assert {f.stem for f in GOLDEN.iterdir()} == set(DRY_RUNS)


def commands(name):
    """The commands of a golden file, as a shell reads them."""
    lines = (GOLDEN / f"{name}.txt").read_text().splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def trainer(name):
    """The arguments that reach the trainer, through the shells in between."""
    if name == "local":
        return commands(name)[0]
    if name == "slurm":
        (words,) = commands(name)
        return words[words.index("launch/slurm.sbatch") + 1 :]
    if name.startswith("xpk"):
        (words,) = commands(name)
        return shlex.split(words[-1].removeprefix("--command=").replace("$$(", "$("))  # as Kubernetes does
    starts = [w[-1].removeprefix("--command=") for w in commands(name) if "tpu_vm_worker.sh start" in w[-1]]
    return shlex.split(starts[0])


@pytest.mark.parametrize(
    "name, flags",
    [
        *((name, TRAINING) for name in ("local", "tpu_vm_run", "tpu_vm_keep_two_slices", "xpk", "slurm")),
        *((name, IN_BUCKET) for name in ("tpu_vm_workdir_in_bucket", "xpk_workdir_in_bucket")),
    ],
)
def test_the_flags_reach_the_trainer_as_they_are(name, flags):
    words = trainer(name)
    first = words.index(flags[0])
    assert tuple(words[first : first + len(flags)]) == flags
    # Elsewhere what starts it on a machine adds it.
    assert (words[-1] == "--distributed") == name.startswith("xpk")


@pytest.mark.parametrize("name", ["tpu_vm_workdir_in_bucket", "gke_workdir_in_bucket", "xpk_workdir_in_bucket"])
def test_a_workdir_in_a_bucket_mounts_nothing(name):
    text = (GOLDEN / f"{name}.txt").read_text()
    assert "gs://bucket/run 1" in text
    assert "/mnt/gigagan" not in text
    assert "gcsfuse.csi" not in text


@pytest.mark.parametrize("workdir", ["gs://bucket/runs/1", "s3://bucket/runs/1"])
def test_one_process_of_slurm_may_have_its_workdir_in_any_bucket(workdir, bare_path):
    given = ("slurm.sh", "--dry-run", "--name=gan", "--gpus=1", "--config=c.py", f"--workdir={workdir}")
    done = launch(*given, path=bare_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"--workdir={workdir}" in done.stdout


def test_a_disk_may_be_mounted_beside_a_workdir_in_a_bucket(bare_path):
    """For files that are only read."""
    done = launch("gke.sh", "--dry-run", *GKE, *IN_BUCKET, "--bucket=networks", path=bare_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bucketName: networks" in done.stdout
    done = launch("tpu_vm.sh", "run", "--dry-run", *TPU, *IN_BUCKET, "--mount=gs://networks", path=bare_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tpu_vm_worker.sh install gs://networks" in done.stdout


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("tpu_vm.sh",), "a verb comes first"),
        (("tpu_vm.sh", "go", *TPU), "not 'go'"),
        (("tpu_vm.sh", "delete"), "--name=... is needed"),
        (("tpu_vm.sh", "delete", "--name=pod"), "--zone=... is needed"),
        (("tpu_vm.sh", "delete", "--name=Pod", "--zone=z"), "lower-case"),
        (("tpu_vm.sh", "delete", "--name"), "--name needs a value"),
        (("tpu_vm.sh", "create", "--name=pod", "--zone=z"), "--topology=... is needed"),
        (("tpu_vm.sh", "create", "--name=pod", "--zone=z", "--topology=v9:4x4"), "unknown chip v9"),
        (("tpu_vm.sh", "create", "--name=pod", "--zone=z", "--topology=v5p"), "a colon and the shape"),
        (("tpu_vm.sh", "create", "--name=pod", "--zone=z", "--topology=v5p-129"), "a power of two"),
        (("tpu_vm.sh", "create", "--name=pod", "--zone=z", "--topology=v5e-24"), "a power of two"),
        (("tpu_vm.sh", "create", "--name=pod", "--zone=z", "--topology=v5p:4x4"), "written like 4x4x8"),
        (("tpu_vm.sh", "create", *TPU, "--slices=0"), "--slices=0: must be a whole number"),
        (("tpu_vm.sh", "create", *TPU, "--slices=2", "--direct"), "leave out --direct"),
        (("tpu_vm.sh", "create", *TPU, "--spot=1"), "--spot takes no value"),
        (("tpu_vm.sh", "create", *TPU, "--spot", "--reserved"), "exclude each other"),
        (("tpu_vm.sh", "create", *TPU, "--zonne=z"), "unknown flag --zonne"),
        (("tpu_vm.sh", "create", *TPU, "extra"), "extra: flags are written"),
        (("tpu_vm.sh", "create", *TPU), "gcloud is not installed"),
        (("tpu_vm.sh", "install", "--dry-run", *TPU, "--mount=bucket"), "write gs://BUCKET"),
        (("tpu_vm.sh", "install", "--dry-run", *TPU, "--commit=nonesuch"), "no such commit"),
        (("tpu_vm.sh", "run", *TPU), "--config=FILE.py is needed"),
        (("tpu_vm.sh", "run", *TPU, "--config=c.py"), "--workdir=gs://BUCKET/DIR is needed"),
        (("tpu_vm.sh", "run", *TPU, "--config=c.py", "--workdir=gs://b"), "name a folder in the bucket too"),
        (("tpu_vm.sh", "run", *TPU, "--config=c.py", "--workdir=gs://b/"), "name a folder in the bucket too"),
        (("tpu_vm.sh", "run", *TPU, "--config=c.py", "--workdir=s3://b/x"), "only a run of one process"),
        (("slurm.sh", "--name=gan", "--gpus=2", "--config=c.py", "--workdir=s3://b/x"), "only a run of one process"),
        (("tpu_vm.sh", "run", *TPU, "--config=c.py", "--workdir=hdfs://b/x"), "use gs://BUCKET/DIR or a folder"),
        (("tpu_vm.sh", "run", *TPU, "--config=c.py", "--workdir=runs"), "or the whole path"),
        (("tpu_vm.sh", "run", *TPU, "--config=c.py", "--workdir=/r", "--mount=gs://b"), "is at /mnt/gigagan"),
        (("tpu_vm.sh", "run", *TPU, "--config=c.py", "--workdir=/r", "--config.x=a\nb"), "a line break"),
        (("gke.sh", "--name=pod", "--topology=v5e:4x4"), "--image=... is needed"),
        (("gke.sh", *GKE, *TRAINING), "needs --claim=NAME or --bucket=NAME"),
        (("gke.sh", *GKE, *TRAINING, "--claim=a", "--bucket=b"), "exclude each other"),
        (("gke.sh", *GKE, *IN_BUCKET, "--claim=a", "--bucket=b"), "exclude each other"),
        (("gke.sh", *GKE, *IN_BUCKET), "kubectl is not installed"),
        (("gke.sh", *GKE, *TRAINING, "--claim=a: b"), "letters, digits"),
        (("gke.sh", *GKE, *TRAINING, "--claim=a", "--chips_per_host=3"), "does not divide the 128 chips"),
        (("gke.sh", *GKE, *TRAINING, "--claim=a"), "kubectl is not installed"),
        (("xpk.sh", "--name=pod", "--topology=v6e:4x4", *TRAINING), "--cluster=... is needed"),
        (("xpk.sh", *XPK, "--topology=v6e:4x4", *TRAINING), "xpk is not installed"),
        (("slurm.sh", "--name=gan", *TRAINING), "--gpus=... is needed"),
        (("slurm.sh", "--name=gan", "--gpus=x", *TRAINING), "--gpus=x: must be a whole number"),
        (("slurm.sh", "--name=gan", "--gpus=8", *TRAINING), "sbatch is not installed"),
    ],
)
def test_bad_input_is_one_line(arguments, says, bare_path):
    done = launch(*arguments, path=bare_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 + says.count("\n")
    assert says in done.stderr


@pytest.mark.parametrize(
    "topology, shape, hosts",
    [
        *(("v5p-128", "4x4x4", 16), ("v5p-256", "4x4x8", 32), ("v5p-32", "2x2x4", 4), ("v5p-8", "2x2x1", 1)),
        *(("v5e-256", "16x16", 64), ("v5litepod-32", "4x8", 8), ("v6e-4", "2x2", 1), ("v6e:1x1", "1x1", 1)),
        ("v4:4x4x16", "4x4x16", 64),
    ],
)
def test_a_slice_by_its_size_is_the_shape_that_is_sold(topology, shape, hosts, bare_path):
    done = launch("gke.sh", "--dry-run", *GKE, f"--topology={topology}", "--claim=c", *TRAINING, path=bare_path)
    assert f"gke-tpu-topology: {shape}\n" in done.stdout
    assert f"parallelism: {hosts}\n" in done.stdout


def documented():
    """The commands of the documentation that begin with a launcher."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for command in block.replace("\\\n", " ").splitlines():
                if re.match(r"(PYTHON=\S+ )?launch/", command):
                    yield command.partition("  #")[0].strip()


def test_the_documentation_has_commands_of_every_launcher():
    assert {c.split("launch/")[1].split()[0] for c in documented()} == {"tpu_vm.sh", "gke.sh", "xpk.sh", "slurm.sh"}


@pytest.mark.parametrize("command", list(documented()))
def test_a_command_of_the_documentation_is_right(command, bare_path):
    command = [shutil.which("bash"), "-c", f"{command} --dry-run"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": bare_path}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gke.sh", "xpk.sh", "slurm.sh"])
def test_help_is_the_comment_at_the_top(name, bare_path):
    done = launch(name, "--help", path=bare_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{name}" in done.stdout
    assert "set -euo" not in done.stdout
    assert "shellcheck" not in done.stdout


def tool(name):
    """A program that the test extra installs beside the interpreter."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])) or name


def test_shellcheck_finds_nothing():
    scripts = sorted(str(f) for f in (ROOT / "launch").iterdir() if f.suffix in (".sh", ".sbatch"))
    assert len(scripts) >= 8
    command = [tool("shellcheck"), "--severity=style", "--external-sources", f"--source-path={ROOT}", *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing_and_signals_reach_python():
    files = sorted((ROOT / "launch").glob("Dockerfile.*"))
    assert len(files) == 2
    done = subprocess.run([tool("hadolint"), "--no-color", *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for file in files:
        lines = file.read_text().splitlines()
        assert lines[-1] == 'ENTRYPOINT ["python", "-m", "gigagan_jax.train"]'  # no shell that keeps them
        copied = [w for line in lines if line.startswith("COPY") for w in line.split()[1:-1]]
        kept = (ROOT / ".dockerignore").read_text().splitlines()
        assert {f"!{c}" for c in copied} <= set(kept)
        assert all((ROOT / c).exists() for c in copied)


def test_flags_that_launchers_pass_on_are_flags_of_the_trainer():
    text = (ROOT / "launch" / "common.sh").read_text()
    named = set(" ".join(re.findall(r'^trainer_flags\+?="([^"]*)"', text, re.MULTILINE)).split())
    said = subprocess.run(
        [sys.executable, "-m", "gigagan_jax.train", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    known = set(re.findall(r"--([a-z_]+)", said.stdout))
    assert {"config", "workdir", "profile_steps"} <= named <= known

"""Starting again: after 75 and after a lost machine, not after 2; stand-ins for what is not on this machine."""

import os
import signal
import subprocess
import sys

import pytest

FLAGS = ("--config=configs/digits.py", "--workdir=/runs/a b", """--config.name=it's {1..3} * $HOME "x" \\""")
STALE = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "gone:8080"}
COUNT_STALE = 'env | grep -c ^MEGASCALE >>"$CALLS.stale" || true\n'


# ------------------------------------------------------------------------------------------------ one machine


@pytest.mark.parametrize(
    "ends, code", [((75, 75, 0), 0), ((2,), 2), ((75, 2), 2), ((1,), 1), ((130,), 130), ((75, 139), 139)]
)
def test_local_starts_again_after_75_alone(stand, ends_with, ends, code):
    python = stand.program("fake_python", COUNT_STALE + ends_with(*ends))
    done = stand.run("launch/local.sh", *FLAGS, PYTHON=str(python), **STALE)
    assert done.returncode == code, done.stderr
    assert stand.calls() == [["fake_python", "-m", "gigagan_jax.train", *FLAGS]] * len(ends)
    assert (stand.folder / "calls.stale").read_text() == "0\n" * len(ends)


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_local_passes_signals_on_and_waits(stand, tmp_path, sent, code):
    """The trainer saves, and is not started again, nor left behind."""
    names = {signal.SIGTERM: "TERM", signal.SIGINT: "INT"}
    body = f"""trap 'sleep 0.5; touch "{tmp_path}/saved"; exit {code}' {names[sent]}; touch "{tmp_path}/up"\n"""
    python = stand.program("fake_python", body + "while :; do sleep 0.1; done\n")
    environment = os.environ | {"PYTHON": str(python), "CALLS": f"{tmp_path}/calls"}
    # Where the tests run in the background Ctrl-C is ignored, and what is ignored from the start a shell cannot catch.
    unignored = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-S", "-c", unignored, "bash", "launch/local.sh", *FLAGS]
    child = subprocess.Popen(command, env=environment)
    while not (tmp_path / "up").exists():
        assert child.poll() is None
    child.send_signal(sent)
    assert child.wait(30) == code
    assert (tmp_path / "saved").exists()
    assert len(stand.calls()) == 1


# ------------------------------------------------------------------------------------------------ SLURM


def run_slurm(stand, **environment):
    job = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "12", "PYTHON": "/disk/python", "PAUSE_SECONDS": "0"}
    return stand.run("bash", "launch/slurm.sbatch", *FLAGS, **job, **STALE, **environment)


def test_slurm_runs_one_task_a_gpu_that_sees_all_gpus(stand):
    stand.program("srun", COUNT_STALE)
    assert run_slurm(stand).returncode == 0
    (call,) = stand.calls()
    assert call[call.index("/disk/python") :] == ["/disk/python", "-m", "gigagan_jax.train", *FLAGS, "--distributed"]
    # Tasks that see one GPU each would look for the one of their own number in vain.
    assert not any(w.startswith(("--gpus-per-task", "--gpu-bind", "--kill-on-bad-exit=1")) for w in call)
    assert "--cpus-per-task=12" in call  # srun does not take it over from the job
    assert (stand.folder / "calls.stale").read_text() == "0\n"


def test_slurm_goes_back_into_the_queue_after_75(stand, ends_with):
    stand.program("srun", ends_with(75))
    stand.program("squeue", "echo RUNNING\n")
    stand.program("scontrol")
    assert run_slurm(stand).returncode == 0
    assert [c[0] for c in stand.calls()] == ["srun", "squeue", "scontrol"]
    assert stand.calls("scontrol") == [["scontrol", "requeue", "17"]]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", ""])
def test_a_cancelled_job_stays_cancelled(stand, ends_with, state):
    stand.program("srun", ends_with(75))
    stand.program("squeue", f"echo {state}\n")
    stand.program("scontrol")
    assert run_slurm(stand).returncode == 75
    assert stand.calls("scontrol") == []


@pytest.mark.parametrize(
    "ends, code", [((2,), 2), ((130,), 130), ((1, 137, 0), 0), ((1, 2), 2), ((1, 1, 1), 1), ((137, 139, 143), 143)]
)
def test_slurm_starts_a_lost_process_again_so_many_times(stand, ends_with, ends, code):
    stand.program("srun", ends_with(*ends))
    assert run_slurm(stand, RESTARTS="2").returncode == code
    assert len(stand.calls("srun")) == len(ends)


def test_slurm_waits_for_its_tasks_when_it_is_told_to_end(stand, tmp_path):
    """scancel tells this script too; the tasks need their time."""
    stand.program("srun", f'touch "{tmp_path}/up"; sleep 1; exit 75\n')
    stand.program("squeue", "echo COMPLETING\n")
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": f"{tmp_path}/calls"}
    child = subprocess.Popen(["bash", "launch/slurm.sbatch", *FLAGS], env=environment | {"SLURM_JOB_ID": "17"})
    while not (tmp_path / "up").exists():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 75


def test_slurm_submits_with_the_environment_of_the_job(stand):
    stand.program("sbatch", 'echo "$RESTARTS $PYTHON"\n')
    done = stand.run("launch/slurm.sh", "--name=gan", "--gpus=2", "--restarts=5", *FLAGS, PYTHON="/disk/my python")
    assert (done.returncode, done.stdout) == (0, "5 /disk/my python\n")
    (call,) = stand.calls()
    assert {"--ntasks-per-node=2", "--gpus-per-node=2", "--nodes=1"} <= set(call)
    assert call[call.index("launch/slurm.sbatch") + 1 :] == list(FLAGS)


# ------------------------------------------------------------------------------------------------ TPU VMs

# A machine that gcloud reaches: a home folder here, with what it needs in place of the system's own programs.
GCLOUD = """
case $4 in
  describe) head -n1 "$MACHINE/states"; [ "$(wc -l <"$MACHINE/states")" = 1 ] || sed -i 1d "$MACHINE/states" ;;
  scp) cp "$5" "$MACHINE/home/${6#*:}" ;;
  ssh) for word in "$@"; do case $word in --command=*)
         cd "$MACHINE/home" && HOME=$MACHINE/home bash -c "${word#--command=}" || exit 1 ;; esac; done ;;
esac
"""
# What it changes of the system, it changes in a folder.
SUDO = """
words=()
for w in "$@"; do
  case $w in /etc/* | /usr/* | /mnt/*) w=$MACHINE$w ;; esac
  words+=("$w")
done
"${words[@]}"
"""
SYSTEMCTL = """
case $1 in
  cat) [ -e "$MACHINE/etc/systemd/system/gigagan.service" ] ;;
  restart) "$BASH" "$HOME/gigagan_run.sh" ;;
  show) case $* in
      *ActiveState*) head -n1 "$MACHINE/active" ;;
      *ExecMainCode*) echo 1 ;;
      *) echo "${EXIT_STATUS:-0}" ;;
    esac ;;
esac
"""
VENV = 'mkdir -p "$HOME/gigagan_venv/bin"; ln -sf "$MACHINE/../bin/fake_python" "$HOME/gigagan_venv/bin/python"\n'
TPU = ("--name=pod", "--zone=us-east5-a", "--topology=v5p:4x4x8")


@pytest.fixture
def machine(stand):
    """A slice of one machine, and nothing on it."""
    folder = stand.folder / "machine"
    for name in ("home/.local/bin", "etc/systemd/system", "etc/apt/sources.list.d", "usr/share/keyrings"):
        (folder / name).mkdir(parents=True)
    (folder / "states").write_text("ACTIVE\n")
    (folder / "active").write_text("active\n")
    stand.environment = {"MACHINE": str(folder), "LOOK_SECONDS": "0", "TMPDIR": str(stand.folder)}
    stand.program("gcloud", GCLOUD)
    stand.program("sudo", SUDO)
    stand.program("systemctl", SYSTEMCTL)
    stand.program("fake_python", COUNT_STALE)
    stand.program("uv", '[ "$1" != venv ] || ' + VENV)
    (folder / "home/.local/bin/uv").symlink_to(stand.folder / "bin/uv")
    for name in ("apt-get", "mount", "lsb_release", "curl", "tail"):
        stand.program(name)
    return folder


def test_a_tpu_vm_gets_the_code_of_the_commit_and_the_flags_as_they_are(stand, machine):
    done = stand.run("launch/tpu_vm.sh", "start", *TPU, *FLAGS)
    assert done.returncode == 1  # nothing is there yet
    done = stand.run("launch/tpu_vm.sh", "install", *TPU, "--mount=gs://bucket")
    assert done.returncode == 0, done.stderr
    assert (machine / "home/gigagan_jax/gigagan_jax/train.py").exists()
    assert stand.calls("uv")[-1][:3] == ["uv", "pip", "install"]
    assert stand.calls("uv")[-1][-1].endswith("/gigagan_jax[tpu,gcs]")
    assert "bucket /mnt/gigagan gcsfuse rw,_netdev" in (machine / "etc/fstab").read_text()
    done = stand.run("launch/tpu_vm.sh", "start", *TPU, *FLAGS, **STALE)
    assert done.returncode == 0, done.stderr
    assert stand.calls("python") == [["python", "-m", "gigagan_jax.train", *FLAGS, "--distributed"]]
    assert (stand.folder / "calls.stale").read_text() == "0\n"
    assert ["systemctl", "enable", "--quiet", "gigagan"] in stand.calls()


def test_the_service_starts_again_but_not_after_bad_input(stand, machine):
    assert stand.run("launch/tpu_vm.sh", "run", *TPU, *FLAGS).returncode == 0
    unit = (machine / "etc/systemd/system/gigagan.service").read_text()
    assert "\nRestart=on-failure\nRestartPreventExitStatus=2\n" in unit
    assert "\nRestartForceExitStatus=75 SIGTERM " in unit  # to systemd a signal is no failure
    assert "\nWantedBy=multi-user.target\n" in unit  # after a reboot too
    assert f"\nExecStart=/bin/bash {machine}/home/gigagan_run.sh\n" in unit
    script = (machine / "home/gigagan_run.sh").read_text()
    assert script.splitlines()[-1].startswith("exec ")  # SIGTERM reaches the trainer


def test_keep_makes_a_slice_anew_that_was_taken_away(stand, machine):
    """Asked for; there; taken away; asked for again and there; done."""
    (machine / "states").write_text("ACTIVE\nSUSPENDED\nACTIVE\nACTIVE\n")
    stand.program("fake_python", '[ "$(grep -ac ^python "$CALLS")" -lt 2 ] || echo inactive >"$MACHINE/active"\n')
    done = stand.run("launch/tpu_vm.sh", "keep", *TPU, "--spot", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "the training is done" in done.stderr
    verbs = [c[4] for c in stand.calls("gcloud")]
    assert [v for v in verbs if v in ("create", "delete")] == ["delete", "create"]
    assert len(stand.calls("python")) == 2


@pytest.fixture
def ended(stand, machine):
    """That machine with the code, and a training that ended with an exit code: ended("failed")"""
    (machine / "etc/systemd/system/gigagan.service").touch()
    assert stand.run("launch/tpu_vm.sh", "install", *TPU).returncode == 0
    return lambda state: (machine / "active").write_text(f"{state}\n")


def test_keep_starts_what_had_failed_once_and_says_its_exit_code(stand, ended):
    """The flags may be others than those that it failed with."""
    ended("failed")
    done = stand.run("launch/tpu_vm.sh", "keep", *TPU, *FLAGS, EXIT_STATUS="2")
    assert done.returncode == 1
    assert "error: the training ended with exit code 2" in done.stderr
    assert len(stand.calls("python")) == 1
    assert not any(c[4] == "delete" for c in stand.calls("gcloud"))


@pytest.mark.parametrize("status, word", [("75", "stopped"), ("15", "stopped"), ("0", "done")])
def test_a_training_that_saved_and_stopped_is_not_done(stand, ended, status, word):
    ended("inactive")
    done = stand.run("launch/tpu_vm.sh", "status", *TPU, EXIT_STATUS=status)
    assert done.stdout.splitlines()[-1] == word
    done = stand.run("launch/tpu_vm.sh", "keep", *TPU, *FLAGS, EXIT_STATUS=status)
    assert done.returncode == 0
    assert f"the training {'is done' if word == 'done' else 'was stopped'}" in done.stderr


def test_keep_waits_for_an_answer_about_its_machines(stand, ended):
    """No network, then there: nothing is asked for anew."""
    ended("inactive")
    silent = f'[ $(grep -ac "" "$CALLS") -gt 6 ] || {{ [ "$4" != describe ] || {{ echo "no route" >&2; exit 1; }}; }}\n{GCLOUD}'
    (stand.folder / "calls").write_text("")
    stand.program("gcloud", silent)
    done = stand.run("launch/tpu_vm.sh", "keep", *TPU, *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "no route" in done.stderr
    assert "the training is done" in done.stderr
    assert not any(c[4] in ("create", "delete") for c in stand.calls("gcloud"))


def test_a_machine_that_is_not_given_is_said(stand, machine):
    (machine / "states").write_text("FAILED\n")
    done = stand.run("launch/tpu_vm.sh", "run", *TPU, *FLAGS)
    assert done.returncode == 1
    assert done.stderr == "error: pod is FAILED: delete it and create it again\n"
    assert [c[4] for c in stand.calls("gcloud")] == ["create", "describe"]

"""The launch files, run with stand-ins for srun, scontrol, mpirun, ssh and gcloud: what each process is started with,
and what JAX's own detection makes of it."""

import importlib
import inspect
import itertools
import json
import operator
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from typing import NamedTuple

import pytest
import yaml
from absl import flags
from jax._src.clusters import k8s_cluster

from crossover_jax.islands.roster import check_name
from experiments import flags as train_flags
from experiments import island, processes  # noqa: F401  # island: its flags
from experiments.launch import local
from experiments.settings import check_settings

pytestmark = pytest.mark.tools
ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "experiments/launch"
SHELL = [LAUNCH / name for name in ("slurm.sbatch", "openmpi.sh", "by_hand.sh", "tpu_pod.sh")]
ISLAND_SHELL = [LAUNCH / name for name in ("islands.sbatch", "spot.sh")]
ISLAND_YAML = LAUNCH / "islands.yaml"
YAML = [LAUNCH / name for name in ("indexed_job.yaml", "jobset.yaml", "jobset_tpu.yaml")]
TEXT = "\n".join(
    path.read_text() for path in [*SHELL, *YAML, *ISLAND_SHELL, ISLAND_YAML]
)  # comments too: they recommend flags
CACHE = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
SUBMITTED = {"PATH": "", "SHARED": "/shared", "REPO": str(ROOT), "WORKDIR": "/shared/runs/a run"}


class Process(NamedTuple):
    args: list[str]  # of train.py
    env: dict[str, str]


# Stand-ins: each writes down how it was called


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A folder of commands that write down their arguments and environment."""
    folder, called = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("called")
    script = folder / "python"
    script.write_text(
        f"#!/bin/sh\nout=$(/usr/bin/mktemp {called}/XXXXXX)\n"
        '{ /usr/bin/env -0; printf \'\\001\'; printf \'%s\\0\' "$0" "$@"; } > "$out"\n'
        'case "$0" in */srun) exit "${SRUN_ENDS:-0}";; esac\n'
    )
    script.chmod(0o755)
    for name in ("srun", "scontrol", "mpirun", "ssh", "gcloud"):
        (folder / name).symlink_to(script)
    (folder / "called").symlink_to(called)
    return folder


def calls(stub, command, env, code=0):
    """Run `command`, which ends with `code`, with no environment but `env`; its calls, `[(name, args, env), ...]`."""
    env = {**env, "PATH": f"{stub}:/usr/bin:/bin", "PYTHON": str(stub / "python")}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    found = []
    for path in sorted((stub / "called").iterdir()):
        before, after = path.read_bytes().decode().split("\1")
        name, *args = after.removesuffix("\0").split("\0")
        found.append((pathlib.Path(name).name, args, dict(x.split("=", 1) for x in before.split("\0") if x)))
        path.unlink()
    return found


def trained(command, program="train.py"):
    """The arguments of train.py, or of island.py, in a command of python."""
    python, script, *args = command
    assert pathlib.Path(python).name == "python"
    assert (ROOT / script).resolve() == ROOT / "experiments" / program
    return args


# What each launcher then starts


def asked_of_slurm(file="slurm.sbatch"):
    """The options in a file, which sbatch reads up to the first command."""
    before, _ = (LAUNCH / file).read_text().split("\nset ", 1)
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", before, re.MULTILINE))


def slurm(stub):
    [(name, args, env)] = slurm_calls(stub)
    assert name == "srun"
    asked = asked_of_slurm()
    nodes, tasks = int(asked["nodes"]), int(asked["ntasks-per-node"])
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    first = next(i for i, arg in enumerate(args) if not arg.startswith("-"))
    assert "--distribution=block" in args[:first]  # so that task 0 is on the first node
    step = {"SLURM_STEP_NODELIST": f"node[001-{nodes:03}]", "SLURM_NTASKS": str(nodes * tasks)}
    step |= {"SLURM_STEP_NUM_TASKS": str(nodes * tasks), "SLURM_STEP_NUM_NODES": str(nodes)}
    return [
        Process(trained(args[first:]), env | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % tasks)})
        for i in range(nodes * tasks)
    ]


def slurm_calls(stub, code=0):
    """What slurm.sbatch calls if its tasks end with `code`."""
    asked = asked_of_slurm()
    env = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": asked["nodes"], "SRUN_ENDS": str(code)}
    env |= {"SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"], "SLURM_CPUS_PER_TASK": asked["cpus-per-task"]}
    return calls(stub, ["bash", LAUNCH / "slurm.sbatch"], SUBMITTED | env | {"SLURM_SUBMIT_DIR": str(ROOT)}, code)


def openmpi(stub, *, version=4):
    hosts = stub / "hosts"
    hosts.write_text("# two hosts\nalpha slots=8\nbeta slots=8\n")
    env = SUBMITTED | {"HOSTFILE": str(hosts), "GPUS": "8"}
    [(name, args, env)] = calls(stub, ["bash", LAUNCH / "openmpi.sh"], env)
    assert name == "mpirun"
    first = args.index("bash")
    options, command = args[:first], args[first:]
    size, each = int(options[options.index("-np") + 1]), int(re.search(r"ppr:(\d+):node", " ".join(options))[1])
    exported = {name: env[name] for flag, name in itertools.pairwise(options) if flag == "-x"}
    found = []
    for i in range(size):
        rank = {"OMPI_COMM_WORLD_SIZE": str(size), "OMPI_COMM_WORLD_RANK": str(i)}
        rank |= {"OMPI_COMM_WORLD_LOCAL_RANK": str(i % each)}
        if version == 4:  # and the address of mpirun's host, which is not that of process 0
            rank["OMPI_MCA_orte_hnp_uri"] = "1531576320.0;tcp://10.96.0.1:34911"
        [(name, args, env)] = calls(stub, command, exported | rank)
        found.append(Process(trained([name, *args]), env))
    return found


def by_hand(stub):
    called = calls(stub, ["bash", LAUNCH / "by_hand.sh"], SUBMITTED | {"HOSTS": "alpha beta"})
    assert {name for name, _, _ in called} == {"ssh"}
    found = []
    for _, [flag, host, command], _ in sorted(called, key=lambda call: call[1][1]):
        assert (flag, host) == ("-tt", ["alpha", "beta"][len(found)])
        env, *rest = shlex.split(command)  # as the shell of the other host does
        assert env == "env"
        variables = [x for x in rest if re.match(r"\w+=", x)]
        found.append(Process(trained(rest[len(variables) :]), dict(x.split("=", 1) for x in variables)))
    return found


def tpu_pod(stub, *, slices=2):
    env = SUBMITTED | {"PROJECT": "p", "ZONE": "z", "NAME": "n", "SLICES": str(slices)}
    [(name, args, _)] = calls(stub, ["bash", LAUNCH / "tpu_pod.sh", "run"], env)
    assert name == "gcloud"
    assert {"--node=all", "--worker=all", f"--batch-size={slices * 64}"} <= set(args)  # all at once, or none can start
    [command] = [arg.removeprefix("--command=") for arg in args if arg.startswith("--command=")]
    [(name, args, env)] = calls(stub, ["bash", "-c", f"{command} wait"], {"HOME": str(stub)})
    metadata = {"worker-network-endpoints": ",".join(f"::10.0.0.{i}" for i in range(64))}
    megascale = "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.0'\nMEGASCALE_NUM_SLICES: '{}'\nMEGASCALE_SLICE_ID: '{}'"
    return [
        Process(
            trained([name, *args]),
            env
            | {
                "TEST_METADATA": json.dumps(
                    metadata
                    | {
                        "agent-worker-number": str(i),
                        "tpu-env": megascale.format(slices, s) if slices > 1 else "A: 'b'",
                    }
                )
            },
        )
        for s in range(slices)
        for i in range(64)
    ]


def documents(path):
    text = path.read_text().replace("${IMAGE}", "an/image").replace("${CLAIM}", "a-claim").replace("${RUN}", "a-run")
    return list(yaml.safe_load_all(text))


def pods(path):
    """`(index of the replica, index in the job, container)` of every pod."""
    spec = documents(path)[-1]["spec"]
    for job in spec.get("replicatedJobs", [{"replicas": 1, "template": {"spec": spec}}]):
        inner = job["template"]["spec"]
        [container] = inner["template"]["spec"]["containers"]
        for replica in range(job["replicas"]):
            yield from ((replica, i, container) for i in range(inner["completions"]))


def kubernetes(stub, path, env_of=lambda replica, i: {}):
    found = []
    for replica, i, container in pods(path):
        env = {x["name"]: x["value"] for x in container["env"]}
        env |= {"JOB_COMPLETION_INDEX": str(i), "KUBERNETES_SERVICE_HOST": "10.0.0.1"} | env_of(replica, i)
        command = [*container["command"], *container["args"]]
        if not found or "process_id" in " ".join(command):  # all pods of a TPU slice run one and the same
            [(name, args, _)] = calls(stub, command, env)
        found.append(Process(trained([name, *args]), env))
    return found


def gke(replica, i):
    hosts = ",".join(f"crossover-slice-{replica}-{k}.crossover" for k in range(64))
    megascale = {"MEGASCALE_COORDINATOR_ADDRESS": "crossover-slice-0-0.crossover", "MEGASCALE_NUM_SLICES": "2"}
    return megascale | {"MEGASCALE_SLICE_ID": str(replica), "TPU_WORKER_ID": str(i), "TPU_WORKER_HOSTNAMES": hosts}


class Started(NamedTuple):
    start: object
    processes: int
    devices: int  # of one process
    workers: int
    address: str
    one_device: bool = False  # each process sees one device of its host, by its local index


STARTED = {
    "slurm": Started(slurm, 64, 1, 8, f"node001:{4242 % 4096 + 61440}", one_device=True),
    "openmpi 4": Started(openmpi, 16, 1, 2, "alpha:8476", one_device=True),
    "openmpi 5": Started(lambda stub: openmpi(stub, version=5), 16, 1, 2, "alpha:8476", one_device=True),
    "by hand": Started(by_hand, 2, 8, 2, "alpha:8476"),
    "one TPU slice": Started(lambda stub: tpu_pod(stub, slices=1), 64, 4, 1, "10.0.0.0:8482"),
    "TPU slices": Started(tpu_pod, 128, 4, 2, "10.0.0.0:8482"),
    "indexed job": Started(lambda stub: kubernetes(stub, YAML[0]), 8, 8, 8, "crossover-0.crossover:8476"),
    "JobSet": Started(lambda stub: kubernetes(stub, YAML[1]), 8, 8, 8, "crossover-host-0-0.crossover:8476"),
    "GKE": Started(lambda stub: kubernetes(stub, YAML[2], gke), 128, 4, 2, "crossover-slice-0-0.crossover:8482"),
}

# Run by a fresh interpreter: the resolution of JAX itself, without the service and the client that it would start.
JOIN = """
import contextlib, io, json, os, sys, types
import jax
from jax._src import distributed
from jax._src.clusters import cloud_tpu_cluster, cluster
from experiments import processes

found = {}
def client(address, process_id, **_):
    found["address"] = address
    return types.SimpleNamespace(connect=lambda: None)
distributed._jax = types.SimpleNamespace(
    get_distributed_runtime_service=lambda *_, **__: "service", get_distributed_runtime_client=client
)
distributed.State.initialize_preemption_sync_manager = lambda self: None
def get_metadata(key):
    metadata = json.loads(os.environ.get("TEST_METADATA", "{}"))
    return (metadata[key], 200) if key in metadata else ("", 404)
cloud_tpu_cluster.get_metadata = get_metadata
cloud_tpu_cluster.BaseTpuCluster.wait_for_coordinator = lambda *_: None

original = dict(os.environ)
for flags, env in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(original | env)
    on_tpu = "TEST_METADATA" in env or "TPU_WORKER_ID" in env
    cloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = on_tpu
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # set where there is no TPU
    jax.config.update("jax_cuda_visible_devices", "all")
    found.clear()
    state = distributed.State()
    jax.distributed.initialize = state.initialize
    try:
        processes.join(**flags)
        found |= {"id": state.process_id, "count": state.num_processes, "first": state.service is not None}
        found["devices"] = jax.config.read("jax_cuda_visible_devices")
    except Exception as error:
        found["error"] = repr(error)
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def launched(stub):
    """By name, every process that is started and what JAX then finds out in it."""
    found = {name: expected.start(stub) for name, expected in STARTED.items()}
    joined = iter(join([process for started in found.values() for process in started]))
    return {name: (started, [next(joined) for _ in started]) for name, started in found.items()}


def join(started):
    names = set(inspect.signature(processes.join).parameters)
    asked = [
        ({k: flags.FLAGS[k].parser.parse(v) for k, v in values(process.args).items() if k in names}, process.env)
        for process in started
    ]
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", JOIN], input=json.dumps(asked), env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def values(args):
    return dict(arg.removeprefix("--").split("=", 1) for arg in args)


@pytest.mark.parametrize("name", STARTED)
def test_every_process_has_flags_that_train_knows_and_joins_in_its_place(name, launched):
    expected = STARTED[name]
    started, joined = launched[name]
    assert len(started) == expected.processes
    namespace: dict = {}
    exec(train_flags.DEFAULT_CONFIG.read_text(), namespace)
    config = namespace["get_config"]()
    for args, env in started:
        for key, value in values(args).items():
            if key.startswith("config."):
                operator.attrgetter(key.removeprefix("config."))(config)
            elif key == "config":
                assert (ROOT / value).exists()
            else:
                flags.FLAGS[key].parser.parse(value)
        assert env.keys() >= CACHE
    first = values(started[0].args)
    assert int(first["config.num_workers"]) == expected.workers
    for batch_size in (int(first["config.batch_size"]), config.eval_batch_size):
        assert batch_size % (expected.processes * expected.devices) == 0
    assert [found.get("id", found) for found in joined] == list(range(expected.processes))
    assert [found["first"] for found in joined] == [i == 0 for i in range(expected.processes)]
    assert {(found["address"], found["count"]) for found in joined} == {(expected.address, expected.processes)}
    devices = [str(i % 8) if expected.one_device else "all" for i in range(expected.processes)]
    assert [found["devices"] for found in joined] == devices


@pytest.mark.parametrize("config", ["fashion_mnist", "imagenet_resnet50_crossover", "imagenet_resnet50_allreduce"])
@pytest.mark.parametrize("name", STARTED)
def test_a_launcher_sets_no_key_that_another_config_would_not_read(name, config, launched):
    found = importlib.import_module(f"experiments.configs.{config}").get_config()
    for key, value in values(launched[name][0][0].args).items():
        if key.startswith("config."):
            kind = type(operator.attrgetter(key.removeprefix("config."))(found))
            found.update_from_flattened_dict({key.removeprefix("config."): kind(value)})
    check_settings(found)


def test_what_follows_a_launchers_command_goes_to_train(stub):
    more = ["--config.crossover.during=True", "--config.seed=1 2"]
    env = SUBMITTED | {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "8", "SLURM_NTASKS_PER_NODE": "8"}
    env |= {"SLURM_CPUS_PER_TASK": "8", "SLURM_SUBMIT_DIR": str(ROOT), "PROJECT": "p", "ZONE": "z", "NAME": "n"}
    hosts = stub / "hosts"
    hosts.write_text("alpha slots=8\n")
    env |= {"HOSTFILE": str(hosts)}
    for path in SHELL:
        run = ["run"] if path.name == "tpu_pod.sh" else []
        own = {} if run else {"HOSTS": "alpha"}
        [(_, args, _)] = calls(stub, ["bash", path, *run, *more], env | own)
        words = [word for arg in args for word in (shlex.split(arg) if " " in arg else [arg])]
        assert "--config.crossover.during=True" in words, path.name
        assert "--config.seed=1 2" in args + words, path.name


@pytest.mark.parametrize("slices", [1, 2])
def test_a_queued_resource_has_as_many_nodes_as_slices(stub, slices):
    env = SUBMITTED | {"PROJECT": "p", "ZONE": "z", "NAME": "n", "SLICES": str(slices)}
    [(_, args, _)] = calls(stub, ["bash", LAUNCH / "tpu_pod.sh", "create"], env)
    assert ("--node-id=n" in args) == (slices == 1)
    assert ("--node-count=2" in args) == (slices == 2)


@pytest.mark.parametrize("path", [*SHELL, *ISLAND_SHELL], ids=lambda p: p.name)
def test_shell_files_stop_at_the_first_error(path):
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", path], check=True)


def test_a_host_that_fails_ends_the_others(tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\n[ "$2" = alpha ] && exec sleep 60\nexit 7\n')
    ssh.chmod(0o755)
    env = SUBMITTED | {"HOSTS": "alpha beta", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert subprocess.run(["bash", LAUNCH / "by_hand.sh"], env=env, timeout=30).returncode == 7


# Preempted: processes got SIGTERM, wrote a checkpoint and ended with 75


def test_all_mean_the_same_exit_code():
    assert processes.PREEMPTED == local.PREEMPTED == 75  # as the launch files have it


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (134, False), (137, False)])
def test_slurm_queues_a_job_again_if_it_was_preempted(code, requeued, stub):
    called = {name: args for name, args, _ in slurm_calls(stub, code)}
    assert called.pop("srun")
    assert called == ({"scontrol": ["requeue", "4242"]} if requeued else {})


def test_slurm_tells_the_tasks_before_the_time_is_up_and_lets_all_of_them_end(stub):
    asked = asked_of_slurm()
    who, seconds = asked["signal"].split("@")
    assert who == "TERM"  # "B:TERM" is for the batch shell alone
    assert int(seconds) >= 120
    assert "requeue" in asked
    assert asked["open-mode"] == "append"
    [(_, args, _)] = slurm_calls(stub)
    assert "--kill-on-bad-exit=0" in args
    [wait] = [arg.removeprefix("--wait=") for arg in args if arg.startswith("--wait=")]
    assert int(wait) >= 120


@pytest.mark.parametrize(("code", "both"), [(75, True), (7, False)])
def test_by_hand_a_host_that_was_preempted_lets_the_others_end(code, both, tmp_path):
    ssh, late = tmp_path / "ssh", tmp_path / "late"
    ssh.write_text(f'#!/bin/sh\n[ "$2" = alpha ] && exit {code}\nsleep 0.5\n: > "{late}"\nexit 1\n')
    ssh.chmod(0o755)
    env = SUBMITTED | {"HOSTS": "alpha beta", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert subprocess.run(["bash", LAUNCH / "by_hand.sh"], env=env, timeout=30).returncode == code
    assert late.exists() == both


def becomes(path, code):
    """What Kubernetes makes of a job one of whose pods ends with `code`."""
    [top] = [document["spec"] for document in documents(path) if document["kind"] != "Service"]
    jobs = [job["template"]["spec"] for job in top["replicatedJobs"]] if "replicatedJobs" in top else [top]
    found = set()
    for job in jobs:
        [container] = job["template"]["spec"]["containers"]
        action = "Count"
        for rule in reversed(job["podFailurePolicy"]["rules"]):  # the first that matches
            assert rule["onExitCodes"].keys() == {"containerName", "operator", "values"}
            assert (rule["onExitCodes"]["containerName"], rule["onExitCodes"]["operator"]) == (container["name"], "In")
            action = rule["action"] if code in rule["onExitCodes"]["values"] else action
        if action == "Ignore":
            found.add("pods are replaced")
            continue
        reason = {"FailJob": "PodFailurePolicy", "Count": "BackoffLimitExceeded"}[action]
        policy = top.get("failurePolicy", {"rules": []})
        actions = [rule["action"] for rule in policy["rules"] if reason in rule["onJobFailureReasons"]]
        assert policy.get("maxRestarts", 0) == 0
        found.add(actions[0] if actions else "fails")
    return found


@pytest.mark.parametrize("path", YAML, ids=lambda p: p.name)
def test_kubernetes_starts_all_pods_again_uncounted_if_they_were_preempted(path):
    assert becomes(path, 1) == becomes(path, 134) == becomes(path, 137) == {"fails"}
    again = "pods are replaced" if path == YAML[0] else "RestartJobSetAndIgnoreMaxRestarts"
    assert becomes(path, 75) == {again}


@pytest.mark.parametrize("path", YAML, ids=lambda p: p.name)
def test_kubernetes_tells_python_itself_and_gives_it_time(path):
    spec = documents(path)[-1]["spec"]
    for job in spec.get("replicatedJobs", [{"template": {"spec": spec}}]):
        pod = job["template"]["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= 120
        assert (
            "\nexec python " in pod["containers"][0]["args"][0]
        )  # else the shell would get SIGTERM, and not pass it on


@pytest.mark.parametrize("path", YAML, ids=lambda p: p.name)
def test_jobs_run_all_their_pods_at_once_and_are_found_where_jax_would_look(path, monkeypatch):
    *others, last = documents(path)
    replicated = last["spec"].get("replicatedJobs", [{"name": "", "replicas": 1, "template": last}])
    [job] = replicated
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    env = {x["name"]: x["value"] for x in container["env"]}
    assert container["image"] == "an/image"
    assert (spec["completionMode"], spec["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    assert spec["completions"] == spec["parallelism"]
    if "google.com/tpu" in container["resources"]["limits"]:
        x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
        assert spec["completions"] * container["resources"]["limits"]["google.com/tpu"] == x * y
        return
    assert int(env["NUM_PROCESSES"]) == job["replicas"] * spec["completions"]
    if last["kind"] == "Job":
        [service] = others
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"] == {"job-name": last["metadata"]["name"]}
        assert service["metadata"]["name"] == pod["subdomain"]
        name, labels = last["metadata"]["name"], {}
    else:  # a JobSet is its own service, and names its jobs
        assert not others
        name = f"{last['metadata']['name']}-{job['name']}-0"
        labels = {"jobset.sigs.k8s.io/jobset-name": last["metadata"]["name"]}
    meta = types.SimpleNamespace(metadata=types.SimpleNamespace(name=name, labels=labels))
    cluster = k8s_cluster.K8sCluster
    monkeypatch.setattr(cluster, "_controller", lambda: types.SimpleNamespace(kind="Job"))
    monkeypatch.setattr(cluster, "_job", lambda: meta)
    monkeypatch.setattr(
        cluster, "_pod", lambda: types.SimpleNamespace(spec=types.SimpleNamespace(subdomain=pod.get("subdomain")))
    )
    address = cluster.get_coordinator_address(timeout_secs=None, override_coordinator_port="8476")
    assert f"--coordinator={address} " in container["args"][0]


# Islands: each is started by itself, and again when it was lost


def slurm_island(stub, number=3, *more, code=0, restarts=0):
    """What islands.sbatch calls for one job of its array."""
    env = {"SLURM_JOB_ID": "4245", "SLURM_ARRAY_JOB_ID": "4242", "SLURM_ARRAY_TASK_ID": str(number)}
    env |= {"SLURM_ARRAY_TASK_COUNT": "8", "SLURMD_NODENAME": "node007", "SLURM_SUBMIT_DIR": str(ROOT)}
    env |= {"SLURM_CPUS_PER_TASK": "64", "SLURM_RESTART_COUNT": str(restarts), "SRUN_ENDS": str(code)}
    return calls(stub, ["bash", ISLAND_SHELL[0], *more], SUBMITTED | {"KEYS": "/shared/keys"} | env, code)


def spot_island(stub, number=3, *more):
    env = {"ROSTER": "/shared/roster", "KEYS": "/etc/island", "NAME": f"spot-{number}", "ADDRESS": "10.0.3.7:7000"}
    return calls(stub, ["bash", ISLAND_SHELL[1], *more], {"REPO": str(ROOT)} | env)


def island_job():
    return documents(ISLAND_YAML)[-1]["spec"]


def kubernetes_island(stub, number=3):
    [container] = island_job()["template"]["spec"]["containers"]
    env = {x["name"]: x["value"] for x in container["env"] if "value" in x}
    assert {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}} in container["env"]
    env |= {"ADDRESS": "10.0.3.7", "JOB_COMPLETION_INDEX": str(number)}
    return calls(stub, [*container["command"], *container["args"]], env)


ISLANDS = {  # what starts the third of eight islands, and the address at which the others reach it
    "slurm": (slurm_island, "node007:0"),
    "spot": (spot_island, "10.0.3.7:7000"),
    "kubernetes": (kubernetes_island, "10.0.3.7:7000"),
}


@pytest.mark.parametrize("config", ["fashion_mnist", "lm"])
@pytest.mark.parametrize("name", ISLANDS)
def test_every_island_has_flags_that_it_knows_and_a_name_a_folder_and_an_address_of_its_own(name, config, stub):
    start, address = ISLANDS[name]
    found = []
    for number in (3, 4):
        [(command, args, env)] = start(stub, number)
        if command == "srun":
            first = next(i for i, arg in enumerate(args) if not arg.startswith("-"))
            command, args = args[first], args[first + 1 :]
        args = trained([command, *args], "island.py")
        assert env.keys() >= CACHE
        found.append(values(args))
    one, other = found
    changed = importlib.import_module(f"experiments.configs.{config}").get_config()
    for key, value in one.items():
        if key.startswith("config."):
            kind = type(operator.attrgetter(key.removeprefix("config."))(changed))
            changed.update_from_flattened_dict({key.removeprefix("config."): kind(value)})
        elif key != "config":
            flags.FLAGS[key].parser.parse(value)
    check_settings(changed)
    assert changed.num_workers == 8
    assert changed.batch_size % changed.num_workers == 0
    own = {"name", "workdir"}
    assert {key: value for key, value in one.items() if key not in own} == {k: other[k] for k in other if k not in own}
    for flags_of, number in ((one, 3), (other, 4)):
        assert flags_of["name"].endswith(f"-{number}")
        assert flags_of["workdir"].endswith(f"/{flags_of['name']}")
        check_name(flags_of["name"])
    assert one["bind"] == address
    assert one["keys"]
    assert one.keys() >= {"roster", "config"}


@pytest.mark.parametrize("start", [slurm_island, spot_island])
def test_what_follows_an_islands_command_goes_to_it(start, stub):
    [(_, args, _)] = start(stub, 3, "--found=True", "--config.seed=1 2")
    assert args[-2:] == ["--found=True", "--config.seed=1 2"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (1, 0, False), (75, 0, True), (75, 99, True), (137, 0, True), (134, 19, True), (137, 20, False)],
)
def test_slurm_queues_one_island_again_and_not_the_array(code, restarts, requeued, stub):
    called = {name: args for name, args, _ in slurm_island(stub, code=code, restarts=restarts)}
    assert called.pop("srun")
    assert called == ({"scontrol": ["requeue", "4242_3"]} if requeued else {})


def test_slurm_needs_no_two_islands_at_once_and_tells_each_before_its_time_is_up():
    asked = asked_of_slurm("islands.sbatch")
    assert (asked["nodes"], asked["ntasks"]) == ("1", "1")
    first, last = map(int, asked["array"].split("-"))
    assert last - first + 1 == 8
    assert asked["output"].count("%a") == 1  # a file for each
    who, seconds = asked["signal"].split("@")
    assert who == "TERM"
    assert int(seconds) >= 120
    assert asked.keys() >= {"requeue", "open-mode"}


def what_becomes_of(code=None, condition=None):
    for rule in island_job()["podFailurePolicy"]["rules"]:  # the first that matches
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if codes and code in codes["values"]:
            assert codes == {"containerName": "island", "operator": "In", "values": sorted(codes["values"])}
            return rule["action"]
        if condition in [x["type"] for x in conditions]:
            return rule["action"]
    return "Count"


def test_kubernetes_replaces_an_island_alone_and_gives_up_none_for_another():
    spec = island_job()
    pod = spec["template"]["spec"]
    assert (spec["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")  # as podFailurePolicy needs
    assert "backoffLimit" not in spec  # of all pods together
    assert spec["backoffLimitPerIndex"] > 0
    assert what_becomes_of(75) == what_becomes_of(137, "DisruptionTarget") == "Ignore"
    assert what_becomes_of(1) == "FailIndex"
    assert what_becomes_of(137) == "Count"
    assert pod["terminationGracePeriodSeconds"] >= 120
    assert "\nexec python " in pod["containers"][0]["args"][0]  # else the shell would get SIGTERM, and not pass it on
    budget, _ = documents(ISLAND_YAML)
    assert budget["spec"]["selector"]["matchLabels"] == {"job-name": documents(ISLAND_YAML)[-1]["metadata"]["name"]}
    assert 0 < budget["spec"]["minAvailable"] < spec["completions"] == spec["parallelism"]


def test_a_pod_is_ready_that_has_made_a_step_and_has_its_keys_from_a_secret(stub, tmp_path):
    pod = island_job()["template"]["spec"]
    [container] = pod["containers"]
    [(_, args, _)] = kubernetes_island(stub)
    found = values(args[1:])
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounted[found["keys"]]]["secret"]["secretName"] == "islands"
    bash, option, probe = container["readinessProbe"]["exec"]["command"]
    assert found["step_log"] in probe
    here = probe.replace(found["step_log"], str(tmp_path / "steps"))
    assert subprocess.run([bash, option, here], capture_output=True).returncode == 1
    (tmp_path / "steps").write_text("a step\n")
    assert subprocess.run([bash, option, here], capture_output=True).returncode == 0
    os.utime(tmp_path / "steps", (0, 0))
    assert subprocess.run([bash, option, here], capture_output=True).returncode == 1


@pytest.fixture
def spot(tmp_path):
    """Start spot.sh, whose island's starts do one after the other what `todo` says: end with a code, or wait."""

    def start(*todo):
        script = tmp_path / "python"
        script.write_text(
            f"#!/bin/bash\ncd {tmp_path}\nset -- {' '.join(map(str, todo))}\nshift $(ls | grep -c ^start)\n"
            "trap 'exit 75' TERM\n: > start-$$\n"
            '[ "$1" = KILL ] && kill -KILL $$\n[ "$1" = wait ] || exit "$1"\n'
            "for _ in $(seq 1000); do sleep 0.05; done\n"
        )
        script.chmod(0o755)
        env = {"PATH": "/usr/bin:/bin", "PYTHON": str(script), "REPO": str(ROOT), "PAUSE": "0.1", "ROSTER": "r"}
        return subprocess.Popen(["bash", ISLAND_SHELL[1]], env=env | {"KEYS": "k", "NAME": "a", "ADDRESS": "b:1"})

    start.number = lambda: len(list(tmp_path.glob("start-*")))
    return start


@pytest.mark.parametrize(
    ("todo", "code", "starts"), [([0], 0, 1), ([1], 1, 1), (["KILL", 75, 0], 0, 3), ([139, 2], 2, 2)]
)
def test_a_spot_machine_starts_its_island_again_if_it_was_killed(todo, code, starts, spot):
    assert spot(*todo).wait(timeout=60) == code
    assert spot.number() == starts


def test_a_spot_machines_notice_ends_its_island_and_nothing_is_started_again(spot):
    process = spot("KILL", "wait")
    deadline = time.monotonic() + 30
    while spot.number() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # the stand-in has its trap
    process.terminate()
    assert process.wait(timeout=60) == 75
    assert spot.number() == 2


# Flags of the compilers

XLA = """
import jax, jax.numpy as jnp
from jax._src.lib import xla_client
options = xla_client.CompileOptions()
options.executable_build_options.debug_options
jnp.zeros(1)
print(options.SerializeAsString().hex(), jax.config.jax_compilation_cache_dir,
      jax.config.jax_persistent_cache_min_compile_time_secs)
"""
TPU = """
import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=SingleDeviceSharding(device))
jax.jit(lambda x: x + 1).lower(x).compile()
"""


def python(code, **env):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | env
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)


def test_xla_knows_the_flags_of_gpus_and_none_is_its_default():
    page = (ROOT / "docs" / "gpus.md").read_text()
    found = sorted(set(re.findall(r"--xla_gpu_\w+=\w+", TEXT + page)))
    assert len(found) > 3
    plain = python(XLA, XLA_FLAGS="")
    for flag in found:
        done = python(XLA, XLA_FLAGS=flag)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[0] != plain.stdout.split()[0]
    done = python(XLA, XLA_FLAGS="--xla_gpu_no_such_flag=true")
    assert done.returncode != 0
    assert "Unknown flag" in done.stderr


def test_libtpu_knows_the_flags_of_tpus():
    pytest.importorskip("libtpu")
    found = sorted(set(re.findall(r"--(?:xla_tpu|megascale)_\w+=\w+", TEXT)))
    assert found
    done = python(TPU, LIBTPU_INIT_ARGS=" ".join(found))
    assert done.returncode == 0, done.stderr
    done = python(TPU, LIBTPU_INIT_ARGS="--megascale_no_such_flag=1")
    assert done.returncode != 0
    assert "Unknown command line flag" in done.stderr


def test_jax_reads_where_the_compilation_cache_is():
    assert all(name in TEXT for name in CACHE)
    env = dict(zip(sorted(CACHE), ["/shared/jax-cache", "0"], strict=True))
    assert python(XLA, **env).stdout.split()[1:] == ["/shared/jax-cache", "0.0"]

"""The scripts and command lines that `cnclip launch` writes."""

import base64
import json
import subprocess
from pathlib import Path

import pytest

from pipeline.catalog import load
from pipeline.cli import main
from pipeline.core.records import ConfigError
from pipeline.launch.slurm import plan_jobs, write_scripts
from pipeline.rank import main as rank_main
from pipeline.rank import ranks_of_slurm, read_job
from training.ranks.launcher import failure, launcher_command

RUN = """
[run]
folder = "{folder}"
[corpus]
kind = "demo"
[model]
name = "ViT-B-16"
vocabulary = "bert-base-chinese"
[stage1]
recipe = "paper"
[stage2]
recipe = "paper"
[launch]
ranks_per_node = 8
partition = "gpu"
account = "clip"
setup = ["module load cuda"]
options = ["--exclusive"]
time_limit_minutes = 2880
"""


def write(folder: Path, text: str = RUN) -> str:
    path = folder / "my run.toml"
    path.write_text(text.format(folder=folder / "run"))
    return str(path)


def test_one_job_a_training_stage_each_after_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    run, _ = load(path)
    jobs = plan_jobs(run)
    assert [job.name for job in jobs] == ["prepare", "stage1", "stage2", "measure"]
    assert [stage for job in jobs for stage in job.stages] == [stage.name for stage in run.stages]
    assert main(["launch", path, "--set", "stage1.epochs=3"]) == 0
    folder = tmp_path / "run" / "launch"
    lines = (folder / "stage1.sbatch").read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {
        "--nodes=16",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=2-00:00:00",
        "--requeue",
        "--signal=TERM@300",
        "--partition=gpu",
        "--account=clip",
        "--exclusive",
    } <= options
    assert "module load cuda" in lines
    (command,) = [line for line in lines if " -m cnclip run " in line]
    assert command.endswith("--set stage1.epochs=3 --stage stage1 --set launch.launcher=srun &")
    assert f"'{path}'" in command  # quoted: the path has a space
    data = (folder / "prepare.sbatch").read_text()
    assert "--gpus" not in data
    assert "#SBATCH --signal=B:TERM@300" in data  # it has no tasks that Slurm could signal
    submit = (folder / "submit.sh").read_text()
    assert "stage2=$(sbatch --parsable --dependency=afterok:$stage1" in submit
    assert "--dependency" not in submit.splitlines()[3]
    for script in folder.iterdir():
        if script.suffix in (".sbatch", ".sh"):
            subprocess.run(["bash", "-n", str(script)], check=True)
    said = capsys.readouterr().out
    assert "torchrun --nnodes=16 --nproc-per-node=8 --rdzv-backend=c10d" in said
    assert f"-m pipeline.rank '{path}' stage1 stage1.epochs=3" in said
    assert "deepspeed --hostfile HOSTFILE --num_nodes 16 --num_accelerators 8 --module pipeline.rank" in said


def test_ranks_that_do_not_fill_machines_are_refused(tmp_path: Path) -> None:
    run, config = load(write(tmp_path), ["stage1.ranks=100"])
    with pytest.raises(ConfigError, match=r"\[stage1\] ranks = 100.* leaves 4 over: set ranks = 96 or 104"):
        write_scripts(run, config.launch, "my.toml", [])


def test_a_job_asks_for_a_gpu_a_rank(tmp_path: Path) -> None:
    path = write(tmp_path)
    stages = [f"{stage}.ranks=2" for stage in ("stage1", "stage2")]
    run, config = load(path, stages)
    write_scripts(run, config.launch, path, [])
    script = (tmp_path / "run" / "launch" / "stage1.sbatch").read_text()
    assert "--ntasks-per-node=2\n" in script
    assert "--gpus-per-node=2\n" in script
    run, config = load(path, [*stages, "launch.gpus_per_node=1"])
    with pytest.raises(ConfigError, match=r"gpus_per_node = 1, but \[stage1\] has 2 ranks on a machine"):
        write_scripts(run, config.launch, path, [])
    run, config = load(path, [*stages, "launch.gpus_per_node=0"])
    write_scripts(run, config.launch, path, [])
    assert "--gpus" not in (tmp_path / "run" / "launch" / "stage1.sbatch").read_text()


def options_of(folder: Path, job: str) -> set[str]:
    lines = (folder / "run" / "launch" / f"{job}.sbatch").read_text().splitlines()
    return {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}


def test_data_gets_processors_measuring_a_gpu_and_output_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path)
    cluster = ["launch.partition_prepare=cpu", "launch.memory_per_rank_gb=60", "launch.memory_prepare_gb=128"]
    run, config = load(path, cluster)
    write_scripts(run, config.launch, path, cluster)
    assert {"--partition=cpu", "--mem=128G"} <= options_of(tmp_path, "prepare")
    assert {"--partition=gpu", "--mem=480G", "--gpus-per-node=8"} <= options_of(tmp_path, "stage1")
    assert {"--partition=gpu", "--mem=128G", "--gpus-per-node=1"} <= options_of(tmp_path, "measure")
    for job in ("prepare", "stage1", "measure"):
        (output,) = [option for option in options_of(tmp_path, job) if option.startswith("--output=")]
        log = Path(output.removeprefix("--output="))
        assert log == tmp_path / "run" / "launch" / "logs" / f"{job}.log"
        assert log.parent.is_dir()
    run, config = load(path, [*cluster, "launch.gpus_measure=0"])
    write_scripts(run, config.launch, path, cluster)
    assert "--partition=cpu" in options_of(tmp_path, "measure")
    assert not any("gpus" in option for option in options_of(tmp_path, "measure"))


def test_memory_is_the_clusters_default_if_nothing_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path)
    run, config = load(path)
    write_scripts(run, config.launch, path, [])
    for job in ("prepare", "stage1", "stage2", "measure"):
        assert not any(option.startswith("--mem") for option in options_of(tmp_path, job))
        assert "--partition=gpu" in options_of(tmp_path, job)


def test_what_cannot_be_launched_is_refused(tmp_path: Path) -> None:
    run, config = load(write(tmp_path), ["run.folder=memory://run"])
    with pytest.raises(ConfigError, match="memory://run: scripts need a folder on a file system"):
        write_scripts(run, config.launch, "my.toml", [])
    with pytest.raises(ConfigError, match=r"launch.*stop_seconds = 60 must be less than time_limit_minutes"):
        load(write(tmp_path), ["launch.time_limit_minutes=1", "launch.stop_seconds=60"])


def test_a_rank_takes_its_place_from_slurm_where_nobody_else_says_it() -> None:
    slurm = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
    found = ranks_of_slurm({**slurm, "SLURM_TASKS_PER_NODE": "8(x2)"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("9", "16", "1")
    assert found["LOCAL_WORLD_SIZE"] == "8"
    uneven = {**slurm, "SLURM_TASKS_PER_NODE": "8(x2),4,2"}
    assert [
        ranks_of_slurm({**uneven, "SLURM_NODEID": str(node)})["LOCAL_WORLD_SIZE"] for node in range(4)
    ] == ["8", "8", "4", "2"]
    assert ranks_of_slurm({**slurm, "RANK": "0"}) == {}
    assert ranks_of_slurm({"PATH": "/bin"}) == {}


def test_a_rank_without_a_stage_that_trains_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ConfigError, match="no stage given"):
        read_job([path])
    with pytest.raises(ConfigError, match="shards is not a training stage"):
        read_job([path, "shards"])
    with pytest.raises(ConfigError, match="stage1 waits for corpus, shards; run those first"):
        read_job([path, "stage1", "stage1.epochs=3"])


def test_a_rank_that_nobody_started_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert rank_main() == 2
    assert "error: no RANK in the environment: start ranks with torchrun" in capsys.readouterr().err


def test_the_local_launcher_knows_its_ranks_and_srun_theirs() -> None:
    local = launcher_command("local", "pipeline.rank", "job.json", 3, 29500)
    (world,) = [word for word in local if word.startswith("--world_info=")]
    assert json.loads(base64.urlsafe_b64decode(world.partition("=")[2])) == {"localhost": [0, 1, 2]}
    assert launcher_command("srun", "pipeline.rank", "job.json", 3, 0)[:2] == ["srun", "--ntasks=3"]


@pytest.mark.parametrize(
    ("log", "status", "expected"),
    [
        ("error: a\nRuntimeError: Connection closed by peer", 1, "a (training"),
        ("1: error: of rank one", 1, "of rank one (training"),
        ("RuntimeError: Connection closed by peer\nbye", 247, "a rank was killed by SIGKILL and said"),
        ("starting", -9, "a rank was killed by SIGKILL"),
        ("error: of before\n=== ranks are started now\nwaiting", 247, "a rank was killed by SIGKILL"),
        ("rank 3 (process 7) was killed by SIGKILL", 247, "rank 3 (process 7) was killed by SIGKILL and"),
        (
            "srun: error: c7: task 5: Killed\nsrun: Force Terminated",
            143,
            "rank 5 on c7 was killed (Killed) and",
        ),
        ("srun: error: c7: tasks 0,2: Out Of Memory", 143, "rank 0,2 on c7 was killed (Out Of Memory) and"),
        ("starting\nlast words", 2, "last words (training ended with status 2"),
        ("", 2, "no output"),
    ],
)
def test_the_first_cause_is_told_and_not_its_echoes(
    tmp_path: Path, log: str, status: int, expected: str
) -> None:
    path = tmp_path / "train.log"
    path.write_text(log)
    assert failure(str(path), status).startswith(expected)

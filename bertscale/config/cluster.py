"""Slurm clusters, and pipelines of jobs on them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from bertscale.config.section import Section


class ClusterConfig(Section):
    """The facts of one site's Slurm cluster, or of one partition of it."""

    partition: str | None = Field(None, description="Partition; without it the cluster's default.")
    account: str | None = Field(None, description="Account that is charged.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Node features, such as a GPU's name.")
    sbatch: list[str] = Field([], description="Further sbatch options, each as --name=value.")
    srun: list[str] = Field([], description="Further srun options, such as those of a container plug-in.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs of a node; one rank runs on each of them.")
    tasks_per_node: int = Field(1, ge=1, description="Ranks of a node that has no GPU.")
    cpus_per_task: int = Field(1, ge=1, description="Cores of one rank.")
    memory_per_node: str | None = Field(None, description="As sbatch --mem reads it; 0 is all of a node's.")
    gpu_memory_gb: float | None = Field(None, gt=0, description="Memory of one GPU in GB (1e9 bytes).")
    time: str | None = Field(None, description="Time limit where none is given, such as 1-00:00:00.")
    signal_seconds: int = Field(
        300, ge=1, description="A job is told to save so many seconds before its time limit."
    )
    setup: list[str] = Field([], description="Shell lines of the batch script, such as `module load cuda`.")
    environment: dict[str, str] = Field(
        default_factory=dict, description="Variables of the job, such as NCCL_SOCKET_IFNAME."
    )
    container: list[str] = Field(
        [], description="Words before each rank's command, such as [apptainer, exec, --nv, bertscale.sif]."
    )
    python: str | None = Field(
        None, description="Python of the ranks, inside the container if any; without it this one."
    )
    batch_python: str | None = Field(
        None, description="Python (3.11 or later, nothing installed) of the batch host; without it `python`."
    )
    log_root: str | None = Field(None, description="Folder for logs; without it they lie with the job.")
    node_check: bool = Field(True, description="Each node is checked before ranks start on it.")
    check_seconds: float = Field(120, gt=0, description="A node that has not answered by then is left out.")
    min_free_memory_gb: float = Field(1, ge=0, description="A node with less free memory is left out.")
    min_free_disk_gb: float = Field(1, ge=0, description="Likewise, free space of its temporary folder.")
    min_bandwidth_mb: float = Field(
        0, ge=0, description="A node that exchanges fewer MB/s with its neighbours is left out."
    )
    bad_nodes: str | None = Field(
        None, description="File of nodes to avoid, shared by all jobs; failed checks add to it."
    )
    bad_node_hours: float = Field(24, gt=0, description="A node leaves that file after so many hours.")

    @field_validator("time", "memory_per_node", mode="before")
    @classmethod
    def _check_quotes(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 24:00:00 as a number to the base of 60
            raise ValueError(f"{value} is a number; put the value in quotes, as Slurm is to read it")
        return value

    @field_validator("environment")
    @classmethod
    def _check_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name of a variable")
        return environment

    @field_validator("sbatch", "srun")
    @classmethod
    def _check_options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not option.startswith("--") or any(character.isspace() for character in option):
                raise ValueError(f"{option!r} is not an option of the form --name=value")
        return options


class PipelineStage(Section):
    """One link of a pipeline: exactly one of prep, pretrain, convert and finetune."""

    prep: str | None = Field(None, description="Config of a data preparation.")
    pretrain: str | None = Field(None, description="Config of a pretraining.")
    convert: list[str] | None = Field(
        None, min_length=2, max_length=2, description="Conversion: [SOURCE, OUTPUT]."
    )
    finetune: str | None = Field(None, description="Config of a fine-tuning.")
    set: list[str] = Field([], description="Overrides of the stage's config, each as key=value.")
    cluster: str | None = Field(None, description="Cluster file of this link; without it the pipeline's.")
    nodes: int = Field(1, ge=1, description="Nodes.")
    array: int = Field(0, ge=0, description="Tasks of a prep array; 0: one job.")
    spares: int = Field(0, ge=0, description="Further nodes that stand by.")
    time: str | None = Field(None, description="Time limit of this link, in quotes.")

    @property
    def stage(self) -> str:
        """Which of the four it is."""
        return next(name for name in ("prep", "pretrain", "convert", "finetune") if getattr(self, name))

    @model_validator(mode="after")
    def _check(self) -> PipelineStage:
        given = [name for name in ("prep", "pretrain", "convert", "finetune") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"a stage names one of prep, pretrain, convert, finetune, not {given or 'none'}")
        return self


class PipelineConfig(Section):
    """Stages that are submitted together and run one after another."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="Name of the chain.")
    cluster: str = Field(description="Cluster file.")
    stages: list[PipelineStage] = Field(min_length=1, description="The links, in their order.")

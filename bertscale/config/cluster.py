"""Slurm clusters, and pipelines of jobs on them."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from bertscale.config.glue import GlueConfig
from bertscale.config.section import Section


class ClusterConfig(Section):
    """The facts of one site's Slurm cluster, or of one partition of it."""

    partition: str | None = Field(None, description="Partition; by default the cluster's own default.")
    account: str | None = Field(None, description="Account that pays for the job.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Node features that a job needs, such as a GPU's name.")
    sbatch: list[str] = Field([], description="Further sbatch options, each as --name=value.")
    srun: list[str] = Field([], description="Further srun options, such as those of a container plug-in.")
    gpus_per_node: int = Field(0, ge=0, description="Number of GPUs of a node, one rank on each.")
    tasks_per_node: int = Field(1, ge=1, description="Number of ranks on a node without GPUs.")
    cpus_per_task: int = Field(1, ge=1, description="Number of CPU cores of one rank.")
    memory_per_node: str | None = Field(
        None, description="Memory as sbatch --mem reads it; 0 takes all of a node's."
    )
    gpu_memory_gb: float | None = Field(None, gt=0, description="Memory of one GPU in GB (1e9 bytes).")
    time: str | None = Field(None, description="Time limit of a job that is given none, such as 1-00:00:00.")
    signal_seconds: int = Field(
        300, ge=1, description="Seconds before its time limit at which a job is told to save."
    )
    setup: list[str] = Field([], description="Shell lines for the batch script, such as `module load cuda`.")
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment variables of the job, such as NCCL_SOCKET_IFNAME."
    )
    container: list[str] = Field(
        [], description="Words before each rank's command, such as [apptainer, exec, --nv, bertscale.sif]."
    )
    python: str | None = Field(
        None, description="Python of the ranks, inside the container if any; by default this one."
    )
    batch_python: str | None = Field(
        None, description="Python 3.11 or later of the batch host, no packages needed; by default `python`."
    )
    log_root: str | None = Field(None, description="Folder for logs; by default the job's own folder.")
    node_check: bool = Field(True, description="Check each node before ranks start on it.")
    check_seconds: float = Field(120, gt=0, description="Seconds after which a silent node is left out.")
    min_free_memory_gb: float = Field(1, ge=0, description="A node with less free memory (GB) is left out.")
    min_free_disk_gb: float = Field(
        1, ge=0, description="A node with less free space, in GB, in its temporary folder is left out."
    )
    min_bandwidth_mb: float = Field(
        0, ge=0, description="A node that exchanges fewer MB/s with its neighbours is left out."
    )
    bad_nodes: str | None = Field(
        None, description="File of nodes to avoid, shared by all jobs; failed checks add to it."
    )
    bad_node_hours: float = Field(24, gt=0, description="Hours that a node stays in the file bad_nodes.")

    @field_validator("time", "memory_per_node", mode="before")
    @classmethod
    def _check_quotes(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 24:00:00 as a number in base 60
            raise ValueError(f"{value} is a number; put the value in quotes, as Slurm is to read it")
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _check_values(cls, environment: Any) -> Any:
        """Takes numbers as they stand; what YAML reads as something else than a person wrote is named."""
        if not isinstance(environment, dict):
            return environment
        for name, value in environment.items():
            if isinstance(value, bool):
                raise ValueError(f"{name} is written as yes, no, true or false: put the value in quotes")
        return {
            name: str(value) if isinstance(value, int | float) else value
            for name, value in environment.items()
        }

    @field_validator("environment")
    @classmethod
    def _check_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is not the name of an environment variable")
        return environment

    @field_validator("sbatch", "srun")
    @classmethod
    def _check_options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not re.fullmatch(r"--[\w-]+(=[^\n\r]*)?", option):
                raise ValueError(f"{option!r} is not an option of the form --name=value")
        return options


KINDS = ("prep", "pretrain", "convert", "finetune", "glue")  # of stages


class PipelineStage(Section):
    """One job of a pipeline: exactly one of prep, pretrain, convert, finetune and glue."""

    prep: str | None = Field(None, description="Config of a data preparation.")
    pretrain: str | None = Field(None, description="Config of a pretraining.")
    convert: list[str] | None = Field(
        None, min_length=2, max_length=2, description="Conversion: [SOURCE, OUTPUT]."
    )
    finetune: str | None = Field(None, description="Config of a fine-tuning.")
    average: bool = Field(
        False, description="Whether convert exports the moving average that a run with train.average keeps."
    )
    glue: GlueConfig | None = Field(
        None, description="Fine-tunings on a folder of tasks: a mapping of model, folder, output, seeds, ..."
    )
    set: list[str] = Field([], description="Overrides of the stage's config, each as key=value.")
    cluster: str | None = Field(None, description="Cluster file of this job; by default the pipeline's.")
    nodes: int = Field(1, ge=1, description="Number of nodes.")
    ranks_per_node: int | None = Field(
        None, ge=1, description="Ranks of a training on a node; by default all that the cluster file has."
    )
    array: int = Field(0, ge=0, description="Tasks of a prep array; 0 for a single job.")
    replace: bool = Field(
        False,
        description="Of a prep: make a data set of other settings or input anew, instead of refusing.",
    )
    spares: int = Field(0, ge=0, description="Number of spare nodes, which replace nodes that fail.")
    time: str | None = Field(None, description="Time limit of this job, in quotes.")

    @property
    def stage(self) -> str:
        """Names the one of KINDS that is given."""
        return next(name for name in KINDS if getattr(self, name))

    @model_validator(mode="after")
    def _check(self) -> PipelineStage:
        given = [name for name in KINDS if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"a stage is one of {', '.join(KINDS[:-1])} and {KINDS[-1]}, not {given or 'none'}"
            )
        if self.glue and (self.array or self.nodes > 1 or self.spares):
            raise ValueError("glue takes no array, nodes and spares: each task is a job on one node")
        if self.replace and not self.prep:
            raise ValueError(f"replace=true is for prep, not {given[0]}")
        if self.average and not self.convert:
            raise ValueError(f"average=true is for convert, not {given[0]}")
        if self.ranks_per_node is not None and not (self.pretrain or self.finetune):
            raise ValueError(
                f"ranks_per_node={self.ranks_per_node} is for pretrain and finetune, not {given[0]}"
            )
        return self


class PipelineConfig(Section):
    """Stages that are submitted together and run as jobs one after another."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="Name of the pipeline.")
    cluster: str = Field(description="Cluster file of all jobs.")
    stages: list[PipelineStage] = Field(min_length=1, description="The jobs, in the order in which they run.")

"""The section `init` of a pretraining config: the run or the model whose weights a run starts from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from bertscale.config.section import Section


class InitConfig(Section):
    """What a run starts from. Without this section it starts from random weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    source: str = Field(
        alias="from",
        description="A run, a checkpoint, or a Hugging Face folder, whose weights this run starts from.",
    )
    step: int | None = Field(
        None, ge=1, description="Step of the run's checkpoint to start from; by default the newest one."
    )
    optimizer: Literal["fresh", "keep"] = Field(
        "fresh", description="Begin with empty moments of the optimizer (fresh), or take them over (keep)."
    )

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, values: Any) -> Any:
        return {"from": values} if isinstance(values, str) else values

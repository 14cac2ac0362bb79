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

    positions: Literal["copy", "interpolate"] | None = Field(
        None, description="How learned positions get more rows, for a greater model.max_position_embeddings."
    )
    tile: bool = Field(
        False, description="Tile a larger encoder, in layers or widths, from the smaller one of the source."
    )
    vocabulary: Literal["same", "extend", "replace"] = Field(
        "same",
        description="The data's tokenizer is the source's (same), has more pieces (extend: they get means of "
        "rows), or others (replace: they get first values).",
    )

    @model_validator(mode="after")
    def _check(self) -> InitConfig:
        shape: dict[str, Any] = {"positions": self.positions, "tile": self.tile or None}
        shape |= {"vocabulary": None if self.vocabulary == "same" else self.vocabulary}
        changed = [f"{key}={str(value).lower()}" for key, value in shape.items() if value]
        if self.optimizer == "keep" and changed:
            raise ValueError(
                f"optimizer=keep does not go with {changed[0]}: moments have the shape of the old weights; "
                "take optimizer=fresh"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, values: Any) -> Any:
        return {"from": values} if isinstance(values, str) else values

"""The shape of what a pretraining starts from, read of its JSON: the table of a checkpoint, or config.json.

Without torch, and without the weights: what a start reads of a folder of transformers in full
(bertscale/convert/hf_names.py), this reads as far as sizes go.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bertscale.config import InitConfig, ModelConfig, UserError, check_config
from bertscale.run_folder import CHECKPOINTS, TABLE, checkpoint_folder, checkpoints

PRESETS = {  # by transformers' model_type
    "bert": "bert",
    "megatron-bert": "megatron-bert",
    "modernbert": "modern",
    "roberta": "bert",
    "xlm-roberta": "bert",
    "camembert": "bert",
    "distilbert": "bert",
}
SIZES = {  # ours -> DistilBert's
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_position_embeddings": "max_position_embeddings",
}


def shape_of(folder: Path, step: int | None = None) -> ModelConfig | None:
    """The network in a checkpoint, in the newest one of a run or that of `step`, or in a Hugging Face folder;
    None where nobody knows it here."""
    if (folder / CHECKPOINTS).is_dir():
        there = [checkpoint_folder(folder, step)] if step else checkpoints(folder)[-1:]
        return shape_of(there[0]) if there else None
    try:
        if (folder / TABLE).is_file():
            return check_config(ModelConfig, _read(folder / TABLE)["model"], str(folder))
        return _of_transformers(_read(folder / "config.json"), folder)
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return None


def _of_transformers(config: dict[str, Any], folder: Path) -> ModelConfig | None:
    kind = config["model_type"]
    if kind not in PRESETS:
        return None
    values = {
        ours: config[name]
        for ours, theirs in SIZES.items()
        for name in (theirs, ours)  # DistilBert's config may have either
        if name in config
    }
    if missing := SIZES.keys() - values.keys() - {"max_position_embeddings"}:
        raise KeyError(*missing)
    if PRESETS[kind] == "bert" and kind not in ("bert", "distilbert"):  # the first rows are of no token
        values["max_position_embeddings"] -= config.get("pad_token_id", 1) + 1
    return check_config(ModelConfig, {"preset": PRESETS[kind], **values}, str(folder))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def source_of(init: InitConfig, run: Path) -> Path:
    """The folder whose network the run `run` has: its own, once it has a checkpoint, and else its source."""
    return run if checkpoints(run) else Path(init.source)

"""What a folder holds: a data set, a run, a checkpoint, a fine-tuning, or a model as other programs read it.

    bertscale inspect runs/base
    describe(Path("runs/base"))["model"]["preset"]      # the same as values of JSON

Only tables and headers are read, not the weights, and no torch is loaded but for weights in a pickle.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError, safe_open

from bertscale.config import WORK_FOLDER, ModelConfig, check_config
from bertscale.config.table import FileName, Table, check_table, damaged, read_object
from bertscale.errors import UserError
from bertscale.files import file_digest, json_digest
from bertscale.run_folder import (
    CHECKPOINTS,
    RESULT,
    TABLE,
    checkpoint_step,
    checkpoints,
    is_number,
    metrics_until,
)
from bertscale.tokenizer import find_tokenizer, load_tokenizer
from bertscale.train.checkpoint_table import AVERAGE, STATES, check_files, read_table

MANIFEST = "manifest.json"
MODEL_CONFIG = "config.json"
TASK_MODEL = "model"  # in the output of a fine-tuning
RECORD = "bertscale-convert.json"
PRESETS = {"bert": "bert", "megatron-bert": "megatron-bert", "modernbert": "modern"}  # by model_type
SAVE_AGAIN = "save the model there again with model.save_pretrained(folder)"
SIZES = (  # of a config.json or of our table, in this order
    ("num_hidden_layers", "n_layers"),
    ("hidden_size", "dim"),
    ("num_attention_heads", "n_heads"),
    ("intermediate_size", "hidden_dim"),
    ("max_position_embeddings",),
    ("local_attention",),
)
DTYPES = {  # of a safetensors header
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"},
    **{"I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.onnx", "*.onnx_data")  # of a folder or below it


def describe(path: Path) -> dict[str, Any]:
    """What is at `path`, as values of JSON, `kind` and `path` first; keys that do not apply are left out.

    Raises UserError where it is none of those folders, or is damaged.
    """
    if not path.exists():
        raise UserError(f"there is no folder {path}")
    if is_prepared(path):
        return _data_set(path)
    if (path / CHECKPOINTS).is_dir():
        return _run(path)
    if (path / TABLE).is_file():
        return {"kind": "checkpoint", "path": str(path), **_checkpoint(path)}
    if (path / MODEL_CONFIG).is_file():
        return {"kind": _kind_of_model(path), "path": str(path), **_model(path)}
    if (path / RESULT).is_file() and (path / TASK_MODEL / MODEL_CONFIG).is_file():
        result = read_object(path / RESULT, "start the fine-tuning again")
        figures = {key: result[key] for key in ("task", "metric", "examples", "pretrained") if key in result}
        return {"kind": "fine-tuning", "path": str(path), **_model(path / TASK_MODEL), "result": figures}
    if (found := _native(path)) is not None:
        return found
    raise UserError(
        f"{path} is no data set, run, checkpoint or model: it has no {MANIFEST}, {CHECKPOINTS}, {TABLE} or "
        f"{MODEL_CONFIG}"
    )


def is_prepared(path: Path) -> bool:
    """Whether `bertscale prep` has been at work in the folder, finished or not."""
    return (path / MANIFEST).is_file() or (path / WORK_FOLDER).is_dir()


def _data_set(path: Path) -> dict[str, Any]:
    from bertscale.data.shards import open_dataset

    datasets = [open_dataset(path, split) for split in ("train", "validation")]
    manifest = datasets[0].manifest
    sums = ("documents", "sentences", "tokens", "text_bytes")
    counters = manifest["counters"]
    return {
        "kind": "data set",
        "path": str(path),
        "vocab_size": manifest["vocab_size"],
        "splits": {name: {key: counts[key] for key in sums} for name, counts in counters["splits"].items()},
        "language": manifest["settings"].get("language"),
        "shards": len(manifest["shards"]),
        "bytes": _size(path),
        "digests": {
            "settings": json_digest(manifest["settings"]),
            "tokenizer": manifest["tokenizer_sha256"],
            "table": file_digest(path / MANIFEST),
        },
    }


# ------------------------------------------------------------------------------- runs and checkpoints


def _run(path: Path) -> dict[str, Any]:
    folders = checkpoints(path)
    if not folders:
        raise UserError(f"the run {path} has no finished checkpoint yet")
    return {
        "kind": "run",
        "path": str(path),
        "checkpoint": folders[-1].name,
        "steps": [checkpoint_step(folder) for folder in folders],
        **_checkpoint(folders[-1]),
        "bytes_of_run": _size(path),
        "finished": (path / RESULT).is_file(),
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    table = read_table(path)
    check_files(path, table)
    parameters = table["parameters"]
    states = Counter(state for entry in parameters.values() for state in entry.get("states", STATES))
    moments = [name for name in STATES[1:] if states[name]] if table["has_moments"] else []
    config = table.get("config")
    samples = table["samples_consumed"]
    length = _setting(config, "samples", "max_length")
    facts = {
        "model": check_config(ModelConfig, table["model"], str(path / TABLE)).model_dump(),
        "vocab_size": table["vocab_size"],
        "parameters": sum(math.prod(entry["shape"]) for entry in parameters.values()),
        "tensors": len(parameters),
        "dtype": "float32",
        "topology": table["topology"],
        "step": table["step"],
        "samples": samples,
        "tokens_at_most": samples * length if is_number(length) else None,
        "skipped_steps": table.get("skipped_steps", 0),
        "training_seconds": table.get("elapsed_seconds", 0.0),
        "updates_before": table.get("updates_before", 0),
        "optimizer": _setting(config, "optimizer", "name") if moments else None,
        "optimizer_state": moments,
        "average": states[AVERAGE] == len(parameters),
        "lineage": table.get("lineage", []),
        "losses": _losses(path, table["step"]),
        "digests": {
            "config": json_digest(config) if config else None,
            "data": table.get("data_digest"),
            "tokenizer": table["tokenizer_sha256"],
            "table": file_digest(path / TABLE),
        },
        "files": {file["name"]: file["bytes"] for file in table["files"]},
        "bytes": _size(path),
    }
    return {key: value for key, value in facts.items() if value is not None}


def _setting(config: Any, section: str, key: str) -> Any:
    """A setting of the config in a checkpoint, which has been checked as it was written, not since."""
    values = config.get(section) if isinstance(config, dict) else None
    return values.get(key) if isinstance(values, dict) else None


def _losses(checkpoint: Path, step: int) -> dict[str, float] | None:
    """The last losses that the checkpoint's run has logged until then, and their steps; None without any."""
    found: dict[str, float] = {}
    for entry in metrics_until(checkpoint, step):
        for key in ("train/loss", "heldout/loss", "heldout/mlm_loss"):
            if is_number(entry.get(key)):
                found[key] = entry[key]
                found[f"{key.partition('/')[0]}_step"] = entry["step"]
    return found or None


# ------------------------------------------------------------------------------------------- models


class _ModelConfig(Table):
    """The keys of a config.json that are shown."""

    model_type: str | None = None
    architectures: list[str] | None = None
    vocab_size: int | None = None
    id2label: dict[str, str] | None = None


class _Index(Table):
    """Which shard holds which tensor."""

    weight_map: dict[str, FileName] = Field(min_length=1)


class _Record(Table):
    """What a conversion has noted of its source."""

    source: str


def _kind_of_model(path: Path) -> str:
    if (path / "modules.json").is_file():
        return "sentence-transformers folder"
    return "ONNX folder" if any(path.rglob("*.onnx")) else "Hugging Face folder"


def _model(path: Path) -> dict[str, Any]:
    config = read_object(path / MODEL_CONFIG, SAVE_AGAIN)
    given = check_table(_ModelConfig, config, path / MODEL_CONFIG, SAVE_AGAIN)
    sizes = {names[0]: config[name] for names in SIZES for name in names if is_number(config.get(name))}
    weights = weights_in(path)
    shapes = [shape for _, shape in weights.values()]
    tokenizer = find_tokenizer(path)
    facts: dict[str, Any] = {
        "class": next(iter(given.architectures or ()), None),
        "model": {"preset": PRESETS.get(given.model_type or ""), "model_type": given.model_type, **sizes},
        "vocab_size": given.vocab_size,
        "labels": list(given.id2label.values()) if given.id2label else None,
        "parameters": sum(math.prod(shape) for shape in shapes) if weights else None,
        "tensors": len(shapes) if weights else None,
        "dtype": ", ".join(sorted({dtype for dtype, _ in weights.values()})) or None,
        "digests": {
            "config": file_digest(path / MODEL_CONFIG),
            "tokenizer": load_tokenizer(tokenizer).sha256 if tokenizer.is_file() else None,
            "source": _source(path),
        },
        "files": {
            file.relative_to(path).as_posix(): file.stat().st_size
            for pattern in WEIGHTS
            for file in sorted(path.rglob(pattern))
        },
        "bytes": _size(path),
    }
    facts["digests"] = {key: value for key, value in facts["digests"].items() if value}
    return {key: value for key, value in facts.items() if value is not None}


def weights_in(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Data type and shape of each tensor of a model's folder, by its name there; empty without weights.

    Raises UserError where a file is damaged.
    """
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        table = check_table(_Index, read_object(index, SAVE_AGAIN), index, SAVE_AGAIN)
        files = [path / name for name in sorted(set(table.weight_map.values()))]
    elif (path / "pytorch_model.bin").is_file() or (path / "pytorch_model.bin.index.json").is_file():
        return _in_pickle(path)
    else:
        files = []
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    found[name] = DTYPES.get(part.get_dtype(), part.get_dtype()), part.get_shape()
        except (OSError, SafetensorError) as error:
            raise damaged(file, error, SAVE_AGAIN) from error
    return found


def _in_pickle(path: Path) -> dict[str, tuple[str, list[int]]]:
    from bertscale.convert.tensor_files import open_tensors

    tensors = open_tensors(path)
    types = {name: str(tensors.tensor(name).dtype).removeprefix("torch.") for name in tensors.names}
    return {name: (types[name], tensors.shape(name)) for name in sorted(tensors.names)}


def _native(path: Path) -> dict[str, Any] | None:
    """A folder of DeepSpeed, or a file of tensors; None where it is neither."""
    from bertscale.convert.deepspeed_files import find_deepspeed
    from bertscale.convert.sources import open_source_weights

    if path.is_dir() and find_deepspeed(path) is None:
        return None
    source = open_source_weights(path)
    states = getattr(source, "states", None)
    return {
        "kind": "DeepSpeed folder" if path.is_dir() else "file of tensors",
        "path": str(path),
        "model": source.model.model_dump(),
        "vocab_size": source.vocab_size,
        "parameters": sum(source.tensor(name).numel() for name in source.names),
        "tensors": len(source.names),
        "optimizer_state": list(states(source.names[0])[1:]) if states else [],
        "digests": {"tokenizer": load_tokenizer(source.tokenizer).sha256},
        "bytes": _size(path) if path.is_dir() else path.stat().st_size,
    }


def _source(path: Path) -> str | None:
    """The digest of what a conversion was made of; None where there is no sound record."""
    try:
        return check_table(_Record, read_object(path / RECORD, ""), path / RECORD, "").source
    except UserError:
        return None


def _size(path: Path) -> int:
    """Bytes of all files below a folder, those that links lead to left out."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())

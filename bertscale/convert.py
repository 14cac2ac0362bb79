"""Checkpoint <-> Hugging Face folder: name tables, both directions, and the check that they agree.

    bertscale convert runs/quickstart/pretrain runs/quickstart/hugging-face   # newest checkpoint of a run
    bertscale convert runs/quickstart/hugging-face runs/imported              # and back

Conversion reads one tensor at a time and needs no GPU. Native query, key and value weights are one matrix
whose rows are in the order head, (query, key, value), feature; Hugging Face holds three.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bertscale.checkpoint import TABLE, fresh_folder, open_checkpoint, put_in_place, save_tensors, write_whole
from bertscale.config import ModelConfig, UserError, check_config
from bertscale.layers import Layers
from bertscale.model import PretrainingModel, padded_vocab_size
from bertscale.shards import file_digest
from bertscale.tokenizer import find_tokenizer, load_tokenizer

WEIGHTS = "model.safetensors"
ORIGIN = "bertscale_checkpoint"  # key of config.json: digest of the checkpoint's table

# Native name -> Hugging Face name, outside the layers and within one; `query_key_value` is cut in three.
OUTSIDE = {
    "encoder.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
    "encoder.embeddings.position_embeddings.weight": "bert.embeddings.position_embeddings.weight",
    "encoder.embeddings.token_type_embeddings.weight": "bert.embeddings.token_type_embeddings.weight",
    "encoder.embeddings.LayerNorm.weight": "bert.embeddings.LayerNorm.weight",
    "encoder.embeddings.LayerNorm.bias": "bert.embeddings.LayerNorm.bias",
    "encoder.pooler.weight": "bert.pooler.dense.weight",
    "encoder.pooler.bias": "bert.pooler.dense.bias",
    "predictions.dense.weight": "cls.predictions.transform.dense.weight",
    "predictions.dense.bias": "cls.predictions.transform.dense.bias",
    "predictions.LayerNorm.weight": "cls.predictions.transform.LayerNorm.weight",
    "predictions.LayerNorm.bias": "cls.predictions.transform.LayerNorm.bias",
    "predictions.decoder.bias": "cls.predictions.bias",
    "seq_relationship.weight": "cls.seq_relationship.weight",
    "seq_relationship.bias": "cls.seq_relationship.bias",
}
WITHIN = {
    "attention.dense": "attention.output.dense",
    "attention.LayerNorm": "attention.output.LayerNorm",
    "feed_forward.intermediate": "intermediate.dense",
    "feed_forward.dense": "output.dense",
    "feed_forward.LayerNorm": "output.LayerNorm",
}
PADDED = ("encoder.embeddings.word_embeddings.weight", "predictions.decoder.bias")

EXAMPLES = (
    "Return a new [MASK] with the same values.",
    "If the file does not exist, an error is [MASK].",
    "The [MASK] of the array along the given axis.",
)


class Weights(Protocol):
    """Whole native tensors, from wherever they are."""

    folder: Path
    model: ModelConfig
    vocab_size: int

    @property
    def parameters(self) -> Any: ...  # an iterable of native names

    def tensor(self, name: str) -> Tensor: ...  # float32, CPU


def open_weights(path: Path) -> Weights:
    """A checkpoint, the newest checkpoint of a run, or a Hugging Face folder.

    Raises UserError where `path` is none of them or is damaged.
    """
    if (path / "config.json").is_file():
        return HuggingFaceWeights(path)
    return open_checkpoint(path)


# ------------------------------------------------------------------------------------------ the tables


def hugging_face_names(name: str) -> list[str]:
    """Names in a BertForPreTraining of the native parameter `name`: three for query_key_value, else one."""
    if name in OUTSIDE:
        return [OUTSIDE[name]]
    _, _, layer, rest = name.split(".", 3)  # encoder.layers.N.rest
    module, kind = rest.rsplit(".", 1)
    prefix = f"bert.encoder.layer.{layer}"
    if module == "attention.query_key_value":
        return [f"{prefix}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
    return [f"{prefix}.{WITHIN[module]}.{kind}"]


def native_shapes(model: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Every native parameter and its whole shape."""
    with torch.device("meta"):
        skeleton = PretrainingModel(model, vocab_size, Layers())
    return {name: parameter.shape for name, parameter in skeleton.named_parameters()}


def to_hugging_face(name: str, value: Tensor, heads: int, vocab_size: int) -> dict[str, Tensor]:
    """One native tensor as Hugging Face's one or three; padded vocabulary rows are cut off."""
    names = hugging_face_names(name)
    if len(names) == 1:
        return {names[0]: value[:vocab_size] if name in PADDED else value}
    parts = value.view(heads, 3, -1, *value.shape[1:]).unbind(dim=1)  # 3 x [A, D, (H)]
    return {part: each.reshape(-1, *value.shape[1:]) for part, each in zip(names, parts, strict=True)}


def from_hugging_face(name: str, values: list[Tensor], heads: int) -> Tensor:
    """The inverse of `to_hugging_face`; padded vocabulary rows are zero."""
    if len(values) == 3:
        parts = [value.view(heads, -1, *value.shape[1:]) for value in values]  # 3 x [A, D, (H)]
        return torch.stack(parts, dim=1).reshape(-1, *values[0].shape[1:])  # [A, 3, D, (H)] -> [3 H, (H)]
    value = values[0]
    if name not in PADDED:
        return value
    padded = value.new_zeros(padded_vocab_size(len(value)), *value.shape[1:])
    padded[: len(value)] = value
    return padded


class HuggingFaceWeights:
    """A BertForPreTraining folder with safetensors, as native tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {folder / 'config.json'}: {error}") from error
        if self.config.get("model_type") != "bert" or self.config.get("hidden_act", "gelu") != "gelu":
            raise UserError(
                f"{folder} holds a model of type {self.config.get('model_type')!r} with activation "
                f"{self.config.get('hidden_act')!r}; this version converts 'bert' with 'gelu'"
            )
        sizes = {key: self.config[key] for key in ModelConfig.model_fields if key in self.config}
        self.model: ModelConfig = check_config(ModelConfig, sizes, str(folder / "config.json"))
        self.vocab_size: int = self.config["vocab_size"]
        try:
            self.file: Any = safe_open(folder / WEIGHTS, framework="pt")
            self.names: set[str] = set(self.file.keys())  # type: ignore[no-untyped-call,unused-ignore]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {folder / WEIGHTS}: {error}; save the model there with "
                "model.save_pretrained(folder), which writes safetensors"
            ) from error
        self.parameters = native_shapes(self.model, self.vocab_size)

    def tensor(self, name: str) -> Tensor:
        """The native parameter `name`, float32; raises UserError when the folder lacks it."""
        values = []
        for each in hugging_face_names(name):
            if each not in self.names:
                raise UserError(f"{self.folder / WEIGHTS} lacks {each}: it is not a whole BertForPreTraining")
            values.append(self.file.get_tensor(each).float())
        return from_hugging_face(name, values, self.model.num_attention_heads)


# ---------------------------------------------------------------------------------------- the command


def convert(source: Path, output: Path, show: bool) -> None:
    """Converts `source` into the folder `output`, written under a temporary name and renamed.

    An output that came from the same source is left as it is; with `show`, an exported model fills a
    few masks. Raises UserError when `output` is there and is something else.
    """
    weights = open_weights(source)
    if not find_tokenizer(weights.folder).is_file():
        raise UserError(
            f"{weights.folder} holds no tokenizer.model, tokenizer.json or vocab.txt; put its tokenizer there"
        )
    if isinstance(weights, HuggingFaceWeights):
        _check_output(output, TABLE)
        import_weights(weights, output)
        print(f"imported  {source} -> {output}, a checkpoint without optimizer state")
        return
    digest = file_digest(weights.folder / TABLE)
    if _origin(output) == digest:
        print(f"already converted: {output} is {weights.folder}")
    else:
        _check_output(output, "config.json", ORIGIN)
        export(weights, output, digest)
        difference = largest_difference(weights, output)
        print(f"exported  {weights.folder} -> {output}")
        print(f"verified  logits of the native and the exported model differ by at most {difference:.1e}")
    if show:
        show_masks(output)


def export(weights: Weights, output: Path, origin: str) -> None:
    """Writes a folder that transformers loads as BertForPreTraining, tokenizer included."""
    model, tokenizer = weights.model, load_tokenizer(find_tokenizer(weights.folder))
    tensors: dict[str, Tensor] = {}
    for name in weights.parameters:
        tensors |= to_hugging_face(name, weights.tensor(name), model.num_attention_heads, weights.vocab_size)
    partial = fresh_folder(output)
    save_tensors(partial / WEIGHTS, {key: value.contiguous() for key, value in tensors.items()})
    sizes = model.model_dump(exclude={"preset"}, exclude_none=True)
    config = {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": weights.vocab_size,
        "pad_token_id": tokenizer.pad_id,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **sizes,
        ORIGIN: origin,
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.export_hugging_face(partial, model.max_position_embeddings)
    tokenizer.save(partial)
    put_in_place(partial, output)


def import_weights(weights: HuggingFaceWeights, output: Path) -> None:
    """Writes a checkpoint of whole weights, one rank, no optimizer state."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in weights.parameters:
            yield name, weights.tensor(name)

    tokenizer = find_tokenizer(weights.folder)
    table = {
        "model": weights.model.model_dump(),
        "vocab_size": weights.vocab_size,
        "tokenizer_sha256": load_tokenizer(tokenizer).sha256,
        "data_digest": None,
        "config": None,
    }
    write_whole(output, table, tensors(), tokenizer)


def native_model(weights: Weights) -> PretrainingModel:
    """The dense native model with these weights, float32 on the CPU, in evaluation mode."""
    model = PretrainingModel(weights.model, weights.vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensor(name))
    return model.eval()


@torch.no_grad()
def largest_difference(weights: Weights, folder: Path) -> float:
    """Largest absolute difference of any logit, native against exported, on a batch of random ids."""
    from transformers import BertForPreTraining

    _quiet()
    theirs = BertForPreTraining.from_pretrained(folder, dtype=torch.float32).eval()
    ours = native_model(weights)
    longest = weights.model.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    difference = 0.0
    for length in sorted({min(7, longest), min(64, longest)}):
        ids = torch.randint(weights.vocab_size, (length,), generator=generator)
        types = (torch.arange(length) > length // 2).long()
        hidden, pooled = ours.encoder(ids, types, torch.arange(length), (length,))
        output = theirs(input_ids=ids[None], token_type_ids=types[None])
        masked = ours.predictions(hidden)[:, : weights.vocab_size] - output.prediction_logits[0]
        relation = ours.seq_relationship(pooled) - output.seq_relationship_logits
        difference = max(difference, float(masked.abs().max()), float(relation.abs().max()))
    return difference


def show_masks(folder: Path) -> None:
    """Lets transformers' own pipeline fill a few masks, and prints its best three pieces of each."""
    from transformers import pipeline

    _quiet()
    fill = pipeline("fill-mask", model=str(folder), tokenizer=str(folder), top_k=3, device="cpu")
    for text in EXAMPLES:
        best = ", ".join(f"{answer['token_str'].strip()} {answer['score']:.0%}" for answer in fill(text))
        print(f"  {text}  ->  {best}")


def _quiet() -> None:
    """No bars and no lists of the heads that a class leaves aside, from transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _origin(output: Path) -> str | None:
    try:
        origin = json.loads((output / "config.json").read_text(encoding="utf-8")).get(ORIGIN)
    except (OSError, ValueError):
        return None
    return origin if isinstance(origin, str) else None


def _check_output(output: Path, marker: str, key: str | None = None) -> None:
    """Refuses a folder that is not one of ours to replace."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    ours = (output / marker).is_file() and (key is None or _origin(output) is not None)
    if not ours or (output / "checkpoints").exists():
        raise UserError(
            f"{output} exists and is not an earlier output of this command; choose another folder"
        )

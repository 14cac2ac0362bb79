"""The README.md of a model: the form that all of ours have, and that of a pretrained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bertscale import __version__
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.sources import InitSource
from bertscale.export.options import ConvertOptions
from bertscale.export.reference import FILE, FOLDER
from bertscale.files import json_digest
from bertscale.run_folder import metrics_until
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import Checkpoint

USAGE = {
    "pretraining": """from transformers import pipeline

fill = pipeline("fill-mask", "FOLDER")
print(fill("A text with one [MASK] in it."))
""",
    "encoder": """from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModel.from_pretrained("FOLDER").eval()
states = model(**tokenizer("A text.", return_tensors="pt")).last_hidden_state
print(states.shape)
""",
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
vectors = model.encode(["A text.", "Another text."])
print(model.similarity(vectors, vectors))
""",
}
USAGE["masked-lm"] = USAGE["pretraining"]
TAGS = {
    "pretraining": "fill-mask",
    "masked-lm": "fill-mask",
    "encoder": "feature-extraction",
    "sentence-transformers": "sentence-similarity",
}


# -------------------------------------------------------------------------------- of all kinds of models


def front_matter(tag: str | None, library: str = "transformers", *more: str) -> str:
    """Returns the metadata that the Hugging Face hub reads; the licence is the user's to add."""
    pipeline = f"pipeline_tag: {tag}\n" if tag else ""
    tags = "".join(f"- {each}\n" for each in ("bertscale", *more))
    return f"---\nlibrary_name: {library}\n{pipeline}tags:\n{tags}---\n"


def fact_table(facts: dict[str, str]) -> list[str]:
    """Returns the lines of a table of two columns; facts without a text are left out."""
    rows = [f"| {name} | {cell(text)} |" for name, text in facts.items() if text]
    return ["| | |", "| --- | --- |", *rows, ""]


def cell(text: str) -> str:
    """Returns a text as a cell of a table may have it."""
    return " ".join(text.split()).replace("|", "&#124;")


# ------------------------------------------------------------------------------- of a pretrained model


def model_card(source: InitSource, config: dict[str, Any], form: str, options: ConvertOptions) -> str:
    """Returns the card as Markdown. It names no path: of folders the last part alone."""
    kind = config["architectures"][0]
    electra = source.model.generator_size is not None and form == "pretraining"
    usage = USAGE["encoder" if electra else form]
    library = "sentence-transformers" if form == "sentence-transformers" else "transformers"
    more = ["sentence-transformers"] if form == "sentence-transformers" else []
    tag = None if electra else TAGS[form]
    lines = [
        front_matter(tag, library, *more),
        "# Pretrained encoder\n",
        f"Written by bertscale {__version__}.\n",
        *fact_table({"class in transformers": kind, **_facts(source, options), **_training(source)}),
        "FOLDER is the folder of this file:\n",
        f"```python\n{usage}```\n",
        f"`{FOLDER}/{FILE}` holds the ids and the last hidden states (float32) of three sentences, which are "
        "in its metadata: any other program that serves this model should give the same numbers, to about "
        "three digits. Texts have to be written as those of the training were.\n",
        "What this file does not tell, and you should: the licence (`license:` at its top), the texts that "
        "the model was trained on and their licence, the language (`language:`), and what the model was "
        "measured on.\n",
    ]
    return "\n".join(lines)


def _facts(source: InitSource, options: ConvertOptions) -> dict[str, str]:
    model = source.model
    shapes = native_shapes(model, source.vocab_size)
    size = sum(shapes[name].numel() for name in source.names if name in shapes)
    tokenizer = load_tokenizer(source.tokenizer)
    pooling = ""
    if options.pooling:
        pooling = {"mean": "the mean of the tokens' states", "first": "the state of the first token"}[
            options.pooling
        ]
        pooling += ", of length 1" if options.normalize else ""
    return {
        "shape": f"{model.preset}, {model.num_hidden_layers} layers of {model.hidden_size}, "
        f"{model.num_attention_heads} heads, {size:,} parameters",
        "longest sample": f"{model.max_position_embeddings:,} tokens",
        "tokenizer": f"{tokenizer} ({source.vocab_size:,} pieces, SHA-256 {tokenizer.sha256[:16]})",
        "weights": options.dtype,
        "vector of a text": pooling,
    }


def _training(source: InitSource) -> dict[str, str]:
    """What the checkpoint and the run around it tell; little of a folder that was trained elsewhere."""
    checkpoint = getattr(source, "weights", None)
    if not isinstance(checkpoint, Checkpoint):
        return {"made of": Path(source.folder).name}
    table = checkpoint.table
    config = table.get("config") or {}
    samples, train = config.get("samples", {}), config.get("train", {})
    facts = {"training": "", "optimizer": "", "data": "", "config": ""}
    if config:
        facts["training"] = f"{checkpoint.step:,} steps, {checkpoint.samples_consumed:,} samples"
        if samples.get("kind") == "packed":
            longest = checkpoint.samples_consumed * samples["max_length"]
            facts["training"] += f" of {samples['max_length']:,} tokens, {longest:,} tokens at most"
        facts["training"] += f"; seed {train.get('seed')}"
        optimizer = config.get("optimizer", {})
        facts["optimizer"] = (
            f"{optimizer.get('name')}, learning rate {optimizer.get('learning_rate'):g}, schedule "
            f"{optimizer.get('schedule')}, {train.get('global_batch'):,} samples a step"
        )
        facts["masks"] = f"{samples.get('mask_rate', 0):.0%} of the tokens, by {samples.get('mask_unit')}"
        facts["config"] = f"digest {json_digest(config)}"
    if table.get("data_digest"):
        facts["data"] = f"digest {table['data_digest']}"
    facts |= _losses(checkpoint)
    if table.get("average"):
        facts["average"] = f"of several checkpoints, by {table['average'].get('method')}"
    if checkpoint.lineage:
        facts["started from"] = "; then ".join(
            f"{Path(each['folder']).name}, step {each['step']} ({each['digest'][:12]})"
            for each in checkpoint.lineage
        )
    return facts


def _losses(checkpoint: Checkpoint) -> dict[str, str]:
    """The newest losses, up to the checkpoint's step, of the run that it lies in."""
    newest: dict[str, tuple[float, int]] = {}
    for line in metrics_until(checkpoint.folder, checkpoint.step):
        newest |= {
            name: (value, int(line["step"]))
            for name, value in line.items()
            if name.endswith("loss") and name.startswith(("train/", "heldout"))
        }
    return {
        name.replace("/", " ").replace("_", " "): f"{value:.4f} (step {step:,})"
        for name, (value, step) in sorted(newest.items())
    }

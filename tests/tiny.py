"""A tiny corpus, prepared once for a test session, and the config of a tiny run on it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from bertscale.config import PrepConfig, PretrainConfig
from bertscale.data.micro_batch import MicroBatch
from data_prep.build import prep

SUBJECTS = ["The cat", "A small dog", "Every teacher", "The old river", "My neighbour", "This engine"]
VERBS = ["watches", "follows", "remembers", "carries", "finds", "likes"]
OBJECTS = ["the garden", "a red boat", "its reflection", "the long road", "some bread", "an answer"]


def write_corpus(path: Path, documents: int = 300) -> None:
    """Documents of 2 to 9 sentences, one JSON line each."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(documents):
            sentences = [
                f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)} "
                f"at {draw.randint(1, 99)}."
                for _ in range(draw.randint(2, 9))
            ]
            file.write(json.dumps({"text": " ".join(sentences)}) + "\n")


def prep_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of FOLDER/corpus.jsonl into FOLDER/data, with a vocabulary of 330."""
    return {
        "input": [str(folder / "corpus.jsonl")],
        "output": str(folder / "data"),
        "train_tokenizer": {"vocab_size": 330, "sample_documents": 300},
        "validation_fraction": 0.2,
        "workers": 1,
        **changes,
    }


def make_data(folder: Path) -> Path:
    write_corpus(folder / "corpus.jsonl")
    prep(PrepConfig.model_validate(prep_config(folder)))
    return folder / "data"


def pretrain_config(data: Path | str, run: Path | str, **changes: dict[str, Any]) -> PretrainConfig:
    """A model of two layers, 10 steps of 8 samples, float32, everything logged; `changes` by section."""
    values: dict[str, Any] = {
        "run": str(run),
        "data": str(data),
        "model": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 48,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "samples": {"max_length": 48},
        "optimizer": {"learning_rate": 0.003, "gradient_clipping": 0.4},
        "train": {
            "steps": 10,
            "global_batch": 8,
            "micro_batch": 2,
            "precision": "float32",
            "log_every": 1,
            "eval_every": 10,
            "eval_samples": 16,
            "save_every": 10,
        },
    }
    for section, change in changes.items():
        values[section] = {**values.get(section, {}), **change}
    return PretrainConfig.model_validate(values)


def pair_batch() -> MicroBatch:
    """Two sentence pairs of 6 tokens, with 3 masked positions."""
    places = torch.arange(12)
    return MicroBatch(
        tokens=places,
        token_types=torch.zeros(12, dtype=torch.int64),
        positions=places % 6,
        lengths=(6, 6),
        target_positions=places[:3],
        targets=places[:3],
        num_targets=3,
        next_sentence_label=torch.tensor([0, 1]),
    )

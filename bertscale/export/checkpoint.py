"""Writes a checkpoint of one rank: whole weights without optimizer states."""

from __future__ import annotations

from pathlib import Path

from bertscale.config import UserError
from bertscale.convert.hf_folder import tokenizer_of
from bertscale.convert.weights import HuggingFaceWeights
from bertscale.export.options import ConvertOptions
from bertscale.export.verify import LARGEST_DIFFERENCE, largest_difference
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint, write_whole


def write_checkpoint(weights: HuggingFaceWeights, output: Path, options: ConvertOptions) -> list[str]:
    """Writes a checkpoint of whole weights, one rank, no optimizer state; says what it lacks."""
    tokenizer = tokenizer_of(weights.folder)
    table = {
        "model": weights.model.model_dump(),
        "vocab_size": weights.vocab_size,
        "tokenizer_sha256": load_tokenizer(tokenizer).sha256,
        "data_digest": None,
        "config": None,
    }
    tensors = ((name, weights.tensor(name)) for name in weights.parameters)
    write_whole(output, table, tensors, tokenizer, weights.parameters)
    difference = largest_difference(open_checkpoint(output), weights.folder)
    if not difference < LARGEST_DIFFERENCE:  # NaN too
        raise UserError(
            f"{weights.folder} is a model that this version does not build: its logits in transformers "
            f"differ by up to {difference:.1e} from those of the imported weights"
        )
    said = [
        "imported  a checkpoint without optimizer state",
        f"verified  logits of the given and the imported model differ by at most {difference:.1e}",
    ]
    if unused := weights.unused():
        said.append(f"left out  {', '.join(unused)}: no parameter of preset {weights.model.preset}")
    if weights.missing:
        said.append(f"missing   {', '.join(weights.missing)}: not in the source, set to initial values")
    return said

"""Writes the folder of an encoder that sentence-transformers and servers of vectors load as a model of texts.

Beside what `hugging_face` writes there are five small files. Their keys are those that sentence-transformers
has read from its second version to its sixth, and text-embeddings-inference reads: the sixth writes others,
which only itself knows.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from bertscale import __version__
from bertscale.config import UserError
from bertscale.convert.sources import InitSource
from bertscale.export.hugging_face import write_hugging_face
from bertscale.export.options import ConvertOptions
from bertscale.export.output import Written
from bertscale.export.reference import FILE, FOLDER
from bertscale.export.verify import LARGEST_DIFFERENCE
from bertscale.files import write_json

MODES = {"first": "cls_token", "mean": "mean_tokens"}  # --pooling -> the key that is true
OTHER_MODES = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write_sentence_transformers(source: InitSource, output: Path, options: ConvertOptions) -> Written:
    """Writes the folder, compares its vectors with ours, and says how it went.

    Raises UserError where `write_hugging_face` does, or where sentence-transformers gives other vectors.
    """
    said, digests = write_hugging_face(source, output, options, "sentence-transformers")
    for name, content in _files(source, options).items():
        path = output / name
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)
    return Written(said + (_verified(output, options) if options.verify else []), digests)


def _files(source: InitSource, options: ConvertOptions) -> dict[str, Any]:
    """The content of each file by its name."""
    kinds = ["Transformer", "Pooling"] + (["Normalize"] if options.normalize else [])
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    modes = dict.fromkeys((*MODES.values(), *OTHER_MODES), False)
    assert options.pooling is not None
    modes[MODES[options.pooling]] = True
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ],
        "config_sentence_transformers.json": {
            "__version__": {"bertscale": __version__},
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {
            "max_seq_length": source.model.max_position_embeddings,
            "do_lower_case": False,  # the tokenizer's own rules say it
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": source.model.hidden_size,
            **{f"pooling_mode_{mode}": chosen for mode, chosen in modes.items()},
            "include_prompt": True,
        },
    }
    if options.normalize:
        files["2_Normalize/config.json"] = {}
    return files


def _verified(output: Path, options: ConvertOptions) -> list[str]:
    """Compares the vectors of the reference's texts. Raises UserError where they differ."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return ["vectors   not compared: sentence-transformers is not installed"]
    from sentence_transformers import SentenceTransformer

    with safe_open(output / FOLDER / FILE, framework="pt") as file:
        texts = json.loads(file.metadata()["texts"])
        ours = file.get_tensor(options.pooling)
    if options.normalize:
        ours = F.normalize(ours, dim=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own change of names
        try:
            model = SentenceTransformer(str(output), device="cpu", model_kwargs={"dtype": torch.float32})
            theirs = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        except Exception as error:  # whatever a library of another version says
            raise UserError(f"sentence-transformers cannot load what was written: {error}") from error
    difference = float((ours - theirs.float().cpu()).abs().max())
    library = f"sentence-transformers {importlib.metadata.version('sentence-transformers')}"
    if not difference < LARGEST_DIFFERENCE * max(1.0, float(ours.square().mean().sqrt())):
        raise UserError(
            f"{library} gives vectors that differ from ours by up to {difference:.1e}; report this, or give "
            "--no-verify to have it all the same"
        )
    return [f"vectors   of {library} and of the native model differ by at most {difference:.1e}"]

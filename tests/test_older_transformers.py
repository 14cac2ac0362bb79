"""Exports in transformers 4: loaded without a missing or spare key, and with the same numbers.

Each version is installed into a folder of its own, which a subprocess takes before the environment's. Without
a registry of packages the test is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from test_convert import write_checkpoint

from bertscale.convert.sources import CheckpointSource, open_whole_checkpoint
from bertscale.export.convert import convert
from bertscale.export.native import native_outputs
from bertscale.export.options import ConvertOptions
from bertscale.export.reference import samples_of, sentences
from bertscale.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

# What each version takes; all that it has beside them is the environment's.
VERSIONS = {
    "4.48.3": ("tokenizers==0.21.4", "huggingface-hub==0.36.0"),
    "4.57.3": ("tokenizers==0.22.1", "huggingface-hub==0.36.0"),
}
BESIDE = ("requests", "urllib3", "certifi", "charset-normalizer", "idna")
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "megatron-bert": {"preset": "megatron-bert"},
    "modern": {
        **{"preset": "modern", "local_attention": 8, "global_attn_every_n_layers": 2},
        **{"num_hidden_layers": 4, "local_rope_theta": 500.0},
    },
}
# Run with the other version: loads each folder named in the arguments, and compares.
PROGRAM = """
import json, sys
import torch, transformers
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file

assert transformers.__version__ == sys.argv[1], transformers.__version__
found = {}
for folder in map(Path, sys.argv[2:]):
    (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, report = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    keys = [list(report[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    with safe_open(folder / "reference/reference.safetensors", framework="pt") as file:
        texts = json.loads(file.metadata()["texts"])
        ids, mask = file.get_tensor("input_ids"), file.get_tensor("attention_mask")
        hidden = file.get_tensor("last_hidden_state")
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, return_tensors="pt"
    )
    config = model.config
    with torch.no_grad():
        outputs = model.eval()(**batch, output_hidden_states=True)
    if "last_hidden_state" in outputs:
        ours, theirs = hidden, outputs["last_hidden_state"]
    else:
        ours = load_file(folder.with_suffix(".logits"))["logits"]
        theirs = outputs["prediction_logits" if "prediction_logits" in outputs else "logits"]
    places = mask.bool()
    found[folder.name] = {
        "keys": keys,
        "ids": batch["input_ids"].equal(ids),
        "difference": float((ours[places] - theirs[places]).abs().max()),
        "dtype": str(config.torch_dtype),
        "pad": config.pad_token_id,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=VERSIONS)
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The version, and the folder that it lies in."""
    version: str = request.param
    folder = tmp_path_factory.mktemp(f"transformers-{version}")
    packages = (f"transformers=={version}", *VERSIONS[version], *BESIDE)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    # Bytecode of thousands of files takes minutes, and a few dozen of them are imported. A registry that does
    # not answer is asked once.
    brief = ("--no-compile", "--retries", "0", "--timeout", "20", "--disable-pip-version-check")
    done = subprocess.run([*command, *brief, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(
            f"transformers {version} cannot be installed here: {done.stderr.strip().splitlines()[-1]}"
        )
    return version, folder


@pytest.fixture(scope="module")
def exported(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Exports for pretraining and of encoders; beside the former the logits of the native model."""
    place, folders = tmp_path_factory.mktemp("exported"), []
    for kind, values in KINDS.items():
        write_checkpoint(place / "native" / kind, tiny_data, values)
        for form in ("pretraining", "encoder"):
            folder = place / f"{kind}-{form}"
            convert(place / "native" / kind, folder, ConvertOptions(as_=form, show=False, verify=False))
            folders.append(folder)
        source = CheckpointSource(open_whole_checkpoint(place / "native" / kind))
        tokenizer = load_tokenizer(source.tokenizer)
        texts = sentences(tokenizer)
        samples = samples_of(texts, tokenizer, source.model, source.vocab_size)[: len(texts)]
        outputs = native_outputs(source, set(source.names), samples)
        longest = max(len(sample.ids) for sample in samples)
        logits = outputs[0].hidden.new_zeros(len(texts), longest, source.vocab_size)
        for row, output in zip(logits, outputs, strict=True):
            assert output.logits is not None
            row[: len(output.logits)] = output.logits
        save_file({"logits": logits}, place / f"{kind}-pretraining.logits")
    return folders


def test_exports_load_strictly_and_say_the_same(installed: tuple[str, Path], exported: list[Path]) -> None:
    version, folder = installed
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, version, *map(str, exported)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {each.name for each in exported}
    for name, report in found.items():
        assert report["keys"] == [[], [], []], name
        assert report["ids"], name
        assert report["difference"] < 1e-4, (name, report)
        assert report["dtype"] == "torch.float32", name

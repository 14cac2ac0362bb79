"""Raw text -> token shards: the whole path on one core and on two, beside others on the same text.

    python benchmarks/prep.py                           # on the quickstart's corpus, made if it is not there
    python benchmarks/prep.py --data FOLDER --json FILE # any files that `bertscale prep` reads

Ours is read, clean, split into sentences, encode (SentencePiece Unigram), shuffle, drop duplicates, write:
both passes, called in this process. Beside it, on the texts that lie in memory already: SentencePiece
alone, `datasets.map` with the same tokenizer in its Hugging Face form, and a plain loop over greedy
word pieces in Python, in the style of the script that was published with BERT. The same whole path with
byte-level BPE stands beside AutoTokenizer with the same tokenizer.json. Then the command itself with
one worker and with two, on the text repeated to --megabytes, and the most memory that a worker took.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertscale.bench.machine import processor
from bertscale.config import PrepConfig, UserError
from bertscale.data.shards import open_dataset, token_dtype
from bertscale.files import write_json
from bertscale.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from data_prep.build import merge_shard, prep
from data_prep.clean import clean
from data_prep.encode import encode_unit
from data_prep.plan import Plan, ShardUnit
from data_prep.segment import splitter
from data_prep.shuffle import Spill, number_of_shards

GOAL_TOKENS = 2_300_000  # a second on a core
GOAL_TWO_WORKERS = 1.8
GOAL_MEMORY = 400  # MB
WHOLE_PREP = """
import resource, sys, time
from bertscale.config import PrepConfig
from data_prep.build import prep
if __name__ == "__main__":
    began = time.perf_counter()
    prep(PrepConfig.model_validate_json(sys.argv[1]))
    seconds = time.perf_counter() - began
    print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="Folder or file of raw text.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    parser.add_argument("--rounds", type=int, default=3, help="Turns of each side, after one of warm-up.")
    parser.add_argument("--megabytes", type=int, default=200, help="Text for the command with workers.")
    parser.add_argument("--language", default="en", help="As in the config of prep.")
    options = parser.parse_args()
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory(prefix="bertscale-prep-") as name:
        folder = Path(name)
        config = PrepConfig.model_validate(
            {
                "input": [str(options.data or quickstart_corpus())],
                "output": str(folder / "first"),
                "language": options.language,
                "workers": 1,
                "validation_fraction": 0,
            }
        )
        tokenizer = trained(config)
        in_bytes = trained(with_byte_bpe(config, folder / "byte-level"))
        config = config.model_copy(update={"tokenizer": str(tokenizer.path)})
        results = one_core(config, tokenizer, in_bytes, folder, options.rounds)
        results += workers(config, folder, options.megabytes)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    return 0


def trained(config: PrepConfig) -> Tokenizer:
    """A tokenizer of 32,768 pieces, or of as many as the text allows."""
    try:
        prep(config)
    except UserError as error:
        limit = re.search(r"the largest that fits is (\d+)", str(error))
        if not limit:
            raise
        fewer = config.train_tokenizer.model_copy(update={"vocab_size": int(limit[1])})
        prep(config.model_copy(update={"train_tokenizer": fewer}))
    return load_tokenizer(find_tokenizer(config.output))


def with_byte_bpe(config: PrepConfig, output: Path) -> PrepConfig:
    training = config.train_tokenizer.model_copy(update={"model": "byte_bpe"})
    return config.model_copy(update={"output": str(output), "train_tokenizer": training})


# ---------------------------------------------------------------------------------------------- one core


def one_core(
    config: PrepConfig, tokenizer: Tokenizer, in_bytes: Tokenizer, folder: Path, rounds: int
) -> list[dict[str, Any]]:
    counters = open_dataset(config.output).manifest["counters"]
    raw = sum(file.size for file in Plan(config).files)
    print(
        f"{processor()}; {raw / 1e6:.1f} MB of files, {counters['text_bytes'] / 1e6:.1f} MB of text, "
        f"{counters['tokens']:,} tokens, {tokenizer.vocab_size:,} pieces"
    )
    texts = texts_of(config)
    size = sum(len(text.encode()) for text in texts)
    sides: dict[str, Callable[[], int]] = {
        "whole path": lambda: whole_path(config, tokenizer, folder / "ours"),
        "sentencepiece alone": sentence_piece_alone(config, tokenizer, texts),
    }
    given = config.model_copy(update={"tokenizer": str(in_bytes.path)})
    sides["byte-level BPE"] = lambda: whole_path(given, in_bytes, folder / "ours-in-bytes")
    sides["AutoTokenizer of it"] = auto_tokenizer(in_bytes, texts, folder / "hugging-face-in-bytes")
    try:
        sides["datasets.map"] = datasets_map(tokenizer, texts, folder)
    except ImportError:
        print("datasets.map: left out; `pip install datasets` brings it")
    sides["plain loop"] = plain_loop(tokenizer, texts[:: max(1, size // 3_000_000)], folder)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, int] = {}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            if name == "plain loop" and turn > 1:
                continue  # slow, and no closer
            began = time.perf_counter()
            tokens[name] = side()
            if turn > 0:
                seconds[name].append(time.perf_counter() - began)
    bytes_of = dict.fromkeys(sides, size)
    bytes_of["plain loop"] = sum(len(text.encode()) for text in texts[:: max(1, size // 3_000_000)])
    print(f"{'on one core':<24}{'MB/s':>8}{'tokens/s':>14}")
    rates = {}
    for name in sides:
        took = statistics.median(seconds[name])
        rates[name] = bytes_of[name] / took / 1e6
        print(f"{name:<24}{rates[name]:>8.1f}{tokens[name] / took:>14,.0f}", flush=True)
    ours = tokens["whole path"] / statistics.median(seconds["whole path"])
    results = [result("whole path on a core, and the goal", ours, GOAL_TOKENS, "tokens/s", 1.0)]
    for name in list(sides)[1:]:
        ours_too = "byte-level BPE" if name == "AutoTokenizer of it" else "whole path"
        results.append(result(f"{ours_too}, {name}", rates[ours_too], rates[name], "MB/s", None))
    return results


def texts_of(config: PrepConfig) -> list[str]:
    """The cleaned documents, in memory."""
    records = [record for unit in Plan(config).units for record in unit.records()]
    texts = [clean(record, config, Counter())[0] for record in records if isinstance(record, str)]
    return [text for text in texts if text]


def whole_path(config: PrepConfig, tokenizer: Tokenizer, output: Path) -> int:
    """Both passes, in this process."""
    shutil.rmtree(output, ignore_errors=True)
    plan = Plan(config.model_copy(update={"output": str(output)}))
    with plan.alone():
        plan.begin()
        for unit in plan.units:
            encode_unit(unit, tokenizer.path)
        records = [json.loads(unit.record.read_bytes()) for unit in plan.units]
        spills = [spill for record in records for spill in record["spills"]]
        write_json(plan.spills, {"train": spills})
        dtype = token_dtype(tokenizer.vocab_size)
        count = number_of_shards([Spill(**spill) for spill in spills], dtype.itemsize, config.shard_bytes)
        tokens = 0
        for number in range(count):
            shard = ShardUnit(plan.config, plan.digest, "train", number, count)
            merge_shard(shard, dtype.str, tokenizer.path)
            tokens += json.loads(shard.record.read_bytes())["shard"]["tokens"]
    return tokens


def sentence_piece_alone(config: PrepConfig, tokenizer: Tokenizer, texts: list[str]) -> Callable[[], int]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path), num_threads=1)
    split = splitter(config.language)
    sentences = [sentence for text in texts for sentence in split(text)]
    return lambda: sum(map(len, model.encode(sentences, out_type=int)))


def datasets_map(tokenizer: Tokenizer, texts: list[str], folder: Path) -> Callable[[], int]:
    import datasets  # type: ignore[import-not-found]  # for this comparison alone
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer.export_hugging_face(folder / "hugging-face", 512)
    fast = AutoTokenizer.from_pretrained(folder / "hugging-face", model_max_length=10**9)
    data = datasets.Dataset.from_dict({"text": texts})

    def run() -> int:
        encoded = data.map(
            lambda batch: {"input_ids": fast(batch["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            remove_columns=["text"],
            load_from_cache_file=False,
        )
        return int(sum(map(len, encoded.with_format("numpy")["input_ids"])))

    return run


def auto_tokenizer(tokenizer: Tokenizer, texts: list[str], folder: Path) -> Callable[[], int]:
    from transformers import AutoTokenizer

    tokenizer.export_hugging_face(folder, 512)
    fast = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    return lambda: sum(map(len, fast(texts, add_special_tokens=False)["input_ids"]))


def plain_loop(tokenizer: Tokenizer, texts: list[str], folder: Path) -> Callable[[], int]:
    """Words and punctuation, the longest piece first, a sentence at a time; instances pickled at the end."""
    vocabulary = {}
    for number in range(tokenizer.vocab_size):
        piece = tokenizer.piece(number)
        vocabulary[piece[1:] if piece.startswith("▁") else f"##{piece}"] = number

    def words(text: str) -> list[str]:
        characters = []
        for character in text:
            mark = unicodedata.category(character).startswith("P")
            characters.append(f" {character} " if mark else character)
        return "".join(characters).split()

    def pieces(word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word):
            end = len(word)
            while start < end:
                piece = word[start:end] if start == 0 else f"##{word[start:end]}"
                if piece in vocabulary:
                    break
                end -= 1
            if start == end:
                return [tokenizer.unk_id]
            ids.append(vocabulary[piece])
            start = end
        return ids

    def run() -> int:
        total, instances = 0, []
        for text in texts:
            document = []
            for sentence in re.split(r"(?<=[.!?])\s+", text):
                ids = [piece for word in words(sentence) for piece in pieces(word)]
                document.append(ids)
                total += len(ids)
            instances.append(document)
        with open(folder / "instances.pickle", "wb") as file:
            pickle.dump(instances, file)
        return total

    return run


# ----------------------------------------------------------------------------------------------- workers


def workers(config: PrepConfig, folder: Path, megabytes: int) -> list[dict[str, Any]]:
    """The command's whole work with one worker and with two."""
    many = folder / "many"
    many.mkdir()
    files = Plan(config).files
    size, copies = sum(file.size for file in files), 0
    while size * copies < megabytes * 1e6:
        for number, file in enumerate(files):
            end = "".join(Path(file.name).suffixes[-2:])
            (many / f"{copies:04d}-{number:06d}{end}").symlink_to(Path(file.name).resolve())
        copies += 1
    seconds, memory = {}, 0.0
    for count in (1, 2):
        values = {
            "input": [str(many)],
            "output": str(folder / f"workers-{count}"),
            "workers": count,
            "deduplicate": False,
            "split_bytes": max(1000, min(config.split_bytes, size * copies // 16)),
            "shard_bytes": max(1000, min(config.shard_bytes, size * copies // 16)),
        }
        command = [sys.executable, "-c", WHOLE_PREP, config.model_copy(update=values).model_dump_json()]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        took, most = map(float, done.stdout.splitlines()[-1].split())
        seconds[count], memory = took, max(memory, most)
        rate = size * copies / took / 1e6
        name = "1 worker" if count == 1 else f"{count} workers"
        print(f"{name}, {size * copies / 1e6:,.0f} MB of files:{rate:>10.1f} MB/s")
    ratio = seconds[1] / seconds[2]
    print(f"2 workers against 1: {ratio:.2f} (goal {GOAL_TWO_WORKERS})")
    print(f"most memory of a worker: {memory:.0f} MB (goal {GOAL_MEMORY})")
    rates = [size * copies / seconds[count] / 1e6 for count in (1, 2)]
    return [
        result("2 workers against 1", rates[1], rates[0], "MB/s", GOAL_TWO_WORKERS),
        result("memory of a worker, and the goal", memory, GOAL_MEMORY, "MB", 1.0, GOAL_MEMORY / memory),
    ]


def result(
    case: str, ours: float, peer: float, unit: str, goal: float | None, ratio: float | None = None
) -> dict[str, Any]:
    return {
        "case": case,
        "ours": round(ours, 2),
        "peer": round(peer, 2),
        "unit": unit,
        "ratio": round(ours / peer if ratio is None else ratio, 3),
        "goal": goal,
    }


def quickstart_corpus() -> Path:
    """Returns the quickstart's corpus; without it, the same corpus made in runs/benchmark."""
    existing = Path("runs/quickstart/corpus")
    if any(existing.glob("*.jsonl")):
        return existing
    folder = Path("runs/benchmark")
    subprocess.run([sys.executable, "-m", "data_prep.docstrings", str(folder)], check=True)
    return folder / "corpus"


if __name__ == "__main__":
    sys.exit(main())

"""The README.md of a task model: what it is, how it was trained, what it scored, how it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertscale import __version__
from bertscale.convert.task_names import task_class
from bertscale.export.card import fact_table, front_matter

if TYPE_CHECKING:
    from bertscale.finetune.loop import Job, Run
    from bertscale.tasks.task import Task, TaskData

MOST_LABELS = 50
TAGS = {
    "classification": "text-classification",
    "multi_label": "text-classification",
    "regression": "text-classification",
    "tokens": "token-classification",
    "question_answering": "question-answering",
}
# How transformers is told to answer as bertscale does.
PIPELINE = """from transformers import pipeline

model = pipeline("{tag}", "FOLDER"{options})
print(model({text}))
"""
OPTIONS = {
    "multi_label": ", top_k=None",
    "regression": ', function_to_apply="none"',
    "tokens": ', aggregation_strategy="first"',
}
QUESTION_ANSWERING = """import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForQuestionAnswering.from_pretrained("FOLDER")
batch = tokenizer("What is it?", "It is a book.", return_tensors="pt")
with torch.no_grad():
    scores = model(**batch)
begin, end = scores.start_logits.argmax(), scores.end_logits.argmax()
print(tokenizer.decode(batch["input_ids"][0, begin : end + 1]))
"""
MULTIPLE_CHOICE = """import torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForMultipleChoice.from_pretrained("FOLDER")
options = ["It is a book.", "It is a tree."]
batch = tokenizer(["What is it?"] * len(options), options, padding=True, return_tensors="pt")
with torch.no_grad():
    scores = model(**{key: value[None] for key, value in batch.items()})
print(options[scores.logits.argmax()])
"""


def model_card(job: Job, run: Run, record: dict[str, Any], data: TaskData[Any], task: Task[Any]) -> str:
    """Returns the card as Markdown, with the metadata that the Hugging Face hub reads."""
    figures = [
        f"| {which} | {name} | {value:.4f} |"
        for which in ("dev", "test")
        for name, value in record.get(which, {}).items()
    ]
    lines = [
        front_matter(TAGS.get(task.kind)),
        f"# {task.kind.replace('_', ' ').capitalize()} model\n",
        f"Fine-tuned by bertscale {__version__}.\n",
        *fact_table(_facts(job, run, record, data, task)),
        *(["| examples | figure | value |", "| --- | --- | --- |", *figures, ""] if figures else []),
        "FOLDER is the folder of this file. With transformers:\n",
        f"```python\n{usage(task.kind, pair=_are_pairs(data))}```\n",
        "With bertscale, which packs inputs without padding and reads files of any size (in Python, "
        '`bertscale.load_task_model("FOLDER")`):\n',
        "```\nbertscale predict FOLDER --input FILE --output PREDICTIONS.jsonl\n```\n",
    ]
    return "\n".join(lines)


def _facts(
    job: Job, run: Run, record: dict[str, Any], data: TaskData[Any], task: Task[Any]
) -> dict[str, str]:
    config, model = job.config, job.engine.sizes
    given = config.data
    files = {
        "train": ", ".join(Path(file.path).name for file in given.training_files),
        "dev": Path(given.dev).name if given.dev else f"{given.dev_share:g} of the training files",
        "test": Path(given.test or "").name,
    }
    sets = {"train": data.train, "dev": data.dev, "test": data.test}
    labels = ", ".join(task.labels[:MOST_LABELS])
    more = len(task.labels) - MOST_LABELS
    facts = {
        "class in transformers": task_class(model, task.kind),
        "encoder": f"{model.preset}, {model.num_hidden_layers} layers of {model.hidden_size}, "
        f"{job.engine.num_parameters():,} trained parameters",
        "labels": labels + (f", and {more:,} more" if more > 0 else ""),
        **{
            f"{name} examples": f"{len(examples):,} ({files[name]})"
            for name, examples in sets.items()
            if examples
        },
        "rows left out": f"{len(data.broken):,}" if data.broken else "",
        "training": f"{record['steps']:,} steps of {config.train.global_batch} examples, the weights of step "
        f"{record['best_step']:,}; seed {run.seed}",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}, layer "
        f"decay {config.optimizer.layer_decay:g}, weight decay {config.optimizer.weight_decay:g}",
        "longest sample": f"{config.samples.max_length:,} tokens",
    }
    facts |= {key.replace("_", " "): str(value) for key, value in task.facts().items()}
    return facts


def usage(kind: str, *, pair: bool) -> str:
    """Returns Python code that asks the model, in the folder FOLDER, by transformers."""
    if kind == "question_answering":
        return QUESTION_ANSWERING
    if kind == "multiple_choice":
        return MULTIPLE_CHOICE
    text = '{"text": "The first text.", "text_pair": "The second text."}' if pair else '"A text."'
    return PIPELINE.format(tag=TAGS[kind], options=OPTIONS.get(kind, ""), text=text)


def _are_pairs(data: TaskData[Any]) -> bool:
    return len(getattr(data.train[0], "texts", ())) == 2

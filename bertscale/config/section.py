"""Reads YAML and `key=value` overrides into a checked section of a config."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from bertscale.errors import UserError

# Names of other tools -> the last part of our keys; the first one that a section has is meant.
ELSEWHERE = {
    "lr": ("learning_rate",),
    "batch_size": ("global_batch",),
    "train_batch_size": ("global_batch",),
    "per_device_train_batch_size": ("micro_batch",),
    "micro_batch_size": ("micro_batch",),
    "max_steps": ("steps",),
    "num_epochs": ("epochs", "steps"),
    "num_train_epochs": ("epochs", "steps"),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "seq_length": ("max_length",),
    "warmup_ratio": ("warmup_fraction",),
    "mlm_probability": ("mask_rate",),
    "max_grad_norm": ("gradient_clipping",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "dtype": ("precision",),
    "model_type": ("preset",),
    "architecture": ("preset",),
    "model.name": ("preset",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "tensor_parallel": ("tensor",),
    "tp": ("tensor",),
    "no_cuda": ("device",),
    "use_cpu": ("device",),
    "cuda": ("device",),
    "accelerator": ("device",),
    "gpus": ("ranks", "gpus_per_node"),
    "output_dir": ("run", "output"),
    "lang": ("language",),
    "num_workers": ("workers",),
    "data.text_field": ("text",),  # of former fine-tunings; prep has a key of that name
    "label_field": ("label",),
    "freeze_encoder": ("freeze_layers",),
}


class Section(BaseModel):
    """A part of a config: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    former_keys: ClassVar[dict[str, str]] = {}  # name of a key in earlier versions -> its name now


Config = TypeVar("Config", bound=Section)


def load_config(section: type[Config], path: str | Path, overrides: Sequence[str]) -> Config:
    """Reads YAML at `path` over its `base`, if it names one, applies `key=value` overrides, checks the whole.

    A value is read as YAML (`train.steps=100`, `input=[a.txt, b.txt]`). Raises UserError that
    names each wrong key and value.
    """
    values, origin = read_values(path)
    return overridden(section, values, overrides, origin)


def read_values(path: str | Path) -> tuple[dict[str, Any], str]:
    """The values of a config file over those of its `base`, and what to call them in messages.

    Raises UserError where a file cannot be read.
    """
    values, files = _read(Path(path), ())
    return values, ", based on ".join(map(str, files))


def overridden(
    section: type[Config], values: dict[str, Any], overrides: Sequence[str], origin: str
) -> Config:
    """Applies `key=value` overrides to `values`, which change, and checks the whole. Raises UserError."""
    override_values(section, values, overrides, origin)
    return check_config(section, values, origin)


def override_values(
    section: type[Section], values: dict[str, Any], overrides: Sequence[str], origin: str
) -> None:
    """Applies `key=value` overrides to `values`, which change. Raises UserError."""
    _check_former_keys(section, values, origin)  # before an override puts a section in such a key's place
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not of the form key=value, such as train.steps=100")
        if key == "base":
            raise UserError(f"{override!r}: base belongs in the config file, not on the command line")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: the value is not YAML") from error
        if found := _colon_without_blank(value, key):
            pair, other = found
            raise UserError(f"{override!r}: YAML needs a blank after the colon: {{{pair}}}{other}")
        _set(values, key, value)


def check_config(section: type[Config], values: dict[str, Any], origin: str) -> Config:
    """Returns `values` as a checked `section`; raises UserError with one line for each wrong key."""
    _check_former_keys(section, values, origin)
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [_explain(section, problem) for problem in error.errors()]
        raise UserError("\n".join(f"{origin}: {line}" for line in lines)) from error


def _check_former_keys(section: type[Section], values: Any, origin: str) -> None:
    """Refuses keys of earlier versions and names the present ones; a present section may have such a name."""
    given = values if isinstance(values, dict) else {}
    lines = [
        f"{origin}: {key} is now {now}"
        for key, now in section.former_keys.items()
        if key in given and not isinstance(given[key], dict)
    ]
    if lines:
        raise UserError("\n".join(lines))


def describe_fields(section: type[Section], prefix: str = "", optional: str = "") -> list[tuple[str, str]]:
    """Returns (dotted key, description with the default) of every field, for the help texts.

    `optional` names the part of the config that these fields are in, where it may be left out.
    """
    rows = []
    for name, field in _keys(section).items():
        inner = _inner_section(field.annotation)
        if inner is not None:
            may_lack = not field.is_required() and field.default is None
            rows += describe_fields(inner, f"{prefix}{name}.", f"{prefix}{name}" if may_lack else "")
        else:
            value = field.get_default(call_default_factory=True)
            default = "optional" if value is None else f"default {value}"
            if field.is_required():
                default = f"required where there is {optional}" if optional else "required"
            rows.append((f"{prefix}{name}", f"{field.description} ({default})"))
    return rows


def _keys(section: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section by their keys in a config, which are those of Python where they may be."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _read(path: Path, based: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Returns the values of a config file merged over those of its base, and all files that they come from.

    `based` are the files that are based on this one, the nearest last.
    """
    values = _parse(path, f" (the base of {based[-1]})" if based else "")
    files = (*based, path)
    if "base" not in values:
        return values, files
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"the config {path}: base={base!r} is not the path of one config file")
    parent = path.parent / base
    if parent.resolve() in [file.resolve() for file in files]:
        circle = " -> ".join(map(str, [*files, parent]))
        raise UserError(f"the config {path}: base={base!r} closes a circle: {circle}; remove one base")
    below, files = _read(parent, files)
    return merged(below, values), files


def _parse(path: Path, role: str) -> dict[str, Any]:
    """Reads the values of one file; `role` says in messages what the file is for."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}{role}: {_reason(error)}{_moved(path)}") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"the config {path}{role} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"the config {path}{role} is not a mapping of keys to values")
    if found := _colon_without_blank(values):
        raise UserError(f"the config {path}{role}: YAML needs a blank after the colon: {{{found[0]}}}")
    return values


def _colon_without_blank(value: Any, key: str | None = None) -> tuple[str, str] | None:
    """Finds `{a:b}` in a value, which YAML reads as the key `a:b` alone; returns `a: b`, and with the key of
    the value also `, or give KEY.a=b`, but not from within a list."""
    if isinstance(value, list):
        return next((found for entry in value if (found := _colon_without_blank(entry))), None)
    for name, inner in value.items() if isinstance(value, dict) else ():
        before, colon, after = str(name).partition(":")
        if inner is None and colon and before and after:
            return f"{before}: {after}", f", or give {key}.{before}={after}" if key else ""
        if found := _colon_without_blank(inner, key and f"{key}.{name}"):
            return found
    return None


def _moved(path: Path) -> str:
    """Names the new place of a prep config that an earlier version shipped in configs/data."""
    if path.exists() or path.parts[-3:-1] != ("configs", "data"):
        return ""
    return f"; configs/data is now configs/prep: take {path.parent.with_name('prep') / path.name}"


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merges `above` over `below`: mappings key by key, while any other value replaces the one below."""
    whole = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            value = merged(below[key], value)
        whole[key] = value
    return whole


def _inner_section(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"{dotted}={value}: {parent} is a value, not a section")
        values = inner
    values[last] = value


def _explain(section: type[Section], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        here: type[Section] | None = section
        for part in location[:-1]:
            field = _keys(here).get(part) if here else None
            here = _inner_section(field.annotation) if field else None
        names = list(_keys(here)) if here else []
        near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        if close := difflib.get_close_matches(location[-1], names, n=1, cutoff=0.85):
            return f"unknown key {key}; did you mean {'.'.join([*location[:-1], close[0]])}?"
        # The last part of each key, in whatever section; of two equal ones the first.
        deep = {name.split(".")[-1]: name for name, _ in reversed(describe_fields(section))}
        named = ELSEWHERE.get(key, (location[-1], *ELSEWHERE.get(location[-1], ())))
        ours = [name for name in named if name in deep]
        if ours:
            return f"unknown key {key}; did you mean {deep[ours[0]]}?"
        if near:
            return f"unknown key {key}; did you mean {'.'.join([*location[:-1], near[0]])}?"
        if far := difflib.get_close_matches(location[-1], deep, n=1, cutoff=0.8):
            return f"unknown key {key}; did you mean {deep[far[0]]}?"
        return f"unknown key {key}; the keys here are {', '.join(names)}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "dict_type") and ":" in str(problem["input"]):
        message += "; YAML needs a blank after the colon"
    if problem["type"] == "value_error":
        return message if not key else f"{key}: {message}"
    return f"{key}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"

"""From raw text to a fine-tuned BERT-family model; these are the names for notebooks and scripts.

    import bertscale
    model = bertscale.load_model("runs/quickstart/pretrain")

docs/python.md has a runnable line for each of them; `bertscale --help` lists the commands. A name is loaded,
with the libraries that it needs, when it is first used: the package itself needs the standard library alone.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
_HOMES = {
    "UserError": "bertscale.errors",
    "iterate_batches": "bertscale.data.batches",
    "load_model": "bertscale.convert.weights",
    "load_task_model": "bertscale.finetune.predict",
    "load_tokenizer": "bertscale.tokenizer",
    "open_dataset": "bertscale.data.shards",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from bertscale.convert.weights import load_model
    from bertscale.data.batches import iterate_batches
    from bertscale.data.shards import open_dataset
    from bertscale.errors import UserError
    from bertscale.finetune.predict import load_task_model
    from bertscale.tokenizer import load_tokenizer
else:

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'bertscale' has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(_HOMES[name]), name)
        return value

    def __dir__():
        return __all__

"""A model as transformers builds it, and texts to run it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_convert.core.bundle import Checkpoint
from dora_convert.errors import InputError
from dora_convert.storage.oserrors import reading

__all__ = ["build_model", "read_lines"]


def read_lines(text: Path) -> list[str]:
    """One text a line, empty ones left out. Raises InputError for what holds none."""
    try:
        with reading(text):
            lines = [line for line in text.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{text.name} is not UTF-8 text", where=str(text)) from error
    if not lines:
        raise InputError(f"{text.name} holds no text", where=str(text), hint="One text a line.")
    return lines


def build_model(checkpoint: Checkpoint, purpose: str) -> tuple[Any, Any]:
    """The model of the class that the config names, in float32, and its tokenizer.

    Raises InputError, also where transformers is missing, which `purpose` needs.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"{purpose} needs transformers", hint='pip install "dora-convert[calibrate]"'
        ) from error
    bars: Any = transformers.utils.logging
    folder, names = checkpoint.root, checkpoint.config.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    cls = getattr(transformers, str(first), transformers.AutoModel)
    has_bar = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = cls.from_pretrained(folder, local_files_only=True, dtype="float32")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(
            "transformers cannot load this model and its tokenizer",
            where=str(folder),
            problems=[str(error).splitlines()[0] if str(error) else type(error).__name__],
        ) from error
    finally:
        if has_bar:
            bars.enable_progress_bar()
    return model.eval(), tokenizer

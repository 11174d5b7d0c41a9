"""With llama.cpp's scripts on the path: a GGUF of a model without a tokenizer."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main(source: Path, base: Path, out: str) -> None:
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion import get_model_class  # noqa: PLC0415
    from conversion.base import TextModel  # noqa: PLC0415
    from conversion.llama import LlamaModel  # noqa: PLC0415

    def set_vocab(model: TextModel) -> None:
        model._set_vocab_none()
        if not isinstance(model, LlamaModel):  # which tells it anyhow
            model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])

    (name,) = json.loads((base / "config.json").read_text())["architectures"]
    get_model_class(name).set_vocab = set_vocab
    sys.argv = ["convert_hf_to_gguf.py", str(base), "--outtype", "f32", "--outfile", out]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

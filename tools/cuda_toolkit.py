"""Decides whether the CUDA library is built, and with what. Asks nvcc and torch, never a device."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0+PTX")
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"


class CannotBuild(Exception):
    """Why no CUDA library can be built here; the message also says what helps."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit as its own nvcc describes it."""

    nvcc: str
    home: str
    version: str
    archs: tuple[str, ...]
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]

    def default_archs(self) -> str:
        """`DEFAULT_ARCHS` cut to what this nvcc knows; its newest if it knows none of them."""
        known = [arch for arch in DEFAULT_ARCHS if arch.removesuffix("+PTX") in self.archs]
        return ";".join(known or [f"{self.archs[-1]}+PTX"])

    def cudart(self) -> tuple[str, str]:
        """Folder and file name of the shared runtime library."""
        for folder in self.library_dirs:
            for found in sorted(Path(folder).glob("libcudart.so*")):
                return folder, found.name
        raise CannotBuild(
            f"libcudart.so is in none of {', '.join(self.library_dirs)}; install the toolkit's "
            "runtime (for example the package cuda-cudart-dev)"
        )


def choose(torch: Any, environ: Mapping[str, str] = os.environ) -> tuple[Toolkit | None, str]:
    """The toolkit to build the CUDA library with, or None and the reason.

    `DLDR_BUILD_CUDA=1` makes the reason an error, `0` builds for the CPU alone.
    """
    wish = environ.get("DLDR_BUILD_CUDA", "auto") or "auto"
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"DLDR_BUILD_CUDA: expected 0, 1 or auto, got {wish!r}")
    if wish == "0":
        return None, "DLDR_BUILD_CUDA=0"
    try:
        return find(torch, environ), ""
    except CannotBuild as reason:
        if wish == "1":
            raise SystemExit(
                f"DLDR_BUILD_CUDA=1, but no CUDA library can be built: {reason}"
            ) from None
        return None, str(reason)


def find(torch: Any, environ: Mapping[str, str] = os.environ) -> Toolkit:
    """The toolkit that fits this torch, or CannotBuild."""
    if getattr(torch.version, "hip", None):
        raise CannotBuild(f"torch {torch.__version__} is a ROCm build; there are no HIP kernels")
    if torch.version.cuda is None:
        raise CannotBuild(
            f"torch {torch.__version__} is a CPU-only build; install a CUDA build of torch "
            "in the environment that compiles"
        )
    toolkit = ask(find_nvcc(environ))
    if toolkit.version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise CannotBuild(
            f"{toolkit.nvcc} is CUDA {toolkit.version}, torch {torch.__version__} is built for "
            f"CUDA {torch.version.cuda}: the major versions must agree. Set CUDA_HOME to a toolkit "
            f"of CUDA {torch.version.cuda.split('.')[0]} or install a torch built for CUDA "
            f"{toolkit.version.split('.')[0]}"
        )
    toolkit.cudart()
    return toolkit


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str:
    """Path of nvcc: that of CUDA_HOME or CUDA_PATH if set, else of PATH, else the usual folder."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            nvcc = Path(environ[name]) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise CannotBuild(
                    f"{name} is {environ[name]}, but there is no {nvcc}; point {name} to a CUDA "
                    "toolkit, or unset it to take the nvcc on the PATH"
                )
            return str(nvcc)
    nvcc = shutil.which("nvcc", path=environ.get("PATH")) or USUAL_NVCC
    if not Path(nvcc).is_file():
        raise CannotBuild(
            "nvcc was not found (neither CUDA_HOME nor CUDA_PATH is set, it is not on the PATH, "
            f"and there is no {USUAL_NVCC}); install the CUDA toolkit or set CUDA_HOME"
        )
    return nvcc


def ask(nvcc: str) -> Toolkit:
    """What nvcc says of itself.

    The nvcc on the PATH may be a wrapper or a link, so that the folder above it is no toolkit:
    its dry run names the real one.
    """
    version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    dry = _output(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)
    if version is None or top is None:
        raise CannotBuild(f"{nvcc} does not answer as nvcc does; set CUDA_HOME to a CUDA toolkit")
    home = Path(top[1].strip()).resolve()
    codes = re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))
    numbers = sorted({int(code) for code in codes})
    includes, libraries = _folders(dry, "INCLUDES", "-I"), _folders(dry, "LIBRARIES", "-L")
    return Toolkit(
        nvcc=nvcc,
        home=str(home),
        version=version[1],
        archs=tuple(f"{number // 10}.{number % 10}" for number in numbers),
        include_dirs=_existing([*includes, home / "include"]),
        library_dirs=_existing([*libraries, home / "lib64", home / "lib"]),
    )


def arch_names(flags: list[str]) -> list[str]:
    """`-gencode` flags as the entries of TORCH_CUDA_ARCH_LIST that they stand for."""
    names: dict[str, str] = {}
    for kind, major, minor in re.findall(r"code=(sm|compute)_(\d+)(\d[af]?)", " ".join(flags)):
        arch = f"{major}.{minor}"
        suffix = "+PTX" if kind == "compute" else ""
        names[arch] = max(names.get(arch, ""), arch + suffix)
    return sorted(names.values(), key=lambda name: tuple(map(int, re.findall(r"\d+", name))))


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        raise CannotBuild(f"`{shlex.join(command)}` failed: {said}") from None
    return done.stdout + done.stderr


def _folders(dry: str, name: str, option: str) -> list[Path]:
    line = re.search(rf"^#\$ {name}=(.*)$", dry, re.MULTILINE)
    words = shlex.split(line[1]) if line else []
    return [Path(word.removeprefix(option)) for word in words if word.startswith(option)]


def _existing(folders: list[Path]) -> tuple[str, ...]:
    """The folders that exist, each once, without the compiler's own and the driver's stand-ins."""
    resolved = (folder.resolve() for folder in folders if folder.is_dir())
    kept = [f for f in resolved if f != Path("/usr/include") and f.name != "stubs"]
    return tuple(dict.fromkeys(str(folder) for folder in kept))

"""The compiled op libraries: found and loaded, or an error that says what is wrong."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parents[1]
_CPU_LIBRARY = _HERE / "_C.so"
_CUDA_LIBRARY = _HERE / "_C_cuda.so"
#: Oldest torch whose stable ABI the libraries are compiled for.
TORCH_TARGET = "2.10"
_REINSTALL = (
    "pip install --no-build-isolation --no-deps --force-reinstall --no-binary dldr_ext dldr_ext"
)
_HELP = "Every case is explained in docs/building.md."


def build_metadata() -> dict[str, Any]:
    """Return what the libraries were built with (setup.py writes it); empty if never built."""
    path = _HERE / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _registered() -> bool:
    return hasattr(torch.ops.dldr_ext, "project")


def _running() -> str:
    return (
        f"found: torch {torch.__version__} (CUDA {torch.version.cuda}), "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )


def _built() -> str:
    build = build_metadata()
    if not build:
        return "built with unknown settings"
    archs = f" for {', '.join(build['cuda_archs'])}" if build["cuda"] else ""
    cuda = f"CUDA {build['cuda']}{archs}" if build["cuda"] else "without CUDA"
    return f"built {cuda}, with torch {build['torch']}, {build['compiler']}, on {build['machine']}"


def load() -> None:
    """Load `_C` and, where torch has CUDA and the library is there, `_C_cuda`."""
    if _version(torch.__version__.split("+")[0]) < _version(TORCH_TARGET):
        raise ImportError(
            f"dldr_ext needs torch >= {TORCH_TARGET}; {_running()}. Upgrade it with "
            f"`pip install 'torch>={TORCH_TARGET}'`."
        )
    if _registered():
        return
    if not _CPU_LIBRARY.is_file():
        raise ImportError(
            f"dldr_ext: the compiled library {_CPU_LIBRARY.name} is missing beside {_HERE.name}/"
            "__init__.py. If this is a source checkout, build it with "
            f"`pip install --no-build-isolation -e .` in its folder; {_running()}"
        )
    with_cuda = torch.version.cuda is not None and _CUDA_LIBRARY.is_file()
    if with_cuda:
        _check_cuda_major()
    _load_library(_CPU_LIBRARY)
    if with_cuda:
        _load_library(_CUDA_LIBRARY)


def _version(release: str) -> tuple[int, ...]:
    """Return the major and minor version."""
    return tuple(int(number) for number in release.split(".")[:2])


def _check_cuda_major() -> None:
    built, running = build_metadata().get("cuda"), torch.version.cuda
    if built is None or running is None or built.split(".")[0] == running.split(".")[0]:
        return
    raise ImportError(
        f"dldr_ext: this wheel is for CUDA {built.split('.')[0]} ({_built()}), torch is for CUDA "
        f"{running.split('.')[0]}; {_running()}. Install the wheel whose +cuNNN has torch's CUDA "
        f"major version, or build it here: `DLDR_BUILD_CUDA=1 {_REINSTALL}`. {_HELP}"
    )


def _load_library(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"dldr_ext: {path.name} could not be loaded: {error}. It was {_built()}; {_running()}."
            f" Build it for this machine with `{_REINSTALL}`. {_HELP}"
        ) from error


def cuda_loaded() -> bool:
    """Return whether the CUDA kernels are registered."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("dldr_ext::project", "CUDA")


def cuda_problem() -> str | None:
    """Return why the CUDA kernels are not loaded and how to get them; None if they are."""
    if cuda_loaded():
        return None
    if torch.version.cuda is None:
        reason, first = f"torch {torch.__version__} is a CPU-only build", "a CUDA build of torch, "
    else:
        reason = f"this installation of dldr_ext has no {_CUDA_LIBRARY.name} ({_built()})"
        first = ""
    return (
        f"not loaded: {reason}. Install {first}a wheel with +cuNNN in its version, or build one "
        f"there: `DLDR_BUILD_CUDA=1 {_REINSTALL}`. {_HELP}"
    )


def device_problem(device: torch.device) -> str | None:
    """Return why the ops cannot run on a device, and what helps; None if they should."""
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"the ops run on cpu and cuda, got a tensor on {device}"
    rebuild = f"`DLDR_BUILD_CUDA=1 {_REINSTALL}`"
    if not cuda_loaded():
        reason = build_metadata().get("without_cuda_because")
        return (
            f"got a tensor on {device}, but this installation of dldr_ext has no CUDA kernels "
            f"({_built()}{f': {reason}' if reason else ''}); {_running()}. Install a wheel "
            f"with +cuNNN in its version, or build one here: {rebuild}. {_HELP}"
        )
    archs = build_metadata().get("cuda_archs", [])
    capability = torch.cuda.get_device_capability(device)
    if any(_runs(arch, capability) for arch in archs):
        return None
    wanted = f"{capability[0]}.{capability[1]}"
    return (
        f"{torch.cuda.get_device_name(device)} ({device}) has compute capability {wanted}, but "
        f"dldr_ext was {_built()}; {_running()}. Build it for this device: "
        f"`TORCH_CUDA_ARCH_LIST={wanted}` before {rebuild}. {_HELP}"
    )


def usable_device(name: str) -> torch.device:
    """Return the device of a name, if the ops run there.

    Raises
    ------
    ValueError
        Another kind of device, one that torch does not find, one without kernels.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected cpu or cuda, also as cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"expected one of the {count} CUDA devices that torch {torch.__version__} finds, got "
            f"{name!r}"
        )
    if problem := device_problem(device):
        raise ValueError(problem)
    return device


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Return whether code for an entry of TORCH_CUDA_ARCH_LIST runs on a device.

    Machine code runs on its own major version from its minor version on, PTX on anything newer;
    with the suffix `a` either runs on exactly that capability, with `f` on its major version.
    """
    major, minor, suffix, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch).groups()  # type: ignore[union-attr]
    built = (int(major), int(minor))
    if suffix == "a":
        return capability == built
    same_major = capability[0] == built[0] and capability[1] >= built[1]
    return same_major or (ptx is not None and not suffix and capability >= built)

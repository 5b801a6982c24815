"""The build's own tools: which toolkit is taken and why not, ptxas report, package index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urldefrag
from zipfile import ZipFile

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import cuda_toolkit
import ptxas_report
import wheel_index

TOOLS = Path(cuda_toolkit.__file__).parent
TESTS = Path(__file__).resolve().parents[1]
# Not run on a built wheel: they need the source tree, or do not depend on torch's release.
SOURCES_ALONE = {
    "benchmarks", "build", "cli", "demo", "docs", "integrations", "kernels", "support",
}  # fmt: skip


def test_every_folder_of_tests_runs_on_wheels_or_is_known_not_to():
    listed = (TESTS / "wheel_folders.txt").read_text().split()
    on_wheels = {name.removeprefix("tests/") for name in listed}
    folders = {path.parent.name for path in TESTS.glob("*/*.py")}
    assert folders == on_wheels | SOURCES_ALONE and not on_wheels & SOURCES_ALONE


def torch_for(cuda: str | None, hip: str | None = None) -> SimpleNamespace:
    version = SimpleNamespace(cuda=cuda, hip=hip)
    return SimpleNamespace(__version__="2.14.1", version=version)


@pytest.fixture
def toolkit(tmp_path) -> Path:
    """A toolkit whose nvcc answers as CUDA 13.0's does, as far as the build asks."""
    home = tmp_path / "cuda-13.0"
    (home / "bin").mkdir(parents=True)
    (home / "targets/x86_64-linux/include").mkdir(parents=True)
    (home / "targets/x86_64-linux/lib/stubs").mkdir(parents=True)
    (home / "targets/x86_64-linux/lib/libcudart.so.13").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --list-gpu-arch) printf 'compute_%s\\n' 75 80 90 100 120 ;;
  --dryrun) cat >&2 <<END
#$ TOP={home}/bin/..
#$ INCLUDES="-I{home}/bin/../targets/x86_64-linux/include"
#$ LIBRARIES=  "-L{home}/targets/x86_64-linux/lib/stubs" "-L{home}/targets/x86_64-linux/lib"
END
  ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return home


@pytest.fixture
def wrapper(tmp_path, toolkit) -> dict[str, str]:
    """An environment whose PATH has nvcc as a wrapper script, with no toolkit around it."""
    folder = tmp_path / "local" / "bin"
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    (folder / "nvcc").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_toolkit_behind_a_wrapper_is_found(wrapper, toolkit):
    found, reason = cuda_toolkit.choose(torch_for("13.1"), wrapper)
    assert reason == ""
    assert found.home == str(toolkit)
    assert found.version == "13.0"
    assert found.archs == ("7.5", "8.0", "9.0", "10.0", "12.0")
    assert found.include_dirs == (str(toolkit / "targets/x86_64-linux/include"),)
    assert found.library_dirs == (str(toolkit / "targets/x86_64-linux/lib"),)
    assert found.cudart() == (found.library_dirs[0], "libcudart.so.13")


def test_cuda_home_comes_first(wrapper, toolkit):
    found = cuda_toolkit.find(torch_for("13.0"), wrapper | {"CUDA_HOME": str(toolkit)})
    assert found.nvcc == str(toolkit / "bin" / "nvcc")


@pytest.mark.parametrize(
    "known, expected",
    [
        (("8.0", "9.0", "10.0", "12.0", "12.1"), "8.0;9.0;10.0;12.0+PTX"),
        (("7.5", "8.0", "9.0"), "8.0;9.0"),
        (("6.0", "7.0"), "7.0+PTX"),
    ],
)
def test_the_default_architectures_are_cut_to_what_nvcc_knows(known, expected):
    toolkit = cuda_toolkit.Toolkit("nvcc", "", "13.0", known, (), ())
    assert toolkit.default_archs() == expected


@pytest.mark.parametrize(
    "torch, environment, said",
    [
        (torch_for(None), {}, "torch 2.14.1 is a CPU-only build; install a CUDA build of torch"),
        (torch_for(None, hip="6.4"), {}, "ROCm build"),
        (torch_for("12.8"), {}, "is CUDA 13.0, torch 2.14.1 is built for CUDA 12.8: the major"),
        (torch_for("13.0"), {"CUDA_HOME": "/nowhere"}, "CUDA_HOME is /nowhere, but there is no"),
        (torch_for("13.0"), {"CUDA_PATH": "/nowhere"}, "CUDA_PATH is /nowhere, but there is no"),
    ],
)
def test_what_keeps_cuda_from_being_built_is_said(torch, environment, said, wrapper):
    found, reason = cuda_toolkit.choose(torch, wrapper | environment)
    assert found is None
    assert said in reason
    with pytest.raises(
        SystemExit, match="DLDR_BUILD_CUDA=1, but no CUDA library can be built: "
    ) as e:
        cuda_toolkit.choose(torch, wrapper | environment | {"DLDR_BUILD_CUDA": "1"})
    assert said in str(e.value)


def test_a_missing_nvcc_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_toolkit, "USUAL_NVCC", str(tmp_path / "nvcc"))
    _, reason = cuda_toolkit.choose(torch_for("13.0"), {"PATH": str(tmp_path)})
    assert "nvcc was not found" in reason
    assert "set CUDA_HOME" in reason


def test_a_missing_runtime_library_is_said(wrapper, toolkit):
    (toolkit / "targets/x86_64-linux/lib/libcudart.so.13").unlink()
    _, reason = cuda_toolkit.choose(torch_for("13.0"), wrapper)
    assert "libcudart.so is in none of" in reason


def test_an_nvcc_that_fails_is_quoted(wrapper, toolkit):
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho 'no license' >&2\nexit 3\n")
    _, reason = cuda_toolkit.choose(torch_for("13.0"), wrapper)
    assert "--version` failed: no license" in reason


def test_cuda_can_be_forbidden_and_a_typing_error_is_refused(wrapper):
    refused = wrapper | {"DLDR_BUILD_CUDA": "0"}
    assert cuda_toolkit.choose(torch_for("13.0"), refused) == (None, "DLDR_BUILD_CUDA=0")
    with pytest.raises(SystemExit, match="DLDR_BUILD_CUDA: expected 0, 1 or auto, got 'yes'"):
        cuda_toolkit.choose(torch_for("13.0"), wrapper | {"DLDR_BUILD_CUDA": "yes"})


def test_architecture_flags_are_named_as_torch_names_them():
    flags = [
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_120,code=compute_120",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    assert cuda_toolkit.arch_names(flags) == ["9.0a", "10.0", "12.0+PTX"]


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4dldr1fIfEEvPf' for 'sm_90'
ptxas info    : Function properties for _ZN4dldr1fIfEEvPf
    16 bytes stack frame, {spill} bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _ZN4dldr6helperEv
    64 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compiling entry function '_ZN4dldr1gEv' for 'sm_80'
ptxas info    : Function properties for _ZN4dldr1gEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 376 bytes cmem[0]
"""


def test_ptxas_output_is_read():
    spilling, clean = ptxas_report.parse(PTXAS.format(spill=12))
    assert spilling == {
        "kernel": "_ZN4dldr1fIfEEvPf",
        "arch": "90",
        "shared": 512,
        "stack": 16,
        "spill_stores": 12,
        "spill_loads": 8,
        "registers": 96,
    }
    assert (clean["registers"], clean["stack"], clean["shared"]) == (24, 0, 0)
    assert ptxas_report.spilling([spilling, clean]) == [spilling]


def test_the_report_fails_on_spills_alone(tmp_path):
    def report(*more: str) -> subprocess.CompletedProcess:
        command = [TOOLS / "ptxas_report.py", tmp_path, "--json", tmp_path / "report.json", *more]
        return subprocess.run([sys.executable, *command], capture_output=True, text=True)

    assert "build the CUDA library first" in report().stderr
    (tmp_path / "project.o.ptxas").write_text(PTXAS.format(spill=12))
    done = report()
    assert done.returncode != 0
    assert "1 of 2 compiled kernels spill registers" in done.stderr
    assert report("--arch", "90").returncode != 0
    elsewhere = report("--arch", "80")
    assert elsewhere.returncode == 0
    assert "spills on sm_90" in elsewhere.stderr
    clean = "".join(PTXAS.splitlines(keepends=True)[7:])
    (tmp_path / "project.o.ptxas").write_text(clean)
    done = report()
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "report.json").read_text())
    assert record["file"] == "project.cu"
    assert record["registers"] == 24


def test_names_are_shortened_for_reading():
    name = "void dldr::cuda::(anonymous namespace)::f<float, (int)4>(dldr::List<(int)2>, float*)"
    assert ptxas_report.short(name) == "f<float, (int)4>"


def test_nvccs_words_on_registers_are_kept_and_the_rest_is_shown(tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        "#!/bin/sh\necho 'ptxas info    : Used 9 registers' >&2\necho 'a warning' >&2\nexit 7\n"
    )
    compiler.chmod(0o755)
    command = ["sh", TOOLS / "nvcc_keep_ptxas.sh", compiler, "-c", "x.cu", "-o", tmp_path / "x.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 7
    assert done.stderr == "a warning\n"
    assert "Used 9 registers" in (tmp_path / "x.o.ptxas").read_text()


def test_an_index_that_pip_reads(tmp_path):
    """The link of the page leads to the wheel, with its hash and its Python."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    name = "dldr_ext-0.1.0+cu130-py3-none-manylinux_2_28_x86_64.whl"
    with ZipFile(wheels / name, "w") as archive:
        archive.writestr(
            "dldr_ext-0.1.0+cu130.dist-info/METADATA", "Name: dldr_ext\nRequires-Python: >=3.10\n"
        )
    wheel_index.write_index(wheels, tmp_path / "public")
    links = Links()
    page = tmp_path / "public" / "dldr-ext" / "index.html"
    links.feed(page.read_text())
    ((attributes, text),) = links.found
    address, fragment = urldefrag(attributes["href"])
    assert text == name
    assert (page.parent / unquote(address)).resolve() == wheels / name
    assert "+" not in address
    assert fragment.startswith("sha256=") and len(fragment) == len("sha256=") + 64
    assert attributes["data-requires-python"] == ">=3.10"
    top = Links()
    top.feed((tmp_path / "public" / "index.html").read_text())
    assert top.found == [({"href": "dldr-ext/"}, "dldr-ext")]


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[dict, str]] = []
        self.open: dict | None = None

    def handle_starttag(self, tag, attributes):
        self.open = dict(attributes) if tag == "a" else None

    def handle_data(self, data):
        if self.open is not None and data.strip():
            self.found.append((self.open, data))
            self.open = None


def test_an_index_without_wheels_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no wheels in"):
        wheel_index.write_index(tmp_path, tmp_path / "public")

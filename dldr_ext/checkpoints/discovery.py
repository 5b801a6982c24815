"""The checkpoints that a list of files and folders stands for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from .errors import CheckpointError, reason
from .foreign import in_folder
from .order import in_order, named_progress, natural_key, run_and_step
from .state_dicts import is_copy

SUFFIXES = (
    ".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".th", ".pt.tar", ".pth.tar", ".ckpt.tar"
)  # fmt: skip
_SUFFIX = re.compile(rf"(?:{'|'.join(map(re.escape, SUFFIXES))})$", re.IGNORECASE)
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
#: Of a folder of torch.distributed.checkpoint.
METADATA = ".metadata"
#: In a file of torch.save, or a folder of torch.distributed.checkpoint, that this package wrote.
KIND_RECORD = "dldr_ext.json"
# A folder of one model, as libraries write it: optimizer.pt and others lie beside.
_MODEL = re.compile(
    r"(?:model|adapter_model|pytorch_lora_weights)(?:\.[\w-]+)?\.safetensors"
    r"|(?:pytorch_model|diffusion_pytorch_model|open_clip_pytorch_model|open_clip_model"
    r"|adapter_model|pytorch_lora_weights)(?:\.[\w-]+)?\.(?:safetensors|bin)"
    r"|mp_rank_00_model_states\.pt"
)
_MODEL_SUFFIX = re.compile(r"(?:\.safetensors|\.bin)(?:\.index\.json)?$")
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.\w+")
# Of one rank, layer or expert of a model that several files make up.
_PART = re.compile(
    r"(?<![a-z])(?:(?:mp|tp|pp|dp)?_?(?:rank|shard)[-_]?\d+|consolidated\.\d+\."
    r"|layer_\d+-model(?:_\d+-model)?|layer_\d+_expert_\d+_)",
    re.IGNORECASE,
)
_COMPONENTS = {"unet", "vae", "transformer", "text_encoder", "text_encoder_2", "controlnet"}
# What a run saves beside the weights.
_BESIDE = re.compile(
    r"(?:optimi[sz]er|optim|opt|(?:lr_)?sched(?:uler)?|(?:grad_)?scaler|rng|rng_states?"
    r"|random_states?|training_args|args|sampler|dataloader|zero_pp_rank|tokenizer|vocab)(?![a-z]).*"
    r"|.*[_.-](?:optimi[sz]er|optim|opt|optim_states|scheduler|scaler|rng_state)(?:_\d+)?",
    re.IGNORECASE,
)
_STEP_FOLDER = re.compile(
    r"\d+|(?:.*[^a-z])?(?:check_?point|ckpt|epochs?|ep|e|global_?step|steps?|iter(?:ation)?s?|it"
    r"|update)[-_=. ]*\d.*",
    re.IGNORECASE,
)
_LAST = re.compile(r"(?<![a-z])(?:best|last|final|latest|newest)(?![a-z])", re.IGNORECASE)
# Names for the state of a run wherever it stands, beside steps with numbers.
_CURRENT = re.compile(
    r"(?:checkpoint|ckpt|model|state|weights|network|net|snapshot|current|resume"
    r"|(?:model|training|train)_state)",
    re.IGNORECASE,
)
_UNFINISHED = re.compile(r"(?<![a-z])(?:tmp|temp|partial|incomplete)(?![a-z])", re.IGNORECASE)
_NO_RUN = re.compile(r"__|(?:wandb|mlruns|blobs)$")  # folders of Python, of loggers, of caches
_DEPTH = 4  # of folders in folders
_PEEKED = 1000  # files without a known suffix that are looked into
_HEAD = 4096  # bytes at the start of a file, in which it says that this package wrote it


class Found(NamedTuple):
    """A checkpoint."""

    path: Path  # what is read: a file, an index of shards, a folder of distributed checkpoints
    entry: Path  # what stands for it in the folder of the run: the same, or a folder around it
    argument: int  # the place of the path that it was found at
    same: int | None = None  # the place in the list of an earlier one that is the same file


def find_checkpoints(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Path]:
    """List the checkpoints that files and folders stand for, in order.

    Parameters
    ----------
    paths : path or iterable of paths
        A file is a checkpoint. A folder is one checkpoint if it is one of
        torch.distributed.checkpoint, or holds an index of shards or a file that libraries name so
        (``model.safetensors``, ``adapter_model.bin``, ...), and no folders of steps beside; else it
        stands for the checkpoint files in it, or else for the checkpoints in its folders. They are
        in the order of the epochs, steps and numbers in their names (2 before 10), or else of their
        times.

    Returns
    -------
    list of Path
        One for each checkpoint: the index, if it consists of shards.

    Raises
    ------
    CheckpointError
        A folder without checkpoints, one that cannot be listed, one of several runs.
    ValueError
        No path at all.
    """
    return [found.path for found in discover(paths)[0] if found.same is None]


def discover(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> tuple[list[Found], list[str]]:
    """Return the checkpoints as `find_checkpoints` does, with notes on what was passed over."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    checkpoints: list[Found] = []
    notes: list[str] = []
    seen: dict[object, int] = {}
    for argument, path in enumerate(map(Path, paths)):
        inside = _Folder(path, notes).checkpoints() if path.is_dir() else [(path, path)]
        for file, entry in inside:
            identity = _identity(file)
            same = None if identity is None else seen.setdefault(identity, len(checkpoints))
            if same is None or same == len(checkpoints):
                checkpoints.append(Found(file, entry, argument))
                continue
            notes.append(f"{entry} is the same as {checkpoints[same].entry}: counts once")
            if checkpoints[same].argument != argument:
                checkpoints.append(Found(file, entry, argument, same))
    if not checkpoints:
        raise ValueError("checkpoints: expected at least one file or folder, got none")
    return checkpoints, list(dict.fromkeys(notes))


class _Empty(CheckpointError):
    """A folder that holds no checkpoint."""


class _Folder:
    """A folder, and the checkpoints in it: of each what is read, and what stands for it."""

    def __init__(self, path: Path, notes: list[str], depth: int = _DEPTH) -> None:
        self.path, self._notes, self._depth = path, notes, depth
        try:
            visible = [p for p in path.iterdir() if p.name[0] != "." or p.name == METADATA]
            self._inside = sorted(visible, key=natural_key)
        except OSError as error:
            raise CheckpointError(path, reason(error)) from error
        self._names = {p.name for p in self._inside}
        self._own: list[Path] = []

    def checkpoints(self) -> list[tuple[Path, Path]]:
        """Return them in the order of their names; there is at least one."""
        try:
            found = self._of_others()
        except _Empty:
            if not self._own or self._depth < _DEPTH:
                raise
            model = self._model(self._own)  # of an average that was named
            return self._selected(self._own) if model is None else [(model, self.path)]
        self._pass_over("written by dldr", self._own)
        return found

    def _of_others(self) -> list[tuple[Path, Path]]:
        """Return those that this package has not written."""
        if METADATA in self._names:
            if self._depth < _DEPTH and is_own(self.path / KIND_RECORD):
                raise _Empty(self.path, "expected a checkpoint, found an average that dldr wrote")
            return [(self.path, self.path)]
        files = self._files()
        model = self._model(files)
        folders = [p for p in self._folders() if _STEP_FOLDER.fullmatch(p.name)]
        steps = [p for p in folders if not _UNFINISHED.search(p.name)]
        self._pass_over("not whole, by their names", _without(folders, steps))
        whole, steps = steps, _steps(steps) or steps
        self._pass_over("not among the steps of the run", _without(whole, steps))
        others = [p for p in files if not _MODEL.fullmatch(p.name)]
        numbered = [p for p in others if _number(p) and not _is_apart(p)]
        if len(numbered) > 1 and "random_states_0.pkl" not in self._names:
            self._pass_over("beside files of steps", [*filter(None, [model]), *steps])
            return self._selected(others)
        if model is not None and all(p.name.startswith("global_step") for p in steps):
            return self._of_model(model, files)
        if found := self._each(steps, needed=model is None and not files):
            rest = [p for p in _without(self._folders(), folders) if _holds_weights(p)]
            index = [] if model is None or model in files else [model]
            self._pass_over("beside folders of steps", [*index, *files, *rest])
            paths = list(found)
            self._check_one_run(paths)
            return [(self._only(paths[i], found[paths[i]]), paths[i]) for i in in_order(paths)[0]]
        if model is not None:
            return self._of_model(model, files)
        if files:
            return self._selected(files)
        return self._of_folders()

    def _of_model(self, model: Path, files: list[Path]) -> list[tuple[Path, Path]]:
        """Return the one checkpoint of a folder, and say what other weights are in it."""
        name = _MODEL_SUFFIX.sub("", model.name)
        rest = [p for p in files if _MODEL_SUFFIX.sub("", p.name) != name]
        rest += [p for p in self._folders() if "step" not in p.name and _holds_weights(p)]
        self._pass_over(f"beside {model.name}", rest)
        return [(model, self.path)]

    def _files(self) -> list[Path]:
        """Return the files that may be checkpoints."""
        inside = [p for p in self._inside if p.is_file()]
        files = [p for p in inside if p.name.lower().endswith(SUFFIXES)]
        if not files and self._depth == _DEPTH:
            files = [p for p in inside[:_PEEKED] if _is_of_torch(p)]
        self._own = [p for p in files if is_own(p)]
        files = _without(files, self._own)
        lost = [p for p in self._inside if p.is_symlink() and not p.exists()]
        self._pass_over("links to nothing", [p for p in lost if p.name.endswith(SUFFIXES)])
        self._check_whole(files)
        beside = [path for path in files if _BESIDE.fullmatch(_stem(path))]
        if len(beside) == len(files) and self._depth == _DEPTH:
            return files  # of the folder that was named: reading says what they are
        if not any(_MODEL.fullmatch(path.name) for path in files):
            self._pass_over("no weights, by their names", beside)
        return _without(files, beside)

    def _check_whole(self, files: list[Path]) -> None:
        """Refuse parts of a model that nothing says how to put together."""
        if any(re.match(r"zero_pp_rank_\d+_mp_rank_\d+_model_states", p.name) for p in files):
            raise CheckpointError(
                self.path,
                "expected whole weights, found the parts of DeepSpeed's ZeRO stage 3: write them "
                "whole with the zero_to_fp32.py beside them",
            )
        self._check_parts([p for p in files if not _BESIDE.fullmatch(_stem(p))])
        for path in files:
            shard = _SHARD.fullmatch(path.name)
            if shard and not any(name.endswith(INDEX_SUFFIXES) for name in self._names):
                raise CheckpointError(
                    self.path,
                    f"expected the index of the shards ({shard[1]}{path.suffix}.index.json), found "
                    f"{path.name} without one",
                )

    def _check_parts(self, paths: list[Path]) -> None:
        """Refuse files or folders of several ranks, layers or experts of one model."""
        ranks: dict[str, list[Path]] = {}
        for path in paths:
            if _PART.search(path.name):
                ranks.setdefault(_PART.sub("", path.name), []).append(path)
        parts = next((same for same in ranks.values() if len(same) > 1), None)
        if parts is not None:
            raise CheckpointError(
                self.path,
                f"expected whole weights, found {len(parts)} parts of one model "
                f"({_listed(parts)}): put them together with the library that wrote them, or name "
                "one if each is whole",
            )

    def _model(self, files: list[Path]) -> Path | None:
        """Return the file that a folder of one model is read from, None for another folder."""
        indices = [p for p in self._inside if p.name.endswith(INDEX_SUFFIXES)]
        shards = {name for path in indices for name in _shards(path)}
        if self._depth < _DEPTH and any(is_own(self.path / name) for name in shards):
            indices = []
        files[:] = [p for p in files if p.name not in shards]
        found = indices or [p for p in files if _MODEL.fullmatch(p.name)]
        adapter = "adapter_config.json" in self._names

        def key(path: Path) -> tuple[bool, int, bool, str]:
            is_adapter = path.name.startswith("adapter_model")
            return is_adapter != adapter, path.name.count("."), ".bin" in path.name, path.name

        return min(found, key=key, default=None)

    def _folders(self) -> list[Path]:
        """Return the folders in which checkpoints may be, each under one name."""
        once: dict[object, Path] = {}
        for path in sorted(self._inside, key=lambda p: (p.is_symlink(), _is_apart(p))):
            if _NO_RUN.match(path.name) or _BESIDE.fullmatch(path.name) or not path.is_dir():
                continue
            first = once.setdefault(_identity(path) or path, path)
            if first is not path:
                note = f"{path} is the same folder as {first.name}: counts once"
                self._notes += [] if note in self._notes else [note]
        names = set(once.values())
        return [path for path in self._inside if path in names]

    def _each(
        self, folders: Sequence[Path], needed: bool = True
    ) -> dict[Path, list[tuple[Path, Path]]]:
        """Return the checkpoints in each folder that has any."""
        found: dict[Path, list[tuple[Path, Path]]] = {}
        errors: list[CheckpointError] = []
        said: dict[str, list[str]] = {}  # by what several folders say alike
        for path in folders if self._depth else ():
            notes: list[str] = []
            try:
                found[path] = _Folder(path, notes, self._depth - 1).checkpoints()
            except _Empty as error:
                if _STEP_FOLDER.fullmatch(path.name):
                    self._notes.append(f"passed over {error}")
                continue
            except CheckpointError as error:
                errors.append(error)
            for note in notes:
                said.setdefault(note.replace(str(path), str(self.path / "*")), []).append(note)
        if errors and not found and needed:
            raise errors[0]
        self._notes += [alike if len(notes) > 1 else notes[0] for alike, notes in said.items()]
        self._notes += [f"passed over {error}" for error in errors]
        return found

    def _selected(self, files: list[Path]) -> list[tuple[Path, Path]]:
        """Return those of the files that are steps of the run, in order, each once."""
        once: dict[object, Path] = {}
        for path in sorted(files, key=lambda p: (p.is_symlink(), _is_apart(p), not _number(p))):
            first = once.setdefault(_identity(path) or path, path)
            if first is not path:
                self._notes.append(f"{path} is the same file as {first.name}: counts once")
        firsts = set(once.values())
        kept = [path for path in files if path in firsts]
        steps = [p for p in kept if _stem(p).isdecimal()]
        if len(steps) < 2:
            steps = _steps(kept)
        if sum(map(_number, steps)) > 1:
            steps = [p for p in steps if not _CURRENT.fullmatch(_stem(p))]
        if steps:
            self._pass_over("not among the steps of the run", _without(kept, steps))
        counted = steps or kept
        self._check_one_of_each_step(counted)
        self._check_one_run(counted)
        return [(counted[i], counted[i]) for i in in_order(counted)[0]]

    def _check_one_of_each_step(self, files: list[Path]) -> None:
        """Refuse two files for each step, of two models: G_1.pt, D_1.pt, G_2.pt, D_2.pt."""
        numbers: dict[str, set[str]] = {}
        for path in files:
            family = re.sub(r"\d+", "*", path.name)
            numbers.setdefault(family, set()).add(" ".join(re.findall(r"\d+", path.name)))
        steps: dict[frozenset[str], list[str]] = {}
        for family, told in numbers.items():
            steps.setdefault(frozenset(told), []).append(family)
        twice = next((same for told, same in steps.items() if len(told) > 1 < len(same)), None)
        if twice is not None:
            raise CheckpointError(
                self.path,
                f"expected one checkpoint of each step, found {' and '.join(twice)}: name those of "
                f"one, as {self.path / twice[0]}, or all",
            )

    def _check_one_run(self, paths: Sequence[Path]) -> None:
        """Refuse the steps of several runs: fold0_epoch1.pt, ..., fold1_epoch1.pt, ..."""
        runs: dict[str, dict[tuple[float, ...], Path]] = {}
        for path in paths:
            if told := run_and_step(_stem(path)):
                runs.setdefault(told[0], {}).setdefault(told[1], path)
        for (one, steps), (other, others) in combinations(runs.items(), 2):
            if len(steps.keys() & others.keys()) > 1:
                names = [next(iter(same.values())).name for same in (steps, others)]
                raise CheckpointError(
                    self.path,
                    f"expected one run, found steps of several: {', '.join(names)}, ...: name "
                    f"those of one, as {self.path / (one or other)}*, or all",
                )

    def _of_folders(self) -> list[tuple[Path, Path]]:
        """Return the checkpoints in folders that are not named after steps."""
        self._check_parts(self._folders())
        found = self._each(self._folders())
        if len(found) > 1 and not all(_is_apart(path) for path in found):
            apart = [path for path in found if _is_apart(path)]
            self._pass_over("not among the steps of the run", apart)
            found = {path: inside for path, inside in found.items() if path not in apart}
        if not found:
            if problem := in_folder(self._inside):
                raise CheckpointError(self.path, problem)
            raise _Empty(self.path, self._nothing())
        if len(found) == 1:
            return next(iter(found.values()))
        names = [path.name for path in found]
        if "model_index.json" in self._names or not _COMPONENTS.isdisjoint(names):
            raise CheckpointError(
                self.path,
                f"expected one model, found those of a pipeline: {', '.join(names)}: name one, as "
                f"{self.path / names[0]}, or {self.path.parent / '*' / names[0]}",
            )
        if any(len(inside) > 1 for inside in found.values()):
            counted = ", ".join(f"{path.name} ({len(inside)})" for path, inside in found.items())
            raise CheckpointError(
                self.path,
                f"expected one run, found checkpoints in several folders: {counted}: name one",
            )
        folders = list(found)
        return [(found[folders[i]][0][0], folders[i]) for i in in_order(folders)[0]]

    def _only(self, folder: Path, inside: list[tuple[Path, Path]]) -> Path:
        if len(inside) > 1:
            names = [path.relative_to(folder) for path, _ in inside]
            raise CheckpointError(
                folder,
                f"expected one checkpoint, found {', '.join(map(str, names[:5]))}: name the same "
                f"one of each folder, as {self.path / '*' / names[0]}",
            )
        return inside[0][0]

    def _nothing(self) -> str:
        kinds = sorted({p.suffix for p in self._inside if p.suffix})
        seen = f" ({', '.join(kinds[:8])})" if kinds else ""
        return (
            f"expected a folder with checkpoints ({', '.join(SUFFIXES)} or an index of shards), "
            f"found {len(self._inside)} other entries{seen}"
        )

    def _pass_over(self, why: str, paths: Sequence[Path]) -> None:
        if paths:
            self._notes.append(
                f"passed over in {self.path}, {why}: {_listed(paths)} (count if they are named)"
            )


def _stem(path: Path) -> str:
    return _SUFFIX.sub("", path.name)


def _number(path: Path) -> bool:
    return re.search(r"\d", _stem(path)) is not None


def _is_apart(path: Path) -> bool:
    """Tell whether a name is that of the best or last one, or of a copy, not of a step."""
    stem = _stem(path)
    if _LAST.search(stem):
        return not named_progress(stem)
    return is_copy(stem)


def _steps(paths: Sequence[Path]) -> list[Path]:
    """Return the paths that are steps of a run, each under one name: best_epoch_3 is epoch_3."""
    steps = [path for path in paths if not _is_apart(path)]
    plain = [path for path in steps if _number(path) and not _LAST.search(_stem(path))]
    told = [named_progress(_stem(path)) for path in plain]

    def known(path: Path) -> bool:
        own = named_progress(_stem(path)).items()
        alike = [of_step for of_step in told if dict(own).keys() <= of_step.keys()]
        return not alike or any(own <= of_step.items() for of_step in alike)

    again = [path for path in steps if _LAST.search(_stem(path)) and len(plain) > 1 and known(path)]
    return _without(steps, again)


def _is_of_torch(path: Path) -> bool:
    """Tell whether torch.save wrote a file, whatever its name."""
    try:
        with open(path, "rb") as file:
            start = file.read(_HEAD)
    except OSError:
        return False
    return start.startswith(b"PK\3\4") and b"/data.pkl" in start[:300]


def _holds_weights(folder: Path) -> bool:
    try:
        files = [path for path in folder.iterdir() if path.name.lower().endswith(SUFFIXES)]
    except OSError:
        return False
    return not all(_BESIDE.fullmatch(_stem(path)) or is_own(path) for path in files)


def _shards(index: Path) -> set[str]:
    """Return the names of the shards that an index lists; if it is damaged, reading says so."""
    try:
        return set(map(str, json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return set()


def is_own(path: Path) -> bool:
    """Tell whether this package wrote a file: an earlier soup, a subspace, ..."""
    try:
        with open(path, "rb") as file:
            return b'"dldr_ext.kind"' in file.read(_HEAD)
    except OSError:
        return False  # which reading it will say


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what is equal for two names of the same file, links included."""
    try:
        status = path.stat()
        if (path / METADATA).is_file():
            status = (path / METADATA).stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def _without(paths: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    left_out = set(others)
    return [path for path in paths if path not in left_out]


def _listed(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

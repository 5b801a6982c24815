"""The order in which a run wrote its checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

# 10, 0.5, 1e3, 10k, 1,000. A sign only after "=" or "_"; no decimals after "v" and in dates
# (v1.10).
_NUMBER = re.compile(
    r"(?:(?<=[=_])-)?"
    r"(?:(?<![a-zA-Z0-9.])\d+(?:\.\d+)?e[+-]?\d+(?![a-zA-Z0-9])"
    r"|(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])"
    r"|(?<![v\d.])\d+\.\d+(?![\d.]*\.\d)|\d+)"
    r"(?:[kKmMB](?![a-zA-Z0-9]))?"
)
_LABELS = {
    "epoch": re.compile(r"(?<![a-zA-Z])(?:epochs?|ep|e)[-_=. ]*$", re.IGNORECASE),
    "step": re.compile(
        r"(?<![a-zA-Z])(?:(?:global_?)?steps?|iter(?:ation)?s?|it|updates?)[-_=. ]*$", re.IGNORECASE
    ),
}
# Before a number that says how good a checkpoint is, or how it was trained, not when.
_SCORE = re.compile(
    r"(?<![a-z])(?:[a-z]*(?:loss|acc|accuracy|err|error|score|iou|dice|bleu|rouge)|val|valid|test|m?ap"
    r"|auc|f1|mae|mse|rmse|ppl|perplexity|wer|cer|psnr|ssim|fid|reward|metric|top|lr|wd)"
    r"[-_=:@. ]*$",
    re.IGNORECASE,
)
_RUN = re.compile(
    r"(?<![a-z])(?:seed|fold|run|trial|split|member|replica)[-_=. ]*\d+", re.IGNORECASE
)
_FIRST = re.compile(r"(?<![a-z])(?:init|initial|start|random|pretrained|base)(?![a-z])", re.I)
_DAY_FIRST = re.compile(r"(?<!\d)\d{1,2}[-_.]\d{1,2}[-_.](?:19|20)\d\d(?!\d)")  # does not sort
_FACTORS = {"k": 1e3, "K": 1e3, "m": 1e6, "M": 1e6, "B": 1e9}


def natural_key(path: str | os.PathLike[str]) -> list[tuple[int, float, str]]:
    """Return a sort key by which 2 comes before 10, 500k before 1M."""
    text, key, at = os.fspath(path), [], 0
    for found in _NUMBER.finditer(text):
        if found.start() > at:
            key.append((1, 0.0, text[at : found.start()]))
        key.append((0, _value(found[0]), ""))
        at = found.end()
    return [*key, (1, 0.0, text[at:])]


def named_progress(name: str) -> dict[str, float]:
    """Return the "epoch" and "step" that a name such as epoch=3-step=300 tells."""
    told: dict[str, float] = {}
    for what, value, _ in _labelled(name):
        told.setdefault(what, value)
    return told


def _labelled(name: str) -> Iterator[tuple[str, float, int]]:
    """Yield "epoch" or "step", its number, and where the word for it begins in a name."""
    for found in _NUMBER.finditer(name):
        for what, label in _LABELS.items():
            if word := label.search(name[: found.start()].removesuffix("-") or name):
                yield what, _value(found[0]), word.start()


def run_and_step(name: str) -> tuple[str, tuple[float, ...]] | None:
    """Return what of a name is that of a run, if it may have one, and the step that follows.

    Of seed1_epoch2 and 05-30_epoch2 it is what precedes the epoch, of seed1_2 it is seed1.
    """
    if told := list(_labelled(name)):
        return name[: told[0][2]], tuple(value for _, value, _ in told)
    if found := _RUN.search(name):
        return name[: found.end()], _numbers(name[found.end() :])
    return None


def in_order(
    paths: Sequence[Path], stored: Sequence[Mapping[str, float]] | None = None
) -> tuple[list[int], list[str]]:
    """Return the order of checkpoints, as places in the list, and notes on how it was found.

    Parameters
    ----------
    paths : sequence of Path
        The files or folders in the folder of a run that stand for them.
    stored : sequence of mapping, optional
        The "epoch" and "step" that each has stored.
    """
    names = _relative(paths)
    by_name, notes = _by_name(paths, names)
    keys = None if stored is None else _comparable(stored)
    if keys is None:
        return by_name, notes
    order = sorted(by_name, key=lambda i: keys[i])
    if len(set(keys)) == len(keys):
        in_files = "in the order of the steps in the files, which is not that of their names"
        return order, [] if order == by_name or notes else [in_files]
    if order == by_name or notes:
        assert stored is not None
        return order, [*notes, *_ties(order, stored, names)]
    return by_name, [
        "in the order of their names, which is not that of the steps in the files: some of these "
        "are the same"
    ]


def _by_name(paths: Sequence[Path], names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the order by what names say; by time, if they say nothing."""
    places = range(len(paths))
    bare = [re.sub(r"(?:\.[A-Za-z]+)+$", "", name) for name in names]
    numbered = [i for i in places if re.search(r"\d", names[i])]
    steps = [_without_scores(name) for name in bare]
    if len({_numbers(steps[i]) for i in numbered}) < len(numbered):  # do not tell them apart
        steps = bare
    natural = sorted(places, key=lambda i: (natural_key(steps[i]), names[i]))
    told = [named_progress(name) for name in names]
    keys = _comparable(told)
    if keys is not None:
        order = sorted(natural, key=lambda i: keys[i])
        return order, _ties(order, told, names)
    unnumbered = [i for i in natural if i not in numbered]
    if all(map(_DAY_FIRST.search, names)):
        unnumbered = natural
    if len(paths) == 1:
        return natural, []
    first = [i for i in unnumbered if _FIRST.search(names[i])]
    last = sorted(set(unnumbered).difference(first), key=lambda i: (_time(paths[i]), names[i]))
    apart = set(unnumbered)
    numbered = [i for i in natural if i not in apart]
    alike: dict[str, str] = {}  # a name of each kind
    for i in numbered:
        alike.setdefault(_NUMBER.sub("0", steps[i]), names[i])
    listed = _listed(names[i] for i in last)
    notes = []
    if len(alike) > 1:
        notes.append(f"in the order of their names, which are not alike: {_listed(alike.values())}")
    if last and numbered:
        notes.append(f"at the end, without a number: {listed}")
    elif last:
        notes = ["in the order of their times, as neither names nor contents tell epoch or step"]
    return first + numbered + last, notes


def _without_scores(name: str) -> str:
    """Return a name without the numbers that are decimals, or follow a word for a score."""

    def kept(found: re.Match[str]) -> str:
        score = _SCORE.search(name[: found.start()].removesuffix("-"))
        return "x" if score or re.search(r"[.e].*\d$", found[0]) else found[0]

    return _NUMBER.sub(kept, name)


def _numbers(name: str) -> tuple[float, ...]:
    return tuple(_value(found[0]) for found in _NUMBER.finditer(name))


def _ties(
    order: Sequence[int], told: Sequence[Mapping[str, float]], names: Sequence[str]
) -> list[str]:
    """Say which checkpoints tell the same step, as those of two runs in one folder do."""
    of_step: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for i in order if all("step" in one for one in told) else ():
        of_step.setdefault(tuple(sorted(told[i].items())), []).append(names[i])
    twice = [same for same in of_step.values() if len(same) > 1]
    return [f"of the same step, as if of several runs: {_listed(twice[0])}"] if twice else []


def _listed(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:5])


def _comparable(told: Sequence[Mapping[str, float]]) -> list[tuple[float, ...]] | None:
    """Return what all tell as keys; None if that does not tell them apart."""
    common = [what for what in ("epoch", "step") if all(what in one for one in told)]
    keys = [tuple(one[what] for what in common) for one in told]
    return keys if len(set(keys)) > 1 else None


def _relative(paths: Sequence[Path]) -> list[str]:
    """Return the paths from the deepest folder that all are in."""
    whole = [Path(os.path.abspath(path)) for path in paths]
    folder = Path(os.path.commonpath([path.parent for path in whole])) if whole else Path()
    return [os.fspath(path.relative_to(folder)) for path in whole]


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _value(text: str) -> float:
    if text.isdecimal():
        return int(text)
    digits = text.rstrip("".join(_FACTORS)).replace(",", "")
    return float(digits) * _FACTORS.get(text[-1], 1.0)

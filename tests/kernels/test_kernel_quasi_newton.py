"""The d x d algebra of a step: one block of CUDA threads against one thread."""

import numpy as np
import pytest

# In shared memory, with the factor and without; in panels of 16 and of 8 columns, whole or not.
DIMS = [1, 2, 3, 16, 17, 40, 100, 113, 128, 515]
RULES = {
    "damped": {"damped": True, "published": False},
    "plain": {"damped": False, "published": False},
    "published": {"damped": False, "published": True},
}
SLOPE, SIZE, LEARNED, RESET, DOWNHILL, CONDITION, LENGTH = range(7)


def problem(dim: int, seed: int, curvature: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([dim, seed])
    q = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    b = q @ np.diag(10.0 ** rng.uniform(-2, 0, dim)) @ q.T
    before, c = rng.normal(size=(2, dim))
    s = -0.5 * b @ before
    y = np.linalg.solve(b, s) * rng.uniform(0.5, 2)
    if curvature == "negative":
        y = -y
    elif curvature == "none":
        y = np.zeros(dim)
    return {"b": (b + b.T) / 2, "guess": np.linspace(1, 0.1, dim), "c": c, "s": s, "y": y,
            "hs": -0.5 * before}  # fmt: skip


def solve(kernels, given: dict[str, np.ndarray], **options):
    b = given["b"].copy()
    rest = {key: given[key] for key in ("guess", "c", "s", "y", "hs")}
    p, info = kernels.cuda.quasi_newton_(b, **rest, **options)
    return b, p, info


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("curvature", ["positive", "negative", "none"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_block_agrees_with_one_thread(kernels, rule, curvature, fresh):
    for dim in DIMS:
        given = problem(dim, 0, curvature)
        options = {**RULES[rule], "fresh": fresh}
        many, one = (solve(kernels, given, **options, one_thread=t) for t in (False, True))
        for found, right in zip(many, one, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-9, atol=1e-12)
        b, p, info = many
        assert np.array_equal(b, b.T)
        np.testing.assert_allclose(p, -b @ given["c"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(info[SLOPE], given["c"] @ p, rtol=1e-9)
        np.testing.assert_allclose(info[SIZE], np.linalg.norm(given["c"]), rtol=1e-12)
        assert info[DOWNHILL] == 1
        learns = curvature == "positive" or (curvature == "negative" and rule == "damped")
        damped = rule == "damped" and curvature == "negative"
        assert info[LEARNED] == (2 if damped else learns), dim
        np.testing.assert_allclose(info[LENGTH], np.linalg.norm(p), rtol=1e-12)
        assert np.isnan(info[CONDITION]) == (rule == "published" or not learns)
        if learns and rule != "published":
            diagonal = np.diag(np.linalg.cholesky(b))
            np.testing.assert_allclose(
                info[CONDITION], (diagonal.max() / diagonal.min()) ** 2, rtol=1e-6
            )
        if info[LEARNED] and rule != "damped":
            np.testing.assert_allclose(b @ given["y"], given["s"], rtol=1e-7, atol=1e-9)
        if not info[LEARNED]:
            assert np.array_equal(b, given["b"])


@pytest.mark.parametrize("one_thread", [False, True])
def test_without_a_pair_only_the_direction_is_made(kernels, one_thread):
    given = {**problem(7, 1, "positive"), "s": None, "y": None, "hs": None}
    b, p, info = solve(
        kernels, given, fresh=True, damped=True, published=False, one_thread=one_thread
    )
    assert np.array_equal(b, given["b"])
    np.testing.assert_allclose(p, -b @ given["c"], rtol=1e-12)
    assert info[LEARNED] == info[RESET] == 0


@pytest.mark.parametrize("one_thread", [False, True])
def test_what_cannot_go_on_starts_anew(kernels, one_thread):
    options = {"fresh": False, "damped": False, "published": False, "one_thread": one_thread}
    given = problem(9, 2, "none")
    given["b"] = -given["b"]  # uphill
    b, p, info = solve(kernels, given, **options)
    assert np.array_equal(b, np.diag(given["guess"]))
    np.testing.assert_allclose(p, -given["guess"] * given["c"], rtol=1e-12)
    assert list(info[LEARNED:CONDITION]) == [0, 1, 1]

    given = problem(9, 3, "positive")
    given["b"] = np.diag(10.0 ** -np.arange(0.0, 18.0, 2.0))  # condition 1e16
    given["y"] = given["s"] = np.eye(9)[0]
    b, _, info = solve(kernels, given, **options)
    assert np.array_equal(b, np.diag(given["guess"]))
    assert list(info[LEARNED:CONDITION]) == [0, 1, 1]

    given = problem(9, 4, "none")
    given["c"][3] = np.nan
    _, _, info = solve(kernels, given, **options)
    assert info[DOWNHILL] == 0
    assert np.isnan(info[SIZE])

"""The kernel bench with one more path, "cuda": the CUDA kernels carried out on the CPU. They are
called as the CPU kernels are, so that every test has them too."""

import numpy as np

EMULATED = "_emulated"
PATHS = ["portable", "avx2", "avx512", "avx512_emulated", "cuda"]
# These differ from avx512 in gram and form_basis alone.
MMA = ["avx512_bf16", "amx", "avx512_bf16_emulated", "amx_emulated"]


class Bench:
    """The module `dldr_kernels`, whose functions also take path="cuda".

    ``threads`` stands there for multiprocessors: launch shapes depend on them, results must not.
    """

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def paths(self) -> list[str]:
        return [*self._module.paths(), "cuda"]

    def project(self, basis, tensors, *, path="portable", threads=1, **scale):
        if path != "cuda":
            return self._module.project(basis, tensors, path=path, threads=threads, **scale)
        out = self._module.cuda.project(basis, tensors, 1, multiprocessors=threads, **scale)
        return out[0].astype(np.float64)

    def project_many(self, basis, lists, *, path="portable", threads=1, **scale):
        if path != "cuda":
            return self._module.project_many(basis, lists, path=path, threads=threads, **scale)
        tensors = [tensor for one in lists for tensor in one]
        out = self._module.cuda.project(
            basis, tensors, len(lists), multiprocessors=threads, **scale
        )
        return out.astype(np.float64)

    def reconstruct_residual_(
        self,
        direction,
        residual,
        basis,
        theta,
        c,
        tensors,
        *,
        path="portable",
        threads=1,
        scale=None,
    ):
        if path != "cuda":
            self._module.reconstruct_residual_(
                direction, residual, basis, theta, c, tensors, scale=scale, path=path,
                threads=threads,
            )  # fmt: skip
            return
        direction[...], residual[...] = self._module.cuda.reconstruct_residual(
            basis, theta, c, tensors, scale=scale, multiprocessors=threads
        )

    def reconstruct_(self, params, origin, basis, theta, *, path="portable", threads=1, **scale):
        if path != "cuda":
            call, options = self._module.reconstruct_, {"path": path, "threads": threads}
        else:
            call, options = self._module.cuda.reconstruct_, {"multiprocessors": threads}
        call(params, origin, basis, theta, **options, **scale)

    def trial_(self, params, point, direction, alpha, *, path="portable", threads=1):
        if path != "cuda":
            self._module.trial_(params, point, direction, alpha, path=path, threads=threads)
        else:
            self._module.cuda.trial_(params, point, direction, alpha)

    def store_snapshot_(
        self, snapshots, index, params, anchor, *, path="portable", threads=1, scale=None
    ):
        if path != "cuda":
            self._module.store_snapshot_(
                snapshots, index, params, anchor, scale=scale, path=path, threads=threads
            )
        else:
            self._module.cuda.store_snapshot_(snapshots, index, params, anchor, scale=scale)

    def gram_block(self, snapshots, index, count, *, path="portable", threads=1, scale=None):
        if path != "cuda":
            return self._module.gram_block(
                snapshots, index, count, scale=scale, path=path, threads=threads
            )
        gram = np.full((index + count, index + count), np.nan)
        self._module.cuda.gram_block_(
            snapshots, gram, index, count, scale=scale, multiprocessors=threads
        )
        assert np.array_equal(gram, gram.T, equal_nan=True)
        assert np.isnan(gram[:index, :index]).all()
        return gram[index:]

    def gram_append_(
        self, snapshots, index, params, anchor, *, path="portable", threads=1, scale=None
    ) -> np.ndarray:
        if path != "cuda":
            return self._module.gram_append_(
                snapshots, index, params, anchor, scale=scale, path=path, threads=threads
            )
        gram = np.full((index + 1, index + 1), np.nan)
        cuda = self._module.cuda
        cuda.store_snapshot_(snapshots, index, params, anchor, scale=scale)
        cuda.gram_block_(snapshots, gram, index, 1, scale=scale, multiprocessors=threads)
        assert np.array_equal(gram[index], gram[:, index], equal_nan=True)
        assert np.isnan(gram[:index, :index]).all()
        return gram[index]

    def gram(self, snapshots, *, path="portable", threads=1, scale=None):
        if path != "cuda":
            return self._module.gram(snapshots, scale=scale, path=path, threads=threads)
        return self._module.cuda.gram(snapshots, scale=scale)

    def form_basis_(self, out, snapshots, coefficients, *, path="portable", threads=1, scale=None):
        if path != "cuda":
            self._module.form_basis_(
                out, snapshots, coefficients, scale=scale, path=path, threads=threads
            )
        else:
            self._module.cuda.form_basis_(out, snapshots, coefficients, scale=scale)

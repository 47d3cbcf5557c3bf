"""Tensor kernels of sparse codes: selection, sparse products, reused memory (hand-written).

Sizes in the comments: n rows, m or d_sae columns, nnz stored entries, d features. Selection looks at the
maxima of groups of columns first; a group is a set of `group` columns `m // group` apart, so that its
maximum is elementwise over contiguous memory.
"""

import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from torch import Tensor

__all__ = [
    "Pool",
    "Support",
    "above",
    "affine",
    "batch_topk",
    "combine_columns",
    "combine_rows",
    "dots",
    "group_max",
    "kth_largest",
    "nonzero",
    "row_topk",
    "sums",
]

FAST = (torch.float32, torch.float64)  # dtypes with sparse products on a CPU
CROWDED = 12  # a dense product costs this many times less an entry than a sparse one, about
GROUP = 8  # columns whose maximum stands for them when looking for large entries


class Pool:
    """Memory lent to large tensors, and lent again once nothing refers to it.

    A large tensor from the system comes as untouched pages, and touching them first costs as much as a
    quarter of the product that fills them. Memory returns by itself when the last tensor in it goes, so a
    result that is kept stays valid. For one thread; on other devices than a CPU it just allocates.
    """

    def __init__(self):
        self._blocks: list[np.ndarray] = []
        self._lent: list[weakref.ref] = []  # what each block was last lent as; dead when it is back

    @property
    def nbytes(self) -> int:  # bytes held, lent or not
        return sum(block.nbytes for block in self._blocks)

    def empty(
        self,
        shape: tuple[int, ...],  # shape wanted
        like: Tensor,  # dtype and device wanted
    ) -> Tensor:  # uninitialised
        "An uninitialised tensor, in memory used before where some is free."
        size = int(np.prod(shape)) * like.element_size()
        if like.device.type != "cpu" or size == 0:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        i = self._find(size)
        skip = -self._blocks[i].ctypes.data % 64
        part = self._blocks[i][skip : skip + size]
        self._lent[i] = weakref.ref(part)
        return torch.from_numpy(part).view(like.dtype).view(shape)

    def _find(self, size: int) -> int:
        "The smallest free block that fits and is not far too large; a new one if there is none."
        fits = [
            (block.nbytes, i)
            for i, block in enumerate(self._blocks)
            if self._lent[i]() is None and size <= block.nbytes - 64 <= 2 * size + 4096
        ]
        if fits:
            return min(fits)[1]
        self._blocks.append(np.empty(size + 64, dtype=np.uint8))
        self._lent.append(weakref.ref(self._blocks[-1][:0]))
        return len(self._blocks) - 1


def _take(pool: Pool | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return (pool or Pool()).empty(shape, like)


class Support:
    "Where a batch of codes may be non-zero, with its transpose, computed once when first asked for."

    def __init__(
        self,
        indices: Int[Tensor, "n k"] | Int[Tensor, "nnz"],  # latent of each stored entry
        d_sae: int,  # latents
        indptr: Int[Tensor, "n1"] | None = None,  # start of each row; None for k entries a row
    ):
        self.indices, self.d_sae, self.indptr = indices, d_sae, indptr
        self.n = indices.shape[0] if indptr is None else indptr.shape[0] - 1

    @cached_property
    def flat(self) -> Int[Tensor, "nnz"]:
        "Latent of each stored entry, one after another."
        return self.indices.reshape(-1).int()

    @cached_property
    def starts(self) -> Int[Tensor, "n1"]:
        "Start of each row among the stored entries."
        if self.indptr is not None:
            return self.indptr.int()
        k, device = self.indices.shape[1], self.indices.device
        return torch.arange(self.n + 1, dtype=torch.int32, device=device) * k

    @cached_property
    def rows(self) -> Int[Tensor, "nnz"]:
        "Row of each stored entry."
        device = self.indices.device
        each = torch.arange(self.n, device=device)
        if self.indptr is None:
            return each.repeat_interleave(self.indices.shape[1])
        return each.repeat_interleave(self.indptr.diff().long(), output_size=len(self.flat))

    @cached_property
    def crowded(self) -> bool:
        "Whether so much is stored that dense products are cheaper."
        return CROWDED * self.indices.numel() > self.n * self.d_sae

    @cached_property
    def flat_positions(self) -> Int[Tensor, "nnz"]:
        "Place of each stored entry in the dense equivalent, row by row."
        return self.rows * self.d_sae + self.flat

    def spread(
        self,
        values: Float[Tensor, "nnz"],  # one for each stored entry
    ) -> Float[Tensor, "n d_sae"]:
        "The dense equivalent."
        dense = values.new_zeros(self.n * self.d_sae)
        return dense.index_add_(0, self.flat_positions, values).view(self.n, self.d_sae)

    @cached_property
    def columns(self) -> tuple[Int[Tensor, "n1"], Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:
        "The transpose: start of each latent's entries, their rows, and the order they are taken in."
        if self.flat.device.type == "cpu" and self.flat.numel():
            place = np.arange(len(self.flat), dtype=np.int32)
            entries = (place, self.flat.numpy(), self.starts.numpy())
            by_latent = csr_array(entries, shape=(self.n, self.d_sae)).tocsc()
            starts, rows, order = map(torch.from_numpy, (by_latent.indptr, by_latent.indices, by_latent.data))
            return starts, rows, order
        order = torch.argsort(self.flat, stable=True)
        starts = torch.zeros(self.d_sae + 1, dtype=torch.int32, device=order.device)
        starts[1:] = torch.bincount(self.flat, minlength=self.d_sae).cumsum(0)
        return starts, self.rows[order].int(), order.int()


def _flatnonzero(mask: Bool[Tensor, "..."]) -> Int[Tensor, "nnz"]:
    "Flat positions of the true entries, ascending."
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero()[:, 0]


def kth_largest(
    values: Float[Tensor, "m"],  # any values; NaN counts as largest
    k: int,  # rank, from 1 to m
) -> Float[Tensor, ""]:  # the k-th largest of them
    "The k-th largest value."
    at = values.numel() - k
    if values.device.type == "cpu" and values.dtype in FAST:
        return torch.from_numpy(np.partition(values.numpy(), at)[at : at + 1])[0]
    return torch.kthvalue(values, at + 1).values


def _maxima(scores: Float[Tensor, "n m"], group: int) -> Float[Tensor, "n w"]:
    "The maximum of each group of columns; columns beyond the last whole group are left out."
    n, m = scores.shape
    width = m // group
    return scores[:, : width * group].view(n, group, width).amax(1)


def _factors(m: int, k: int) -> list[int]:
    "Group sizes, finest first, that bring m columns down to a few times k."
    factors = []
    while m >= 16 * k:
        factors.append(8 if m >= 256 * k else 4)
        m //= factors[-1]
    return factors


def row_topk(
    scores: Float[Tensor, "n m"],  # any scores; NaN counts as largest
    k: int,  # how many a row, at most m
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:  # values and columns (int32), unordered
    """The exact k largest of each row.

    The k largest lie in the k groups with the largest maxima, so these groups are found first, by the
    same rule, and only their members compared.
    """
    factors = _factors(scores.shape[1], k) if scores.device.type == "cpu" else []
    levels = [scores]
    for group in factors:
        levels.append(_maxima(levels[-1], group))
    values, columns = torch.topk(levels.pop(), k, dim=1, sorted=False)
    for group in reversed(factors):
        level = levels.pop()
        width = level.shape[1] // group
        steps = torch.arange(0, group * width, width, device=level.device)
        columns = (columns[:, None, :] + steps[:, None]).view(len(level), group * k)
        if group * width < level.shape[1]:
            rest = torch.arange(group * width, level.shape[1], device=level.device)
            columns = torch.cat([columns, rest.expand(len(level), -1)], 1)
        values, kept = torch.topk(level.gather(1, columns), k, dim=1, sorted=False)
        columns = columns.gather(1, kept)
    return values, columns.int()


def group_max(
    scores: Float[Tensor, "n m"],  # any scores; NaN counts as largest
    k: int,  # groups of m // k neighbouring columns; k divides m
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:  # values and columns (int32), one a group
    """The largest entry of each group of columns, the first of equals.

    One pass: numpy's vectorised argmax, a thread for a part of the rows, reads each group once; torch's maximum with
    indices is half as fast.
    """
    n, m = scores.shape
    groups = scores.detach().contiguous().view(n, k, m // k)
    if scores.device.type == "cpu" and scores.dtype in FAST:
        at, threads = torch.empty(n, k, dtype=torch.long), torch.get_num_threads()
        parts = zip(np.array_split(groups.numpy(), threads), np.array_split(at.numpy(), threads))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: part[0].argmax(2, out=part[1]), parts))
    else:
        at = groups.argmax(2)
    columns = at.add_(torch.arange(0, m, m // k, device=scores.device))
    return scores.gather(1, columns), columns.int()


def _members(
    scores: Float[Tensor, "n m"],  # contiguous
    groups: Int[Tensor, "m"],  # flat positions in `_maxima(scores, GROUP)`, ascending
) -> Int[Tensor, "nnz"]:  # flat positions in scores, rows ascending; left over columns included
    "The entries of some groups, and of the columns that belong to none."
    n, m = scores.shape
    width = m // GROUP
    first = groups + groups.div(width, rounding_mode="floor") * (m - width)
    steps = torch.arange(0, GROUP * width, width, device=groups.device)
    members = (first[:, None] + steps).view(-1)
    if GROUP * width == m:
        return members
    rest = torch.arange(GROUP * width, m, device=groups.device)
    rest = rest + torch.arange(0, n * m, m, device=groups.device)[:, None]
    return torch.cat([members, rest.view(-1)]).sort().values


def _entries(
    scores: Float[Tensor, "n m"],  # contiguous
    at: Int[Tensor, "nnz"],  # flat positions
    values: Float[Tensor, "nnz"],  # scores there
) -> tuple[Float[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:
    rows = at.div(max(scores.shape[1], 1), rounding_mode="floor")
    return values, rows, (at - rows * scores.shape[1]).int()


def nonzero(
    scores: Float[Tensor, "n m"],  # any scores
) -> tuple[Float[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:  # values, rows, columns
    "Every entry that is not zero, rows ascending, columns too; values keep their gradient."
    scores = scores.contiguous()
    at = _flatnonzero(scores.detach() != 0)
    return _entries(scores, at, scores.view(-1)[at])


def above(
    scores: Float[Tensor, "n m"],  # any scores
    floor: Float[Tensor, "m"] | Float[Tensor, ""] | float | int,  # one for each column, or for all
) -> tuple[Float[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:  # values, rows, columns
    "Every entry above its floor, and every NaN, rows ascending."
    scores = scores.contiguous()
    m = scores.shape[1]
    width = m // GROUP
    floor = torch.as_tensor(floor, dtype=scores.dtype, device=scores.device)
    one, floor = floor if floor.ndim == 0 else None, floor.expand(m)
    if width == 0 or len(scores) == 0:
        at = _flatnonzero(~(scores <= floor))
        return _entries(scores, at, scores.reshape(-1)[at])
    lowest = floor[: width * GROUP].view(GROUP, width).amin(0)
    at = _members(scores, _flatnonzero(~(_maxima(scores, GROUP) <= lowest)))
    values = scores.view(-1)[at]
    keep = _flatnonzero(~(values <= (floor[at % m] if one is None else one)))
    return _entries(scores, at[keep], values[keep])


def batch_topk(
    scores: Float[Tensor, "n m"],  # any scores
    count: int,  # how many in all
) -> tuple[Float[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:  # values, rows, columns
    """The exact `count` largest positive entries of the whole batch, rows ascending, the first of equals.

    The count-th largest maximum of a group bounds the count-th largest entry from below, and no better
    bound is needed: hardly any entry lies between.
    """
    scores = scores.contiguous()
    width = scores.shape[1] // GROUP
    if count <= 0 or scores.numel() == 0:
        return above(scores, torch.inf)
    if len(scores) * width < 2 * count:
        values, rows, columns = above(scores, 0.0)
        keep = _flatnonzero(_first(values, count))
        return values[keep], rows[keep], columns[keep]
    maxima = _maxima(scores, GROUP)
    least = torch.nextafter(*torch.tensor([0.0, 1.0], dtype=scores.dtype))
    floor = kth_largest(maxima.view(-1), count).cpu().clamp(min=least).item()
    at = _members(scores, _flatnonzero(~(maxima < floor)))
    values = scores.view(-1)[at]
    near = _flatnonzero(~(values < floor))
    at, values = at[near], values[near]
    keep = _flatnonzero(_first(values, count))
    return _entries(scores, at[keep], values[keep])


def _first(values: Float[Tensor, "nnz"], count: int) -> Bool[Tensor, "nnz"]:
    "Which of the values are the `count` largest; of equals at the edge, the first."
    if len(values) <= count:
        return torch.ones_like(values, dtype=torch.bool)
    edge = kth_largest(values, count)
    keep = ~(values < edge)
    if int(keep.sum()) == count:
        return keep
    more, same = ~(values <= edge), values == edge
    return more | (same & (same.cumsum(0) <= count - more.sum()))


def affine(
    x: Float[Tensor, "n d"],  # rows
    weight: Float[Tensor, "m d"],  # contiguous
    bias: Float[Tensor, "m"],  # added to every row
    pool: Pool | None = None,  # memory for the result
) -> Float[Tensor, "n m"]:
    "The product x @ weight.T + bias."
    return torch.addmm(bias, x, weight.t(), out=_take(pool, (len(x), len(weight)), x))


def _matrix(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    "A CSR matrix over existing memory; torch's notice that CSR is in beta is kept quiet."
    with warnings.catch_warnings(action="ignore"):
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def _bags(
    values: Float[Tensor, "nnz"],  # weight of each entry
    columns: Int[Tensor, "nnz"],  # row of `dense` it takes
    starts: Int[Tensor, "n1"],  # start of each sum
    dense: Float[Tensor, "m d"],  # rows summed
) -> Float[Tensor, "n d"]:
    "Weighted sums of rows, one for each stretch of entries."
    if columns.numel() == 0:
        return dense.new_zeros(starts.shape[0] - 1, dense.shape[1])
    if dense.dtype in FAST or dense.device.type != "cpu":
        return torch.nn.functional.embedding_bag(columns, dense, starts[:-1], per_sample_weights=values, mode="sum")
    return _bags(values.float(), columns, starts, dense.float()).to(dense.dtype)


def combine_rows(
    values: Float[Tensor, "nnz"],  # weight of each stored entry
    support: Support,  # which row and latent it belongs to
    dense: Float[Tensor, "d_sae d"],  # one vector for each latent
) -> Float[Tensor, "n d"]:  # sum over each row's latents
    "The product codes @ dense."
    if support.crowded:
        return support.spread(values) @ dense
    return _bags(values, support.flat, support.starts, dense)


def combine_columns(
    values: Float[Tensor, "nnz"],  # weight of each stored entry
    support: Support,  # which row and latent it belongs to
    dense: Float[Tensor, "n d"],  # one vector for each row
    pool: Pool | None = None,  # memory for the result
) -> Float[Tensor, "d_sae d"]:  # sum over the rows where each latent is stored
    "The product codes.T @ dense."
    if support.crowded:
        return support.spread(values).t() @ dense
    starts, rows, order = support.columns
    values = values.index_select(0, order)
    direct = dense.device.type == "cpu" and dense.dtype in FAST and torch.backends.mkl.is_available()
    if pool is None or not direct or not values.numel():
        return _bags(values, rows, starts, dense)
    out = pool.empty((support.d_sae, dense.shape[1]), dense)
    codes = _matrix(starts, rows, values, (support.d_sae, support.n))
    return torch.addmm(out, codes, dense, beta=0, out=out)


def dots(
    left: Float[Tensor, "n d"],  # one vector for each row
    support: Support,  # pairs wanted
    right: Float[Tensor, "d_sae d"],  # one vector for each latent
) -> Float[Tensor, "nnz"]:  # inner product of each stored pair
    "The inner products <left[row], right[latent]> on the support alone."
    if support.crowded:
        return (left @ right.t()).view(-1)[support.flat_positions]
    if left.dtype in FAST and left.device.type == "cpu" and support.flat.numel():
        zeros = left.new_zeros(support.flat.numel())
        pattern = _matrix(support.starts, support.flat, zeros, (support.n, support.d_sae))
        return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()
    out = left.new_empty(support.flat.numel())
    step = 4096 if left.device.type == "cpu" else 1 << 18
    for i in range(0, out.numel(), step):
        s = slice(i, i + step)
        out[s] = (left[support.rows[s]] * right[support.flat[s].long()]).sum(-1)
    return out


def sums(
    values: Float[Tensor, "nnz"],  # one for each stored entry
    support: Support,  # which latent it belongs to
) -> Float[Tensor, "d_sae"]:
    "The sum of each latent's values."
    return values.new_zeros(support.d_sae).index_add(0, support.flat, values)

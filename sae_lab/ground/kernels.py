"Tensor kernels of sparse codes: exact selection, products along a sparse support, reused memory."

import warnings
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "Pool",
    "Support",
    "largest",
    "kth_largest",
    "row_topk",
    "above",
    "batch_topk",
    "combine_rows",
    "dots",
    "combine_columns",
    "sums",
    "affine",
]

FAST = (torch.float32, torch.float64)  # dtypes with sparse CPU products


class Pool:
    "Memory lent to large tensors and lent again once nothing refers to them; CPU only."

    def __init__(self):
        self._blocks = {}

    def empty(
        self,
        shape: tuple[int, ...],  # shape wanted
        like: Tensor,  # dtype and device wanted
    ) -> Tensor:  # uninitialised; its memory returns to the pool when the last reference goes
        "An uninitialised tensor, in memory used before where there is some."
        return torch.empty(shape, dtype=like.dtype, device=like.device)


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
    def columns(self) -> tuple[Int[Tensor, "d1"], Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:
        "The transpose: start of each latent's entries, their rows, and the order they are taken in."
        _, order = torch.sort(self.flat, stable=True)
        counts = torch.bincount(self.flat, minlength=self.d_sae)
        starts = torch.zeros(self.d_sae + 1, dtype=torch.int32, device=order.device)
        starts[1:] = counts.cumsum(0)
        return starts, self.rows[order].int(), order


def largest(
    scores: Float[Tensor, "n m"],  # any scores
    k: int,  # how many a row, at most m
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:  # values and positions, unordered
    "The k largest of each row."
    return torch.topk(scores, k, dim=1, sorted=False)


def row_topk(
    scores: Float[Tensor, "n m"],  # any scores
    k: int,  # how many a row, at most m
    group: int = 16,  # columns whose maximum is looked at first
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:  # values and columns (int32), unordered
    "The exact k largest of each row, found through the maxima of groups of columns."
    n, m = scores.shape
    width = m // group
    if k * group * 2 > m or scores.device.type != "cpu":
        values, columns = largest(scores, k)
        return values, columns.int()
    blocks = scores[:, : width * group].view(n, group, width)
    chosen = largest(blocks.amax(1), k)[1]
    inside = torch.gather(blocks, 2, chosen[:, None].expand(n, group, k)).view(n, group * k)
    if width * group < m:
        inside = torch.cat([inside, scores[:, width * group :]], 1)
    values, where = largest(inside, k)
    block, slot = where // k, where % k
    columns = block * width + torch.gather(chosen, 1, slot)
    return values, torch.where(where < group * k, columns, where + width * group - group * k).int()


def kth_largest(
    values: Float[Tensor, "m"],  # any values
    k: int,  # rank, from 1 to m
) -> Float[Tensor, ""]:  # the k-th largest of them
    "The k-th largest value."
    m = values.numel()
    if values.device.type == "cpu" and values.dtype in FAST:
        return torch.from_numpy(np.partition(values.numpy(), m - k)[m - k : m - k + 1])[0]
    return torch.kthvalue(values, m - k + 1).values


def _grid(scores: Float[Tensor, "n m"], group: int):
    "Scores as whole groups, and the columns left over."
    n, m = scores.shape
    width = m // group
    return scores[:, : width * group].view(n, group, width), scores[:, width * group :], width


def above(
    scores: Float[Tensor, "n m"],  # any scores
    floor: Float[Tensor, "m"] | Float[Tensor, ""] | float | int,  # entries above it are kept
) -> tuple[Float[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:  # values, rows, columns
    "Every entry above a floor, and every NaN, in row order."
    rows, columns = (~(scores <= floor)).nonzero(as_tuple=True)
    return scores[rows, columns], rows, columns


def batch_topk(
    scores: Float[Tensor, "n m"],  # any scores
    count: int,  # how many in all
    group: int = 16,  # columns whose maximum is looked at first
) -> tuple[Float[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:  # values, rows, columns
    "The exact `count` largest positive entries of the whole batch, in row order; the first of equals."
    zero = scores.new_zeros(())
    if count <= 0 or scores.numel() == 0:
        return above(scores, zero + float("inf"))
    blocks, _, width = _grid(scores, group)
    floor = zero
    if width and blocks.shape[0] * width > count:
        floor = torch.maximum(zero, kth_largest(blocks.amax(1).view(-1), count))
    below = torch.nextafter(floor, floor - 1) if floor > 0 else floor
    values, rows, columns = above(scores, below)
    if len(values) > count:
        edge = kth_largest(values, count)
        more, same = ~(values <= edge), values == edge
        spare = count - more.sum()
        keep = (more | (same & (same.cumsum(0) <= spare))).nonzero()[:, 0]
        values, rows, columns = values[keep], rows[keep], columns[keep]
    return values, rows, columns


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
    n = starts.shape[0] - 1
    if columns.numel() == 0:
        return dense.new_zeros(n, dense.shape[1])
    if dense.dtype in FAST or dense.device.type != "cpu":
        return torch.nn.functional.embedding_bag(
            columns, dense, starts[:-1], per_sample_weights=values, mode="sum"
        )
    return _bags(values.float(), columns, starts, dense.float()).to(dense.dtype)


def combine_rows(
    values: Float[Tensor, "nnz"],  # weight of each stored entry
    support: Support,  # which row and latent it belongs to
    dense: Float[Tensor, "d_sae d"],  # one vector for each latent
) -> Float[Tensor, "n d"]:  # sum over each row's latents
    "The product codes @ dense."
    return _bags(values, support.flat, support.starts, dense)


def combine_columns(
    values: Float[Tensor, "nnz"],  # weight of each stored entry
    support: Support,  # which row and latent it belongs to
    dense: Float[Tensor, "n d"],  # one vector for each row
    pool: Pool | None = None,  # memory for the result
) -> Float[Tensor, "d_sae d"]:  # sum over the rows where each latent is stored
    "The product codes.T @ dense."
    starts, rows, order = support.columns
    return _bags(values[order], rows, starts, dense)


def sums(
    values: Float[Tensor, "nnz"],  # one for each stored entry
    support: Support,  # which latent it belongs to
) -> Float[Tensor, "d_sae"]:
    "The sum of each latent's values."
    return values.new_zeros(support.d_sae).index_add(0, support.flat, values)


def affine(
    x: Float[Tensor, "n d_in"],  # rows
    weight: Float[Tensor, "d_sae d_in"],  # contiguous
    bias: Float[Tensor, "d_sae"],  # added to every row
    pool: Pool | None = None,  # memory for the result
) -> Float[Tensor, "n d_sae"]:
    "The product x @ weight.T + bias."
    out = None if pool is None else pool.empty((len(x), len(weight)), x)
    return torch.addmm(bias, x, weight.t(), out=out)


def dots(
    left: Float[Tensor, "n d"],  # one vector for each row
    support: Support,  # pairs wanted
    right: Float[Tensor, "d_sae d"],  # one vector for each latent
) -> Float[Tensor, "nnz"]:  # inner product of each stored pair
    "The inner products <left[row], right[latent]> on the support alone."
    if left.dtype in FAST and left.device.type == "cpu" and support.flat.numel():
        zeros = left.new_zeros(support.flat.numel())
        shape = (support.n, support.d_sae)
        pattern = _matrix(support.starts, support.flat, zeros, shape)
        return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()
    out = left.new_empty(support.flat.numel())
    for i in range(0, out.numel(), 4096):
        s = slice(i, i + 4096)
        out[s] = (left[support.rows[s]] * right[support.flat[s].long()]).sum(-1)
    return out

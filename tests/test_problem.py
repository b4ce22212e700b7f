"""Bad input gets the contract's error, naming the argument, before any output is touched."""

from __future__ import annotations

import numpy as np
import pytest

import fastce

X = np.zeros((4, 3), np.float32)
Y = np.array([0, 1, 2, 0])
READ_ONLY = np.zeros((4, 3), np.float32)
READ_ONLY.flags.writeable = False

CALLS = [
    # logits
    (TypeError, r"logits: expected dtype float32, .* got int64; convert", {"logits": X.astype(int)}),
    (TypeError, r"logits: .* got complex64", {"logits": X.astype(complex).astype("c8")}),
    (TypeError, r"logits: .* got uint16; pass dtype='bfloat16'", {"logits": X.astype("u2")}),
    (TypeError, r"dtype: expected 'bfloat16', .* got 'bfloat16' for logits", {"dtype": "bfloat16"}),
    (TypeError, r"dtype: .* got 'float16' for logits of dtype float32", {"dtype": "float16"}),
    (TypeError, r"logits: .* got object", {"logits": X.astype(object)}),
    (ValueError, r"logits: expected at least one axis", {"logits": np.float32(1), "targets": 0}),
    (ValueError, r"logits: expected at least one class", {"logits": X[:, :0]}),
    (ValueError, r"axis: expected a value in \[-2, 2\)", {"axis": 2}),
    # targets
    (TypeError, r"targets: expected integer class ids, got dtype float64", {"targets": Y * 1.0}),
    (TypeError, r"targets: .* got dtype bool", {"targets": Y > 0}),
    (TypeError, r"targets: .* got dtype object", {"targets": Y.astype(object)}),
    (ValueError, r"targets: expected shape \(4,\) .* got \(3,\)", {"targets": Y[:3]}),
    (ValueError, r"targets: expected shape \(4,\)", {"targets": Y[:, None]}),
    (
        IndexError,
        r"targets\[2\] = 3 is outside \[0, 3\); pass ignore_index=3",
        {"targets": [0, 1, 3, 9]},
    ),
    (IndexError, r"targets\[1\] = -1 is outside", {"targets": [0, -1, 2, 0]}),
    (IndexError, r"targets\[3\] = -100 is outside", {"targets": [0, 1, 2, -100], "ignore_index": None}),
    (IndexError, r"targets\[0\] = 4294967297", {"targets": [2**32 + 1, 0, 0, 0]}),
    (
        IndexError,
        r"targets\[0\] = 18446744073709551615",
        {"targets": np.array([2**64 - 1, 0, 0, 0], np.uint64)},
    ),
    (IndexError, r"targets\[0\] = -2147483648", {"targets": np.array([-(2**31), 0, 0, 0], np.int32)}),
    # options
    (ValueError, r"reduction: expected one of .* got 'avg'", {"reduction": "avg"}),
    (ValueError, r"num_threads: expected a whole number of at least 1, got 0", {"num_threads": 0}),
    (ValueError, r"num_threads: .* got 1.5", {"num_threads": 1.5}),
    (ValueError, r"backend: expected one of auto, cython, .* got 'cuda'", {"backend": "cuda"}),
]

GRAD_CALLS = [
    (TypeError, r"out: expected a numpy.ndarray, got list", {"out": [[0.0] * 3] * 4}),
    (TypeError, r"out: expected dtype float32, .* got int64", {"out": np.zeros((4, 3), int)}),
    (ValueError, r"out: expected shape \(4, 3\), got \(3, 4\)", {"out": np.zeros((3, 4))}),
    (ValueError, r"out: expected a writable array", {"out": READ_ONLY}),
    (ValueError, r"grad_output: expected shape \(\) with reduction='mean'", {"grad_output": [1.0] * 4}),
    (
        ValueError,
        r"grad_output: expected shape \(\) or \(4,\)",
        {"grad_output": [1.0] * 3, "reduction": "none"},
    ),
    (TypeError, r"grad_output: expected real numbers, got dtype complex128", {"grad_output": 1j}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), CALLS)
def test_errors(backend, error, message, arguments):
    arguments = {"logits": X, "targets": Y, "backend": backend} | arguments
    with pytest.raises(error, match=message):
        fastce.cross_entropy(**arguments)
    grad = np.full((4, 3), 7.0, np.float32)
    with pytest.raises(error, match=message):
        fastce.cross_entropy_with_grad(**arguments, out=grad)
    assert (grad == 7).all()


@pytest.mark.parametrize(("error", "message", "arguments"), GRAD_CALLS)
def test_gradient_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        fastce.cross_entropy_with_grad(X, Y, **arguments)


def test_the_first_bad_target_of_many_axes_is_named():
    y = np.zeros((2, 5), int)
    y[1, 3] = 8
    with pytest.raises(IndexError, match=r"targets\[1, 3\] = 8"):
        fastce.cross_entropy(np.zeros((2, 5, 4)), y)


def test_losses_go_to_out_only_without_reduction():
    with pytest.raises(ValueError, match=r"out: takes the losses of the rows"):
        fastce.cross_entropy(X, Y, out=np.zeros(4))
    with pytest.raises(ValueError, match=r"out: expected shape \(4,\)"):
        fastce.cross_entropy(X, Y, reduction="none", out=np.zeros((4, 1)))


def test_out_may_be_the_logits_but_not_overlap_them():
    buffer = np.zeros((6, 3), np.float32)
    with pytest.raises(ValueError, match="out: overlaps logits; pass out=logits to work in place"):
        fastce.cross_entropy_with_grad(buffer[:4], Y, out=buffer[1:5])
    with pytest.raises(ValueError, match="out: overlaps logits"):
        fastce.cross_entropy(buffer[:4], Y, reduction="none", out=buffer[:4, 0])
    columns = np.zeros((4, 6), np.float32)
    fastce.cross_entropy_with_grad(columns[:, ::2], Y, out=columns[:, 1::2])  # interlaced, disjoint


def test_out_needs_an_element_for_each_result():
    out = np.lib.stride_tricks.as_strided(np.zeros(3, np.float32), (4, 3), (0, 4))
    with pytest.raises(ValueError, match="out: expected an element of its own"):
        fastce.cross_entropy_with_grad(X, Y, out=out)


def test_out_may_not_overlap_targets():
    memory = np.zeros(4)
    y = memory.view(np.int64)
    with pytest.raises(ValueError, match="out: overlaps targets"):
        fastce.cross_entropy(X, y, reduction="none", out=memory)


def test_unknown_output():
    with pytest.raises(
        ValueError, match=r"outputs: expected names out of \('loss', 'rank'\), got 'lse'"
    ):
        fastce.row_stats(X, Y, outputs=["lse"])

"""Bad input gets the contract's error, naming the argument, before any output is touched."""

from __future__ import annotations

import numpy as np
import pytest

import fastce
from fastce import info

X = np.zeros((4, 3), np.float32)
Y = np.array([0, 1, 2, 0])
P = np.eye(4, 3)
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
    (ValueError, r"label_smoothing: expected .* in \[0, 1\], got 1.5", {"label_smoothing": 1.5}),
    (ValueError, r"label_smoothing: .* got -0.1", {"label_smoothing": -0.1}),
    (ValueError, r"label_smoothing: .* got nan", {"label_smoothing": np.nan}),
    (ValueError, r"base: expected a positive number other than 1, .* got 1", {"base": 1}),
    (ValueError, r"base: .* got 0", {"base": 0}),
    (ValueError, r"base: .* got -2.0", {"base": -2.0}),
    (ValueError, r"base: .* got nan", {"base": np.nan}),
    (ValueError, r"base: .* got inf", {"base": np.inf}),
    (ValueError, r"normalizer: needs .*'mean', .* got 'sum'", {"normalizer": 2, "reduction": "sum"}),
    (ValueError, r"normalizer: expected a finite number .* got -1", {"normalizer": -1}),
    (ValueError, r"normalizer: .* got nan", {"normalizer": np.nan}),
    # weights
    (ValueError, r"weight: expected shape \(3,\), got \(4,\)", {"weight": [1.0] * 4}),
    (ValueError, r"weight: expected no negative class weight, got -2.0", {"weight": [1, -2, 1]}),
    (ValueError, r"weight: expected finite numbers, got nan", {"weight": [1, np.nan, 1]}),
    (ValueError, r"weight: expected finite numbers, got inf", {"weight": [1, np.inf, 1]}),
    (TypeError, r"weight: expected real numbers, got dtype complex128", {"weight": [1j, 1, 1]}),
    (TypeError, r"weight: expected real numbers, got dtype bool", {"weight": [True, False, True]}),
    (ValueError, r"sample_weight: expected shape \(4,\), got \(3,\)", {"sample_weight": [1.0] * 3}),
    (ValueError, r"sample_weight: expected finite .* got -inf", {"sample_weight": [1, -np.inf, 1, 1]}),
    (
        TypeError,
        r"sample_weight: expected real numbers, got dtype object",
        {"sample_weight": [None] * 4},
    ),
    # probabilities as targets
    (
        ValueError,
        r"targets: .* of the logits' shape \(4, 3\), got \(4, 4\)",
        {"targets": np.zeros((4, 4))},
    ),
    (TypeError, r"targets: .* dtype complex128$", {"targets": np.zeros((4, 3), complex)}),
    (ValueError, r"targets\[0, 1\] = -1.0: expected a probability", {"targets": P - np.eye(4, 3, 1)}),
    (ValueError, r"targets\[0, 0\] = nan: expected a probability", {"targets": P * np.nan}),
]

GRAD_CALLS = [
    (TypeError, r"out: expected a numpy.ndarray, got list", {"out": [[0.0] * 3] * 4}),
    (TypeError, r"out: expected dtype float32, .* got int64", {"out": np.zeros((4, 3), int)}),
    (ValueError, r"out: expected shape \(4, 3\), got \(3, 4\)", {"out": np.zeros((3, 4))}),
    (ValueError, r"out: expected a writable array", {"out": READ_ONLY}),
    (TypeError, r"out: expected dtype float32, .* got uint16", {"out": np.zeros((4, 3), "u2")}),
    (ValueError, r"grad_output: expected shape \(\), got \(4,\)", {"grad_output": [1.0] * 4}),
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
    losses = np.full(4, 7.0, np.float32)
    to_rows = (
        {} if {"reduction", "normalizer"} & set(arguments) else {"reduction": "none", "out": losses}
    )
    with pytest.raises(error, match=message):
        fastce.cross_entropy(**arguments, **to_rows)
    assert (losses == 7).all()
    grad = np.full((4, 3), 7.0, np.float32)
    with pytest.raises(error, match=message):
        fastce.cross_entropy_with_grad(**arguments, out=grad)
    assert (grad == 7).all() or "expected a probability" in message


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
    for dtype in ("float16", "uint16", "int64"):
        with pytest.raises(TypeError, match=f"out: expected dtype float32 or float64, got {dtype}"):
            fastce.cross_entropy(X, Y, reduction="none", out=np.zeros(4, dtype))


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


def test_out_may_not_overlap_probabilities():
    t = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match="out: overlaps targets"):
        fastce.cross_entropy_with_grad(X, t, out=t)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            ValueError,
            r"outputs: expected names out of \('loss', 'lse', .*, got 'top'",
            {"outputs": ["top"]},
        ),
        (ValueError, r"outputs: 'rank' needs targets", {"outputs": ["lse", "rank"], "targets": None}),
        (TypeError, r"targets: row_stats takes class ids, not class probabilities", {"targets": P}),
        (IndexError, r"targets\[3\] = 5 is outside", {"targets": [0, 0, 0, 5]}),
        (ValueError, r"axis: expected a value in", {"axis": 2}),
    ],
)
def test_errors_of_row_stats(error, message, arguments):
    with pytest.raises(error, match=message):
        fastce.row_stats(**{"logits": X, "targets": Y, "backend": "numpy"} | arguments)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"targets: nll_loss takes class ids; .* use cross_entropy", {"targets": P}),
        (TypeError, r"log_probs: expected dtype float32, .* got int64", {"log_probs": X.astype(int)}),
        (ValueError, r"targets: expected shape \(4,\) \(log_probs without", {"targets": Y[:3]}),
        (ValueError, r"axis: .* for log_probs of shape \(4, 3\), got 5", {"axis": 5}),
        (IndexError, r"targets\[0\] = 3 is outside", {"targets": [3, 0, 0, 0]}),
        (ValueError, r"weight: expected shape \(3,\)", {"weight": 1.0}),
        (ValueError, r"reduction: expected one of", {"reduction": "average"}),
        (ValueError, r"normalizer: needs", {"normalizer": 1.0, "reduction": "sum"}),
        (ValueError, r"base: expected", {"base": 1.0}),
    ],
)
def test_errors_of_nll_loss(error, message, arguments):
    arguments = {"log_probs": X, "targets": Y} | arguments
    with pytest.raises(error, match=message):
        fastce.nll_loss(**arguments)
    out = np.full((4, 3), 7.0, np.float32)
    with pytest.raises(error, match=message):
        fastce.nll_loss_with_grad(**arguments, out=out)
    assert (out == 7).all()


def test_the_gradient_of_nll_loss_does_not_go_to_its_input():
    x = X.copy()
    with pytest.raises(ValueError, match="out: overlaps log_probs"):
        fastce.nll_loss_with_grad(x, Y, out=x)


@pytest.mark.parametrize("activation", [fastce.softmax, fastce.log_softmax])
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            TypeError,
            r"logits: expected dtype float32, .* got int64; convert",
            {"logits": X.astype(int)},
        ),
        (ValueError, r"logits: expected at least one axis", {"logits": np.float32(1)}),
        (ValueError, r"axis: expected a value in \[-2, 2\)", {"axis": -3}),
        (TypeError, r"out: expected a numpy.ndarray, got list", {"out": [0.0]}),
        (ValueError, r"out: expected shape \(4, 3\), got \(4,\)", {"out": np.zeros(4)}),
        (ValueError, r"out: expected a writable array", {"out": READ_ONLY}),
    ],
)
def test_errors_of_activations(activation, error, message, arguments):
    with pytest.raises(error, match=message):
        activation(**{"logits": X, "backend": "numpy"} | arguments)


def test_out_of_activations_may_be_the_logits_but_not_overlap_them():
    buffer = np.zeros((6, 3), np.float32)
    with pytest.raises(ValueError, match="out: overlaps logits; pass out=logits to work in place"):
        fastce.softmax(buffer[:4], out=buffer[1:5])
    with pytest.raises(ValueError, match="out: overlaps logits"):
        fastce.logsumexp(buffer[:4], out=buffer[:4, 0])
    with pytest.raises(ValueError, match=r"out: expected shape \(6,\), got \(3,\)"):
        fastce.logsumexp(buffer, out=np.zeros(3))
    with pytest.raises(TypeError, match="out: expected dtype float32 or float64, got float16"):
        fastce.logsumexp(buffer, out=np.zeros(6, np.float16))


BINARY_CALLS = [
    (TypeError, r"(logits|probs): expected dtype float32, .* got int64; convert", {"x": P.astype(int)}),
    (TypeError, r"targets: expected dtype float32, .* got complex128", {"targets": P + 0j}),
    (ValueError, r"targets: expected the shape of \w+, \(4, 3\); got \(4,\)", {"targets": P[:, 0]}),
    (
        ValueError,
        r"targets\[1, 1\] = 2: expected a probability in \[0, 1\]",
        {"targets": np.diag([1, 2, 1, 0])[:, :3]},
    ),
    (ValueError, r"reduction: expected one of .* got 'avg'", {"reduction": "avg"}),
    (ValueError, r"base: expected a positive number", {"base": 1}),
    (
        ValueError,
        r"weight: expected a shape that broadcasts to \(4, 3\), got \(4,\)",
        {"weight": np.ones(4)},
    ),
    (ValueError, r"weight: expected finite numbers, got nan", {"weight": np.nan}),
    (TypeError, r"weight: expected real numbers, got dtype bool", {"weight": True}),
    (
        ValueError,
        r"sample_weight: expected shape \(4,\) or \(4, 3\), got \(3,\)",
        {"sample_weight": np.ones(3)},
    ),
    (ValueError, r"sample_weight: expected finite numbers", {"sample_weight": [np.inf] * 4}),
    (ValueError, r"num_threads: expected a whole number", {"num_threads": 0}),
    (ValueError, r"backend: expected one of", {"backend": "cuda"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BINARY_CALLS)
def test_errors_of_the_binary_losses(error, message, arguments):
    x, targets, options = P, P, {"backend": "numpy"} | arguments
    x, targets = options.pop("x", P), options.pop("targets", P)
    out = np.full((4, 3), 7.0)
    for loss in (fastce.binary_cross_entropy_with_logits, fastce.binary_cross_entropy):
        with pytest.raises(error, match=message):
            loss(x, targets, **options)
    for loss in (
        fastce.binary_cross_entropy_with_logits_with_grad,
        fastce.binary_cross_entropy_with_grad,
    ):
        with pytest.raises(error, match=message):
            loss(x, targets, out=out, **options)
    assert (out == 7).all()


def test_more_errors_of_the_binary_losses():
    loss, options = fastce.binary_cross_entropy_with_logits, {"backend": "numpy"}
    with pytest.raises(ValueError, match=r"pos_weight: expected no negative number, got -1.0"):
        loss(P, P, pos_weight=-1.0, **options)
    with pytest.raises(ValueError, match=r"pos_weight: expected a shape that broadcasts"):
        loss(P, P, pos_weight=np.ones(4), **options)
    with pytest.raises(ValueError, match=r"out: takes the losses, which needs reduction='none'"):
        loss(P, P, out=np.zeros((4, 3)), **options)
    with pytest.raises(TypeError, match=r"out: expected dtype float32 or float64, got float16"):
        loss(P, P, out=np.zeros((4, 3), np.float16), reduction="none", **options)
    with pytest.raises(ValueError, match=r"out: overlaps logits"):
        loss(P, P.copy(), out=P, reduction="none", **options)
    with_grad = fastce.binary_cross_entropy_with_logits_with_grad
    with pytest.raises(ValueError, match=r"out: overlaps targets"):
        with_grad(P.copy(), P, out=P, **options)
    with pytest.raises(ValueError, match=r"out: expected shape \(4, 3\), got \(3, 4\)"):
        with_grad(P, P, out=np.zeros((3, 4)), **options)
    with pytest.raises(ValueError, match=r"grad_output: expected shape \(\), got \(4, 3\)"):
        with_grad(P, P, grad_output=P, **options)
    with pytest.raises(ValueError, match=r"grad_output: expected a shape that broadcasts"):
        with_grad(P, P, grad_output=P[:3], reduction="none", **options)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            TypeError,
            r"p: expected dtype float32, .* got complex128; convert with p.astype",
            {"p": P + 0j},
        ),
        (TypeError, r"p: expected dtype .* got bool", {"p": P > 0}),
        (TypeError, r"q: expected dtype float32, .* got complex128", {"q": P + 0j}),
        (ValueError, r"p: expected at least one axis", {"p": 0.5, "q": 0.5}),
        (ValueError, r"q: expected the shape of p, \(4, 3\); got \(3, 4\)", {"q": P.T}),
        (ValueError, r"axis: expected a value in \[-2, 2\) for p", {"axis": 2}),
        (ValueError, r"base: expected a positive number other than 1", {"base": 1}),
        (ValueError, r"p\[1, 0\] = -1.0: expected a probability", {"p": P - np.eye(4, 3, -1)}),
        (ValueError, r"q\[0, 1\] = nan: expected a probability", {"q": np.where(P > 0, P, np.nan)}),
    ],
)
def test_errors_of_measures(error, message, arguments):
    options = {"p": P, "q": P, "backend": "numpy"} | arguments
    p, q = options.pop("p"), options.pop("q")
    for measure in (info.cross_entropy, info.kl_divergence):
        with pytest.raises(error, match=message):
            measure(p, q, **options)
    if "q" not in arguments:
        with pytest.raises(error, match=message):
            info.entropy(p, **options)
    if set(arguments) == {"p"}:
        with pytest.raises(error, match=message):
            info.information(p, **options)


def test_errors_of_measures_from_logits():
    with pytest.raises(ValueError, match=r"q_logits: expected the shape of p_logits, \(4, 3\); got"):
        info.kl_divergence_from_logits(P, P.T)
    with pytest.raises(TypeError, match=r"q_logits: expected dtype float32, .* got int64"):
        info.kl_divergence_from_logits(P, P.astype(int))
    for measure, logits in ((info.entropy_from_logits, (P,)), (info.kl_divergence_from_logits, (P, P))):
        with pytest.raises(ValueError, match=r"base: expected a positive number"):
            measure(*logits, base=0)
        with pytest.raises(ValueError, match=r"axis: expected a value in \[-2, 2\)"):
            measure(*logits, axis=2)


@pytest.mark.parametrize("value", [-0.5, np.nan])
def test_information_of_what_is_no_probability(backend, value):
    with pytest.raises(ValueError, match=rf"p = {value}: expected a probability, neither negative"):
        info.information(value, backend=backend)
    for place in range(0, 70, 3):
        p = np.full(70, 0.5, np.float32)
        p[place] = value
        with pytest.raises(ValueError, match=rf"p\[{place}\] = {value}: expected a probability"):
            info.information(p, backend=backend)
        with pytest.raises(ValueError, match=rf"p\[0, {place}\] = {value}: expected a probability"):
            info.entropy(p[None], backend=backend)
        for q in (info.cross_entropy, info.kl_divergence):
            with pytest.raises(ValueError, match=rf"q\[0, {place}\] = {value}: expected"):
                q(np.full((1, 70), 0.5, np.float32), p[None], backend=backend)

"""What was seen on devices is what is refused and what is taken: tables in place of a device."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from sp_attention import testing
from sp_attention.kernels import half_precision, sdpa, transformers
from sp_attention.kernels.request import Request
from sp_attention.kernels.seen_on_devices import SEEN, Seen

REFUSED = "in half precision on CUDA, gradients of torch's scaled_dot_product_attention with a mask"
DTYPES = [torch.float16, torch.bfloat16]
See = Callable[..., None]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> See:
    """Put what was seen of this torch in bfloat16 on a device of compute capability 9.0 in the place of the table."""
    monkeypatch.setattr(half_precision, "capability", lambda device: "9.0")

    def put(*seen: tuple[str, str, bool], kernel: str = "sdpa", **others: str) -> None:
        row = {"torch": half_precision.VERSION, "device": "9.0", "dtype": "bfloat16"} | others
        rows = [
            Seen(kernel=kernel, backend=backend, kind=kind, right=right, date="", name="", **row)
            for backend, kind, right in seen
        ]
        monkeypatch.setattr(half_precision, "SEEN", tuple(rows))

    return put


def on_cuda(feature: str, dtype: torch.dtype = torch.bfloat16) -> Request:
    """A request for a feature whose queries are on a device that this machine may not have."""
    request = testing.request_for(feature, dtype=dtype)
    with FakeTensorMode():
        query = torch.empty(request.query.shape, dtype=dtype, device="cuda")
    return replace(request, query=query)


def test_of_what_no_machine_has_shown_nothing_is_seen_right() -> None:
    assert all(isinstance(seen, Seen) and seen.name and seen.date for seen in SEEN)
    assert {seen.kernel for seen in SEEN} <= {"sdpa", "transformers:sdpa"}


def test_what_was_seen_right_is_done_and_all_else_is_still_refused(see: See) -> None:
    window, bias = on_cuda("sliding window"), on_cuda("additive bias")
    see()
    assert (sdpa.refuses(window) or "").startswith(REFUSED)
    see(("chosen", "window", True))
    assert sdpa.refuses(window) is None
    assert (sdpa.refuses(bias) or "").startswith(REFUSED)
    assert "(window, sinks)" in (sdpa.refuses(on_cuda("attention sinks, sliding window")) or "")
    assert (sdpa.refuses(on_cuda("sliding window", torch.float16)) or "").startswith(REFUSED)


@pytest.mark.parametrize("other", [{"torch": "1.0"}, {"device": "8.0"}, {"dtype": "float16"}, {"kernel": "another"}])
def test_it_holds_for_the_version_the_device_and_the_dtype_that_were_seen(other: dict[str, str], see: See) -> None:
    see(("chosen", "window", True), **other)
    assert (sdpa.refuses(on_cuda("sliding window")) or "").startswith(REFUSED)


@pytest.mark.parametrize("backend", ["any", "cudnn"])
def test_that_cudnn_was_right_lifts_nothing(backend: str, see: See) -> None:
    see((backend, "window", True))
    assert (sdpa.refuses(on_cuda("sliding window")) or "").startswith(REFUSED)


def taken(request: Request, monkeypatch: pytest.MonkeyPatch, kernel: str = "sdpa") -> list[SDPBackend] | None:
    """What torch may take of its own, None where it may take all but cuDNN's."""
    found: list[list[SDPBackend]] = []

    def spy(backends: list[SDPBackend]) -> nullcontext[None]:
        found.append(backends)
        return nullcontext()

    monkeypatch.setattr(half_precision, "sdpa_kernel", spy)
    kind = sdpa.kind if kernel == "sdpa" else transformers.kind
    half_precision.torchs_choice(kernel, kind, request)
    return found[0] if found else None


def test_where_torchs_choice_was_wrong_it_is_given_those_that_were_right(
    see: See, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = on_cuda("sliding window")
    see(("chosen", "window", False), ("flash", "window", False), ("efficient", "window", True))
    assert sdpa.refuses(window) is None
    assert taken(window, monkeypatch) == [SDPBackend.EFFICIENT_ATTENTION]
    assert taken(on_cuda("additive bias"), monkeypatch) is None
    assert taken(testing.request_for("sliding window", dtype=torch.bfloat16), monkeypatch) is None
    see(("chosen", "window", True), ("efficient", "window", True))
    assert taken(window, monkeypatch) is None
    see(("chosen", "window", False))
    assert (sdpa.refuses(window) or "").startswith(REFUSED)


def test_transformers_own_is_refused_only_where_it_was_seen_wrong(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    window = on_cuda("sliding window")
    see()
    assert transformers.refuses_sdpa(window) is None
    see(("chosen", "mask", False), kernel="transformers:sdpa")
    assert (transformers.refuses_sdpa(window) or "").startswith(REFUSED)
    assert transformers.refuses_sdpa(on_cuda("additive bias")) is None
    assert transformers.refuses_sdpa(on_cuda("causal")) is None
    with torch.no_grad():
        assert transformers.refuses_sdpa(window) is None
    see(("chosen", "mask", False), ("math", "mask", True), kernel="transformers:sdpa")
    assert transformers.refuses_sdpa(window) is None
    assert taken(window, monkeypatch, "transformers:sdpa") == [SDPBackend.MATH]


KINDS = {
    "causal": None,
    "packed documents": None,
    "attention sinks": None,
    "sliding window": "window",
    "sliding window on both sides": "window",
    "packed documents, sliding window": "window",
    "attention sinks, sliding window": "window, sinks",
    "additive bias": "bias",
    "mask tensor": "mask",
    "padding between real tokens": "mask",
    "padding between real tokens, sliding window": "mask",
    "any mask function (prefix-LM)": "mask",
    "last queries of a sequence": "later queries",
}


@pytest.mark.parametrize("feature", KINDS)
def test_kinds_are_what_torch_is_given_a_mask_for(feature: str) -> None:
    assert sdpa.kind(testing.FEATURES[feature]()) == KINDS[feature]

"""Writes docs/masks.md: what each kernel that comes along does, from what it says itself.

python ci/masks_page.py > docs/masks.md
"""

from dataclasses import replace

from sp_attention import testing
from sp_attention.cli.kernels import module_for
from sp_attention.cli.tables import markdown_table
from sp_attention.kernels import registry
from sp_attention.kernels.request import Backend

KERNELS = ("sdpa", "transformers:eager", "transformers:sdpa")
TEXT = """# What kernels are asked, and what they do

A kernel gets a `Request`: queries, keys and values of the whole sequence for some heads, and a `Mask`, which describes
what each query may see. A query sees a key when **every** condition that the mask has holds:

| field of `Mask` | a query sees a key when |
|---|---|
| `causal` | the key is not after the query |
| `window` | \\|query - key\\| < window; so a causal window is the number of keys seen, the query's own included |
| `documents` | both are of one document, or one chunk; the numbers never decrease along a row |
| `padding` | the key is real |
| `function` | a function of transformers' signature, `(batch, head, query, key)`, says so: prefix-LM, images, yours |
| `explicit` | a tensor `[1\\|B, 1\\|H, 1\\|Sq, Sk]` says so |

Positions count in the sequence of the keys; the first query stands at `offset`. A query that sees nothing yields zeros,
and with `transformers:eager` in float32 and bfloat16 the mean of all values, as in transformers' own eager attention.
All of it has a bool form: `mask.dense()`, or `mask.dense(range(0, 256))` for some of the queries. What is cheaper than
that, for masks without `function` and `explicit`, is in `sp_attention.kernels`: the runs of queries that see intervals
of real keys (`intervals`), and calls for kernels that take sequences of various lengths, `cu_seqlens` (`varlen`).

A kernel does a request exactly, or its `refuses` gives the reason. This is what the kernels that come along say to the
smallest request for each feature. A **yes** is tested: output, weights and every gradient, against attention written
out in float64. `transformers:eager` is the model's own function, here of a model that has the feature.

"""
CHECK = """
## Check a kernel of your own

`sp_attention.testing` has these requests, and the check, which is all that a plugin's own test needs:

```python
from sp_attention import Backend, testing


def refuses(request):
    return "it has no dropout" if request.dropout else None


backend = Backend("cpu", "written-out", testing.attend, refuses=refuses)
testing.conform(backend, refused=["dropout"])
```

A kernel that is not right somewhere, or refuses more or less than that, is an `AssertionError` with a line for each
feature. For a kernel in low precision, `conform(..., device="cuda", dtype=torch.bfloat16)` allows twice the error that
attention written out has in that dtype, and at least 5e-6 in float32. In half precision on CUDA `sdpa` refuses what it
would need a mask of torch's for while gradients are wanted, unless that was seen right: [devices](devices.md).
`testing.check` is the same for one feature.

This page is written by `python ci/masks_page.py > docs/masks.md`; a test compares.
"""


def backends() -> dict[str, Backend]:
    """The kernels that come along, for the CPU."""
    found = {backend.kernel: backend for backend in registry.usable("cpu")}
    return {name: found[name] for name in KERNELS}


def page() -> str:
    rows = {
        feature: [
            backend.refuses(replace(build(), module=module_for(feature))) or "yes" for backend in backends().values()
        ]
        for feature, build in testing.FEATURES.items()
    }
    rows["attention weights"] = [
        "yes" if backend.attend_with_weights else "never holds them" for backend in backends().values()
    ]
    head = ["", *(f"`{name}`" for name in backends())]
    return f"{TEXT}{markdown_table(head, ([feature, *cells] for feature, cells in rows.items()))}\n{CHECK}"


if __name__ == "__main__":
    print(page(), end="")

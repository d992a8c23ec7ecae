"""torch's attention without that of cuDNN, which torch takes first on Hopper and Blackwell devices."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Within it torch's scaled_dot_product_attention is not cuDNN's.

    torch 2.11 keeps cuDNN's plans for backward without the strides of the gradient that they were made for (see the
    review of pytorch pull request 191576), so that the next of the same shape and other strides gets wrong gradients,
    as on an H200 it did. With a mask they can also be NaN (pytorch issue 196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)

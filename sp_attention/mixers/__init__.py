"""Mixers: linear attention, state spaces and short convolutions, by the exchange that attention has.

A model calls few functions for them. How the arguments of each are cut, by heads or by tokens, is data, and plugins
add to it.
"""

from sp_attention.mixers.declared import Convolution as Convolution
from sp_attention.mixers.declared import Cut as Cut
from sp_attention.mixers.declared import Fused as Fused
from sp_attention.mixers.declared import Scan as Scan
from sp_attention.mixers.hookspecs import hookimpl as hookimpl

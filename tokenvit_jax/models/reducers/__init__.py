"""Token reducers of plain hosts, between attention and MLP of a block.

The methods are Token Pooling (Marin et al. 2021) and the methods that it compares with (Section 5
and Supplement D), PoWER-BERT's search for the number of tokens (Goyal et al. 2020), Token Merging
(ToMe, Bolya et al. 2023), EViT (Liang, Y. et al. 2022) and the clustered queries of the Adaptive
Clustering Transformer (ACT, Zheng et al. 2020), which keeps all tokens.
"""

from tokenvit_jax.models.reducers.reductions import (
    HalveMap,
    Patches,
    Reduced,
    reduce_tokens,
)
from tokenvit_jax.models.reducers.search import (
    SoftExtract,
    clip_retention,
    is_retention,
    retention_mass,
    searched_keep,
)
from tokenvit_jax.models.reducers.settings import (
    ACT,
    CLUSTERINGS,
    CONVOLUTION,
    EVIT,
    MERGING,
    METHODS,
    SEARCH,
    SELECTIONS,
    TokenReducer,
    evit_keep,
    reads_keep,
    tome_keep,
)

# Ends of the paths of the parameters that a reducer adds to a host.
OPTIONAL_PARAMETERS = ("soft_extract/retention", "halve_map/conv/kernel", "halve_map/conv/bias")

__all__ = [
    "ACT",
    "CLUSTERINGS",
    "CONVOLUTION",
    "EVIT",
    "MERGING",
    "METHODS",
    "OPTIONAL_PARAMETERS",
    "SEARCH",
    "SELECTIONS",
    "HalveMap",
    "Patches",
    "Reduced",
    "SoftExtract",
    "TokenReducer",
    "clip_retention",
    "evit_keep",
    "is_retention",
    "reads_keep",
    "reduce_tokens",
    "retention_mass",
    "searched_keep",
    "tome_keep",
]

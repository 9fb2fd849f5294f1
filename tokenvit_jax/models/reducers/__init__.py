"""Token reducers of plain hosts, between attention and MLP of a block.

The methods are Token Pooling (Marin et al. 2021) and the methods that it compares with (Section 5
and Supplement D), PoWER-BERT's search for the number of tokens (Goyal et al. 2020), Token Merging
(ToMe, Bolya et al. 2023), EViT (Liang, Y. et al. 2022), DynamicViT (Rao et al. 2021) and the
clustered queries of the Adaptive Clustering Transformer (ACT, Zheng et al. 2020), which keeps all
tokens.
"""

from tokenvit_jax.models.reducers.predictor import (
    DROPPED,
    KeepPredictor,
    Kept,
    nearest_kept,
    ratio_loss,
    sample_kept,
)
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
    DYNAMICVIT,
    EVIT,
    MERGING,
    METHODS,
    SEARCH,
    SELECTIONS,
    TokenReducer,
    dynamicvit_keep,
    evit_keep,
    reads_keep,
    tome_keep,
)

# Ends of the paths of the parameters that a reducer adds to a host.
OPTIONAL_PARAMETERS = (
    "soft_extract/retention",
    *(f"halve_map/conv/{name}" for name in ("kernel", "bias")),
    *(f"keep_predictor/norm/{name}" for name in ("scale", "bias")),
    *(
        f"keep_predictor/{layer}/{name}"
        for layer in ("fc_in", "fc1", "fc2", "fc_out")
        for name in ("kernel", "bias")
    ),
)

__all__ = [
    "ACT",
    "CLUSTERINGS",
    "CONVOLUTION",
    "DROPPED",
    "DYNAMICVIT",
    "EVIT",
    "MERGING",
    "METHODS",
    "OPTIONAL_PARAMETERS",
    "SEARCH",
    "SELECTIONS",
    "HalveMap",
    "KeepPredictor",
    "Kept",
    "Patches",
    "Reduced",
    "SoftExtract",
    "TokenReducer",
    "clip_retention",
    "dynamicvit_keep",
    "evit_keep",
    "is_retention",
    "nearest_kept",
    "ratio_loss",
    "reads_keep",
    "reduce_tokens",
    "retention_mass",
    "sample_kept",
    "searched_keep",
    "tome_keep",
]

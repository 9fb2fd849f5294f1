"""Assigns the operations of a compiled program to parts of a step and to layers, by their origins.

The *origin* of an operation is the name that XLA keeps of it: transformations, layers, operators of
this package and the operation, such as
"jit(step)/jvp(DGT)/stages_2_11/attention/qkv/dot_general".
"""

import re

# The first pattern that is found in an origin decides. Operators of this package appear by their
# names, layers by theirs.
_PATTERNS = (
    ("selection of keys", r"tokenvit_jax\.ops\.(top_k|selection|kth)|group_attention\)*/while"
                          r"|group_attention.*/(sort|top_k|sort_queries|select_keys|route|assign)\b"),
    ("attention in groups", r"group_attention|group_sums|centroid"),
    ("clustering and merging", r"density_peaks|assign_clusters|merge_tokens|cluster_sums|kmedoids"
                               r"|kmeans|superpixels|reconstruct_tokens|token_merging|reducer"),
    ("linear layers of attention", r"attention/(\w+/)*(qkv|q|kv|k|v|proj)/"),
    ("attention", r"attention|attend"),
    ("convolutions", r"depthwise|cpe|conv(?!ert)"),
    ("norms", r"norm(?!alize)"),
    ("feed-forward networks", r"/(ffn|mlp)/|gelu"),
    ("patches and stems", r"patch|stem|embed|downsample|merging"),
    ("head and loss", r"head|logits|softmax|cross_entropy|log_softmax"),
    ("batch: mixing, normalisation", r"prepare|mix_batch|draw_mixing|random|threefry|normalize"),
)  # fmt: skip
OTHER_MODEL = "model, the rest"
OTHER = "outside the model: optimizer, averages, metrics"
UNNAMED = "copies and others that the compiler added"
PARTS = (*(name for name, _ in _PATTERNS), OTHER_MODEL, OTHER, UNNAMED)

_DIFFERENTIATED = re.compile(r"jvp\(|transpose\(")
# Parts of an origin that are no layers.
_NO_LAYER = re.compile(
    r"^(jit\((?!tokenvit_jax)|jvp\(|transpose\(|vmap\(|pmap\(|shard_map|while$|body$|cond$|branch_"
    r"|closed_call$|checkpoint|remat|custom_[jv][vj]p|core_call|pjit|rematted)"
)


def part_of(origin: str) -> str:
    """Returns which of PARTS an operation belongs to."""
    if not origin:
        return UNNAMED
    for name, pattern in _PATTERNS:
        if re.search(pattern, origin):
            return name
    return OTHER_MODEL if _DIFFERENTIATED.search(origin) or module_path(origin) else OTHER


def part_of_task(origin: str) -> str:
    """Returns the part of a model with a backbone, a head and a loss that an operation belongs to.

    It is the top module and one of PARTS, such as "head: convolutions".
    """
    top = re.search(r"/(backbone|head|auxiliary)[./]", origin)
    return f"{top[1] if top else 'loss and others'}: {part_of(origin)}"


def module_path(origin: str) -> str:
    """Returns the path of the layer in an origin, such as "stages_0_0/attention/qkv"."""
    *path, _ = origin.split("/")
    layers: list[str] = []
    for part in path:
        if not part or _NO_LAYER.match(part) or part.startswith("jit("):
            continue
        name, *method = part.split(".")  # "q.affine": a method of a layer, behind its name or not
        if not method:
            layers.append(part)
        elif name.isidentifier() and not name[0].isupper() and layers[-1:] != [name]:
            layers.append(name)
    return "/".join(layers)


def layer_of(origin: str) -> str:
    """Returns the kind of layer, the operator and the direction, with "*" for numbers of blocks."""
    operator = re.findall(r"tokenvit_jax\.(?:ops|kernels)\.(\w+)", origin)
    path = re.sub(r"_\d+$|_\d+(?=/)", "_*", module_path(origin))
    last = origin.rsplit("/", 1)[-1] if origin else "no name"
    name = "/".join(filter(None, [path, *operator[-1:], last]))
    return f"{name} (backward)" if "transpose(" in origin else name

"""The forms of the operators, by platform, and the reasons for them."""

# Operator -> platform -> the form that runs there, and what it was chosen for.
FORMS: dict[str, dict[str, str]] = {
    "attention": {
        "cpu": "heads first, in chunks of queries: plain batched products are 3 times as fast",
        "default": "jax.nn.dot_product_attention",
    },
    "cluster centers": {
        "default": "the largest scores, and a scatter of their numbers",
        "cuda": "counts the larger scores of every token in one launch, instead of a sort",
    },
    "cluster sums": {
        "cpu": "scatter: 5 to 100 times as fast as products",
        "default": "products with the membership matrix, deterministic on accelerators",
        "cuda": "products with the membership matrix in registers; deterministic",
    },
    "depthwise kernel gradient": {
        "cpu": "line by line: up to 10 times as fast as strided reductions",
        "default": "one reduction per kernel entry",
    },
    "distances": {
        "default": "products in full precision",
        "cuda": "three products in TF32: equal assignments, 1.3 times as fast on an H100",
    },
    "group attention, dense": {
        "cpu": "in chunks of queries, which stay in the cache",
        "default": "all queries at once",
    },
    "merge tokens": {
        "cpu": "scatter: 5 to 100 times as fast as products",
        "default": "products with the membership matrix, deterministic on accelerators",
        "cuda": "maximum, weights and sums in one pass; compiled for an H200: 1 launch for 7",
        "tpu": "maximum, weights and sums in one pass",
    },
    "nearest center": {
        "cpu": "in chunks of tokens, which stay in the cache",
        "default": "in chunks of tokens that fill the device",
        "cuda": "streams over the centres: no distances in memory, one launch",
        "tpu": "streams over the centres: no distances in memory",
    },
    "nearest denser token": {
        "cpu": "in chunks of the tokens that have no denser neighbour, which stay in the cache",
        "default": "in chunks of these tokens that fill the device",
        "cuda": "streams over all tokens: no distances in memory, two launches",
        "tpu": "streams over all tokens: no distances in memory",
    },
    "nearest neighbors": {
        "cpu": "in chunks of tokens, which stay in the cache",
        "default": "in chunks of tokens that fill the device",
        "cuda": "streams over all tokens: no distances in memory, one launch",
        "tpu": "streams over all tokens; compiled for v5e, both passes: 0.8 GB for 12.6",
    },
    "pale attention": {
        "cpu": "group by group: 1.3 to 1.5 times as fast as chunks of queries",
        "default": "all groups at once",
    },
    "top indices": {
        "cpu": "lax.top_k: several times as fast as sorting",
        "default": "sorting, which the compiler can divide over devices",
    },
    "window attention": {
        "cpu": "row by row of windows, to save memory",
        "default": "all windows at once",
    },
}

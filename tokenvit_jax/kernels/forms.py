"""The forms of the operators, by platform, and the reasons for them."""

# Operator -> platform -> the form that runs there, and what it was chosen for.
FORMS: dict[str, dict[str, str]] = {
    "attention": {
        "cpu": "heads first, in chunks of queries: plain batched products are 3 times as fast",
        "default": "jax.nn.dot_product_attention",
    },
    "cluster sums": {
        "cpu": "scatter: 5 to 100 times as fast as products",
        "default": "products with the membership matrix, deterministic on accelerators",
    },
    "depthwise kernel gradient": {
        "cpu": "line by line: up to 10 times as fast as strided reductions",
        "default": "one reduction per kernel entry",
    },
    "group attention, dense": {
        "cpu": "in chunks of queries, which stay in the cache",
        "default": "all queries at once",
    },
    "layer norm": {
        "cuda": "one launch that reads the tokens once",
        "default": "XLA's reductions and fusions",
    },
    "layer norm gradient": {
        "cuda": "one launch that reads tokens and gradients once and adds the residual's gradient",
        "default": "XLA's reductions and fusions",
    },
    "pale attention": {
        "cpu": "group by group: 1.3 to 1.5 times as fast as chunks of queries",
        "default": "all groups at once",
    },
    "top indices": {
        "cpu": "lax.top_k: several times as fast as sorting",
        "default": "sorting, which the compiler can divide over devices",
    },
    "updates of vectors": {
        "cpu": "one by one: an operation costs little",
        "default": "all as one vector: compiled for an H200, a launch for many",
    },
    "window attention": {
        "cpu": "row by row of windows, to save memory",
        "default": "all windows at once",
    },
}

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
        "cuda": "bfloat16 and float16: one kernel routes, one attends; compiled for an H200 (128 "
        "images of 784 tokens, training) 4 launches and 0.1 ms of floor instead of 248 and 4.2",
        "default": "all queries at once",
    },
    "group attention, tiles": {
        "cuda": "bfloat16 and float16: kernels that read the queries and keys of a group in place; "
        "compiled for an H200 (128 images of 3,136 tokens, training) 10 launches and 0.5 ms of "
        "floor instead of 46 and 3.8",
        "default": "gathers the queries of each tile and the keys of each group",
    },
    "group sums": {
        "cuda": "one pass over the queries; compiled for an H200: a fifth of the bytes",
        "default": "products with the membership matrix in full precision",
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

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
    "k-means": {
        "cuda": "all rounds in one program per image; compiled for an H200, 98 of 196 tokens of "
        "DeiT-S: 7 launches and .05 ms a layer in place of 51 and .58",
        "default": "products with all centres and sums of clusters, round by round",
    },
    "k-medoids": {
        "cpu": "if all tokens differ, over those that are no medoids: half the distances and less",
        "cuda": "all rounds in one program per image; compiled for an H200, 98 of 196 tokens of "
        "DeiT-S: 6 launches and .04 ms a layer in place of 63 and .23",
        "default": "one masked sum over all distances a round (H200: .23 ms in place of .41), "
        "without a choice that depends on all images",
    },
    "pale attention": {
        "cpu": "group by group: 1.3 to 1.5 times as fast as chunks of queries",
        "default": "all groups at once",
    },
    "precise product": {
        "cuda": "three TF32 products: nearest of 3,136 tokens in .77 ms in place of 1.02 on an "
        "H100, and the same tokens",
        "default": "Precision.HIGHEST",
    },
    "reconstruction": {
        "cpu": "in chunks of tokens, whose distances stay in the cache",
        "default": "all tokens at once",
    },
    "reconstruction, nearest centers": {
        "cuda": "lax.top_k on each device: with the product at once .37 ms in place of .81 on an "
        "H200 (40 x 40 from 28 x 28)",
        "default": "k rounds over the smallest of groups, which are vector loops on CPU",
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

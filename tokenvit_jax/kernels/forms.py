"""The forms of the operators, by platform, and the reasons for them.

Floors of compiled programs are those of launches, bytes and products; the instructions inside
kernels were not counted when they were written down.
"""

# Operator -> platform -> the form that runs there, and the reason for it.
FORMS: dict[str, dict[str, str]] = {
    "assignment": {
        "cpu": "image by image: 1.5 to 4 times as fast as all at once, where every image takes as "
        "many turns as the slowest",
        "cuda": "all turns in one program per image; compiled for an H200, one launch in place of "
        "20 and more for every target, between which the host asks whether a loop has ended",
        "default": "all images at once: every turn of a loop is a few operations",
    },
    "attention": {
        "cpu": "heads first, in chunks of queries: plain batched products are 3 times as fast",
        "cuda": "cuDNN, no logits in memory: on an H100 2 to 4 times as fast from 196 tokens on; "
        "up to 64 tokens the kernels of windows, by launches and bytes of programs for an H200",
        "default": "jax.nn.dot_product_attention, in XLA's operations",
        "tpu": "from 2^20 logits per head on JAX's flash attention, no logits in memory: compiled "
        "for v5e, forward and backward with 67,200 queries and 4,200 keys 3.6 GB instead of 48",
    },
    "casts of weights": {
        "cpu": "one by one: an operation costs little",
        "default": "all of a shape at once: compiled for an H200, a launch for many",
        "tpu": "one by one: joining matrices costs copies; with the norm of gradients likewise, "
        "compiled for 256 TPU v5e, a floor of 2.5 ms instead of 7.4 in a training step of DeiT-S",
    },
    "channel sums": {
        "cuda": "Pallas: one pass for both sums",
        "default": "XLA's operations",
    },
    "cluster centers": {
        "default": "the largest scores, and a scatter of their numbers",
        "cuda": "up to 1,024 tokens, counts the larger scores of every token, in one launch for "
        "all scales; compiled for an H200, 128 images of 3,136 tokens take .20 ms so, .03 sorted",
    },
    "cluster sums": {
        "cpu": "scatter: 5 to 100 times as fast as products",
        "default": "products with the membership matrix, deterministic on accelerators",
        "cuda": "products with the membership matrix in registers; deterministic",
    },
    "deformable attention": {
        "cpu": "one corner of all places after another: 2.6 to 3.4 times as fast, a tenth of the "
        "memory",
        "default": "all places of a map at once: compiled for an H200, a tenth of the launches and "
        "a seventh of the floor",
    },
    "deformable attention gradient": {
        "cpu": "the derivative of the einsum, all places of a map at once: 3.3 times as fast as "
        "the other form with 8,400 cells",
        "default": "all places of a map at once, with products and sums in the kernels that gather "
        "and add: compiled for an H200, .4 of the floor and a fifth of the memory",
    },
    "depthwise block": {
        "cpu": "shifted products, one loop: 9 to 25 times as fast as XLA's convolution; activated "
        "maps are stored: 2 times as fast, with the linear layers around, as fused with the next",
        "default": "XLA's convolution: 1.5 to 3.7 times as fast as shifted products on an H100",
        "cuda": "Pallas: reads the input once, with everything around the convolution; compiled "
        "for an H200: no spills",
        "tpu": "XLA's convolution: compiled for v5e, it reads a map once, not 4 times like "
        "shifted products, in half of the instructions (64 images of 14 x 14 x 1,024); shifted "
        "products for fewer than 8 images or float32",
    },
    "depthwise block gradient": {
        "cpu": "line by line: up to 10 times as fast as strided reductions",
        "default": "XLA's convolutions: 2.6 to 4.5 times as fast as reductions on an H100, with "
        "the forward pass",
        "cuda": "Pallas: all gradients in one pass; compiled for an H200: no spills",
        "tpu": "likewise: compiled for v5e, by the compiler's estimate .06 ms instead of .48 for "
        "the kernel (64 images of 14 x 14 x 1,024), 91 instead of 122 ms for a training step of "
        "DGT-T; shifted products for float32",
    },
    "depthwise branches": {
        "cpu": "one after another, like a depthwise block",
        "default": "one after another, like a depthwise block",
        "cuda": "Pallas: reads the input once for all; compiled for an H200: no spills",
        "tpu": "one after another, like a depthwise block",
    },
    "gelu": {
        "cuda": "Pallas, behind a bias: half of the instructions of XLA's error function",
        "default": "XLA's operations",
    },
    "gelu gradient": {
        "cuda": "Pallas: one pass, with the gradient of the bias",
        "default": "XLA's operations",
    },
    "gradient of a convolution": {
        "cpu": "from 1,024 pixels and 128 channels on a product of matrices for every entry of the "
        "kernel: 3 to 4 times as fast as XLA's convolution",
        "default": "as autodiff writes it: a convolution",
    },
    "gradient of a linear layer": {
        "cpu": "as a product of matrices: no transposed copies; 1.1 times as fast a training step "
        "of a feed-forward network",
        "default": "as autodiff writes it",
    },
    "group attention, dense": {
        "cpu": "in chunks of queries, which stay in the cache; from about 600 tokens on in tiles "
        "of 16 queries instead of several chunks (784 tokens, training: 1.3 to 1.6 times as fast)",
        "cuda": "bfloat16 and float16: one kernel routes, one attends; compiled for an H200 (128 "
        "images of 784 tokens, training) 4 launches and 0.1 ms of floor instead of 248 and 4.2",
        "default": "all queries at once",
        "tpu": "one program for the heads of an image that fill a register, up to 1,024 tokens, "
        "or 4,096 in bfloat16 from TPU v5 on: neither logits nor scores go through memory",
    },
    "group attention, tiles": {
        "cpu": "like the default form, in tiles of at least 16 queries instead of 32: 1.2 times as "
        "fast at 1,024 tokens",
        "cuda": "bfloat16 and float16: kernels that read the queries and keys of a group in place; "
        "compiled for an H200 (128 images of 3,136 tokens, training) 10 launches and 0.5 ms of "
        "floor instead of 46 and 3.8",
        "default": "gathers the queries of each tile and the keys of each group",
        "tpu": "the kernel of the dense path, up to the same lengths: no sort, gather or scatter",
    },
    "group sums": {
        "cuda": "one pass over the queries; compiled for an H200 (128 images of 3,136 tokens) "
        "0.02 ms of floor instead of 0.14",
        "default": "products with the membership matrix in full precision",
    },
    "groups of tokens": {
        "cpu": "group by group: 1.3 to 1.5 times as fast as chunks of queries",
        "default": "all groups at once",
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
    "layer norm": {
        "cuda": "one launch that reads the tokens once",
        "default": "XLA's reductions and fusions",
    },
    "layer norm gradient": {
        "cuda": "one launch that reads tokens and gradients once and adds the residual's gradient",
        "default": "XLA's reductions and fusions",
    },
    "matching": {
        "cpu": "object by object: 1.4 times as fast as ten at a time; only objects take a turn, so"
        " that 8 objects in 100 places take a fourteenth of the time of all places",
        "default": "ten objects at a time, whose overlaps with 270,000 anchors take 10 MB: compiled"
        " for an H100, 600 launches less in a training step of Mask R-CNN",
    },
    "merge tokens": {
        "cpu": "scatter: 5 to 100 times as fast as products",
        "default": "products with the membership matrix, deterministic on accelerators",
        "cuda": "maximum, then weights and sums, in one launch; compiled for an H200: 1 for 7",
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
        "cuda": "streams over all tokens twice: no distances in memory, one launch; the first pass "
        "bounds the distance of neighbours, so that the second inserts few others",
        "tpu": "streams over all tokens; compiled for v5e, 64 x 3,136 tokens: both passes move "
        "0.3 GB in place of 12.6",
    },
    "non-maximum suppression": {
        "cpu": "in blocks of 128 boxes: no matrix of all pairs, and few turns in a block",
        "default": "all boxes at once: every turn of a loop is a launch",
    },
    "norm of gradients": {
        "cpu": "array by array: an operation costs little",
        "default": "all vectors, and all matrices of a shape, at once: compiled for an H100, 420 "
        "launches less in a training step of DGT-T",
        "tpu": "all vectors at once, matrices one by one: joining these costs copies",
    },
    "normal distribution": {
        "default": "by the error function: one operation, which XLA fuses; on CPU the "
        "complementary one of `jax.nn.gelu` took 5 times as long",
        "tpu": "an exponential of a polynomial: compiled for v5e, .54 of the cycles of GELU",
    },
    "pale attention": {
        "cpu": "rows, then columns",
        "cuda": "groups of up to 128 tokens of square maps: kernels that read and write the map in "
        "place; compiled for an H200, two fifths of the bytes at 14 x 14, and 2 launches instead "
        "of 9 in training",
        "default": "rows and columns of square maps together: by launches and bytes of programs "
        "for an H200",
    },
    "parts of a linear layer": {
        "cuda": "without gradients a product for each: compiled for an H200, a floor of 2.5 ms "
        "instead of 2.8 for the forward pass of DeiT-S. In training, cuDNN needs copies anyway, of "
        "an even number of tokens",
        "default": "one product, which is cut",
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
    "roi align": {
        "cpu": "in chunks of 16 regions of about as many samples, whose bins stay in the cache",
        "default": "in up to 8 chunks of at least 256 regions: for 1,000 with up to 21 samples, "
        "half the reads of one chunk, and 45 turns of a loop, which are launches, instead of 560",
    },
    "roi align gradient": {
        "cpu": "in chunks of 16 regions of about as many samples, whose bins stay in the cache",
        "default": "in up to 8 chunks of at least 256 regions: for 1,000 with up to 21 samples, "
        "half the reads of one chunk, and 45 turns of a loop, which are launches, instead of 560",
    },
    "scored attention": {
        "cuda": "cuDNN, and a kernel that sums up the weights; compiled for an H200, a seventh of "
        "the bytes at 197 tokens, and 3 launches instead of 11",
        "default": "all logits at once",
    },
    "standardised kernels": {
        "cpu": "one by one: an operation costs little",
        "default": "all with as many inputs at once: compiled for an H200, 57 launches instead of "
        "177 for the 52 kernels of DPT-hybrid",
    },
    "sums of gelu": {
        "cuda": "Pallas: one pass for both sums",
        "default": "XLA's operations",
    },
    "sums over devices": {
        "cpu": "one by one: joining costs copies",
        "default": "in long vectors: compiled for eight H100, 584 launches instead of 840 in a "
        "training step of DeiT-S",
        "tpu": "one by one: its compiler joins messages without copies",
    },
    "top indices": {
        "cpu": "lax.top_k: several times as fast as sorting",
        "cuda": "up to 256 scores: a kernel that counts the larger ones of each; compiled for an "
        "H200, 1 launch in place of 3; more: lax.top_k of one device's images: on an H100, for 98 "
        "of 784 tokens in each of 48 groups, 1.3 ms instead of 3.6",
        "default": "sorting, which the compiler can divide over devices",
    },
    "updates of centroids": {
        "cpu": "block by block: an operation costs little",
        "default": "all blocks at once: compiled for an H200, a launch for many",
        "tpu": "block by block: joining costs an operation for each, see updates of vectors",
    },
    "updates of vectors": {
        "cpu": "one by one: an operation costs little",
        "default": "as one vector: compiled for an H200, 12 launches for 360 of them",
        "tpu": "one by one: joining costs an operation for each; with centroids likewise, compiled "
        "for a v5e, 311 fusions less in a training step of DGT-T",
    },
    "window attention": {
        "cpu": "row by row of windows, to save memory",
        "cuda": "kernels that read and write the map in place and keep no weights; compiled for an "
        "H200, a seventh of the bytes for windows of 7 x 7 in training",
        "default": "all windows at once",
    },
}

"""Group attention with all logits, which masks the keys that a group did not select."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from tokenvit_jax.kernels import cudnn
from tokenvit_jax.kernels.attention import attend
from tokenvit_jax.ops.dtypes import softmax_dtype


def attend_dense_by_cudnn(
    q: Float[Array, "B N l D"],
    k: Float[Array, "B N L D"],
    v: Float[Array, "B N L D"],
    groups: Int32[Array, "B N l"],
    selected: Bool[Array, "B N L G"],
) -> Float[Array, "B N l D"]:
    """Attends like :func:`attend_dense` as plain attention with a head dim of D + G.

    Args:
      q: scaled queries (B, N, l, D) in bfloat16 or float16.
      k: keys (B, N, L, D).
      v: values (B, N, L, D).
      groups: group of each query (B, N, l), in [0, G).
      selected: whether a group selected a key (B, N, L, G).

    Returns:
      (B, N, l, D) in the type of ``v``; it can be differentiated.
    """
    member = cudnn.BIAS_UNIT * jax.nn.one_hot(groups, selected.shape[-1], dtype=q.dtype)
    bias = jnp.where(selected, 0.0, cudnn.NEVER / cudnn.BIAS_UNIT).astype(k.dtype)
    q, k = jnp.concatenate([q, member], -1), jnp.concatenate([k, bias], -1)
    output = cudnn.attend_augmented(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    return jnp.swapaxes(output, 1, 2)


@jax.custom_vjp
def attend_dense(
    q: Float[Array, "B N l D"],
    k: Float[Array, "B N L D"],
    v: Float[Array, "B N L D"],
    groups: Int32[Array, "B N l"],
    selected: Bool[Array, "B N L G"],
) -> Float[Array, "B N l D"]:
    """Attends with all logits and a mask.

    Args:
      q: scaled queries (B, N, l, D).
      k: keys (B, N, L, D).
      v: values (B, N, L, D).
      groups: group of each query (B, N, l), in [0, G).
      selected: whether a group selected a key (B, N, L, G).

    Returns:
      (B, N, l, D) in the type of ``v``.
    """
    return _forward(q, k, v, groups, selected)[0]


def _forward(q, k, v, groups, selected):
    num_groups = selected.shape[-1]
    # The mask rides on the product: appending a query's one-hot group and a key's (0 or -1e30) per
    # group adds exactly that to the logit, without a gather of L x L mask entries.
    member = jax.nn.one_hot(groups, num_groups, dtype=q.dtype)
    never = max(-1e30, float(jnp.finfo(k.dtype).min))  # float16 ends at -65504
    bias = jnp.where(selected, 0.0, never).astype(k.dtype)
    output, weights, total = attend(
        jnp.concatenate([q, member], -1), jnp.concatenate([k, bias], -1), v
    )
    return output, (q, k, v, weights, total, output)


def _backward(residuals, d_output):
    q, k, v, weights, total, output = residuals
    dtype = softmax_dtype(q.dtype)
    d_output = d_output.astype(dtype) / total  # weights are not normalised
    delta = jnp.sum(d_output * output.astype(dtype), -1, keepdims=True)
    d_output = d_output.astype(v.dtype)
    product = lambda spec, *xs: jnp.einsum(spec, *xs, preferred_element_type=dtype)  # noqa: E731
    d_v = product("bnqk,bnqd->bnkd", weights, d_output)
    d_weights = product("bnqd,bnkd->bnqk", d_output, v)
    d_logits = (weights.astype(dtype) * (d_weights - delta)).astype(q.dtype)
    d_q = product("bnqk,bnkd->bnqd", d_logits, k)
    d_k = product("bnqk,bnqd->bnkd", d_logits, q)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


attend_dense.defvjp(_forward, _backward)

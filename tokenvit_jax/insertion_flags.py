"""What is inserted into a trained model from the command line.

--keep, --method and --carry: a token reducer; --expedite: clustering and reconstruction of tokens.
"""

import re
from typing import Any

from absl import flags

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.reducers import METHODS, reads_keep
from tokenvit_jax.published import TOKEN_POOLING

KEPT_METHODS = [method for method in METHODS if reads_keep({"method": method})]


def define(flag_values: flags.FlagValues) -> None:
    """Defines the flags."""
    flags.DEFINE_multi_string(
        "keep",
        [],
        "with a token reducer too: patches that go on, block by block (196,195,...), or level0 to "
        "level7 of Token Pooling; again for more of them",
        flag_values=flag_values,
    )
    flags.DEFINE_list(
        "method",
        ["weighted_kmedoids"],
        f"of the token reducer, or several: {', '.join(KEPT_METHODS)}",
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "carry",
        False,
        "whether sizes of clusters weigh in later attention: for models trained without a reducer",
        flag_values=flag_values,
    )
    flags.DEFINE_multi_string(
        "expedite",
        [],
        "with tokens clustered, too: blocks before and among the centres and their map, "
        "10,14,28x28, or 10,14,28x28,logits to reconstruct the logits of a head, maybe with "
        ",temperature=20 behind it; again for more",
        flag_values=flag_values,
    )


def insertions(flag_values: flags.FlagValues, model: str) -> dict[str, dict[str, Any]]:
    """Returns what the flags insert, as settings of a model.

    Args:
      flag_values: parsed flags.
      model: its name. "level3" is the one that Token Pooling reports for it, or else for DeiT-S.

    Returns:
      What to call it -> overrides of `create_model`: `token_reducer` for every --keep and every
      --method, `expedite` for every --expedite.

    Raises:
      UserError: a value that is not valid.
    """
    for method in flag_values.method:
        if method not in KEPT_METHODS:
            raise UserError(f"--method={method} is not valid; valid: {', '.join(KEPT_METHODS)}")
    reducers = {
        f"{method}{' carry' if flag_values.carry else ''} {text}": {
            "token_reducer": {
                "keep": _keep(text, model), "method": method, "carry": flag_values.carry
            }
        }
        for text in flag_values.keep
        for method in flag_values.method
    }  # fmt: skip
    expedited = {f"expedite {text}": {"expedite": _expedite(text)} for text in flag_values.expedite}
    return reducers | expedited


def _expedite(text):
    found = re.fullmatch(r"(\d+),(\d+),(\d+)x(\d+)(,logits)?(,temperature=([\d.]+))?", text)
    if not found:
        raise UserError(
            f"--expedite={text} is not valid; valid: ALPHA,BETA,ROWSxCOLUMNS, such as 10,14,28x28, "
            "and ,logits and ,temperature=20 behind it"
        )
    alpha, beta, *clusters = map(int, found.groups()[:4])
    where = "logits" if found[5] else "blocks"
    settings = {"alpha": alpha, "beta": beta, "clusters": tuple(clusters), "where": where}
    return settings | ({"temperature": float(found[7])} if found[7] else {})


def _keep(text, model):
    levels = TOKEN_POOLING.get(model, TOKEN_POOLING["deit_s"])
    level = re.fullmatch(r"level(\d)", text)
    if level and int(level[1]) < len(levels):
        return levels[int(level[1])].keep
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(
            f"--keep={text} is not valid; valid: numbers separated by commas, one for every block, "
            f"or level0 to level{len(levels) - 1}"
        )
    return tuple(map(int, text.split(",")))

"""Reads and writes insertions into a trained model in the form of command-line flags.

--keep, --method and --carry insert a token reducer; --expedite clusters and reconstructs tokens.
Several commands share these flags; :func:`describe` writes what --expedite reads.
"""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.published import TOKEN_POOLING

if TYPE_CHECKING:
    from tokenvit_jax.models.expedite import Expedite

# Numbers have few digits: Python refuses to read thousands of them.
EXPEDITE = re.compile(
    r"(\d{1,9}),(\d{1,9}),(\d{1,9})x(\d{1,9})(,logits)?"
    r"(?:,temperature=((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?))?"
)
# The reducers that keep given numbers of tokens. A test compares them with `models.reducers`, whose
# import is too slow for --help.
KEPT_METHODS = (
    "kmeans", "weighted_kmeans", "kmedoids", "weighted_kmedoids", "powerbert", "random",
    "importance", "evit", "tome", "act",
)  # fmt: skip


def define_flags(flag_values: flags.FlagValues) -> None:
    """Defines the flags."""
    flags.DEFINE_multi_string(
        "keep",
        [],
        "also with a token reducer: patches kept after each block (196,195,...), or level0 to "
        "level7 of Token Pooling; repeat the flag for several settings",
        flag_values=flag_values,
    )
    flags.DEFINE_list(
        "method",
        ["weighted_kmedoids"],
        f"methods of the token reducer, separated by commas: {', '.join(KEPT_METHODS)}",
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "carry",
        False,
        "weight later attention by cluster sizes: for models trained without a reducer",
        flag_values=flag_values,
    )
    flags.DEFINE_multi_string(
        "expedite",
        [],
        "also with clustered tokens: blocks before the clustering, blocks on the centres, and map "
        "of centres (10,14,28x28); append ,logits to reconstruct the logits of a head, and "
        ",temperature=20 for a temperature that does not follow the scale of the tokens; repeat "
        "the flag for several settings",
        flag_values=flag_values,
    )


def from_flags(
    flag_values: flags.FlagValues, model: str, check: Callable[[Mapping[str, Any]], Any]
) -> dict[str, dict[str, Any]]:
    """Returns the insertions that the flags request, as settings of a model.

    Args:
      flag_values: parsed flags.
      model: name of the model. "level3" means the level that Token Pooling reports for this model,
        or the level of DeiT-S if the paper reports none.
      check: function of overrides of the model, without computation, such as
        `models.backbone.variable_shapes`; raises UserError where they do not fit.

    Returns:
      Label -> overrides of `create_model`: `token_reducer` for every --keep and every --method,
      `expedite` for every --expedite.

    Raises:
      UserError: a value is not valid or does not fit the model, or a flag has no effect.
    """
    for method in flag_values.method:
        if method not in KEPT_METHODS:
            hint = did_you_mean(method, KEPT_METHODS)
            valid = ", ".join(KEPT_METHODS)
            raise UserError(f"--method={method} is not valid{hint}; valid: {valid}")
    for name in ("method", "carry"):
        if flag_values[name].present and not flag_values.keep:
            raise UserError(f"--{name} has no effect without --keep")
    found = {}
    if flag_values.keep or flag_values.expedite:
        check({})  # no insertion is to blame for a model that is wrong without it
    for text in flag_values.keep:
        for method in flag_values.method:
            keep, carry = parse_keep(text, model), flag_values.carry
            overrides = {"token_reducer": {"keep": keep, "method": method, "carry": carry}}
            _check(check, overrides, f"--keep={text}")
            found[f"{method}{' carry' * carry} {text}"] = overrides
    for text in flag_values.expedite:
        overrides = {"expedite": parse_expedite(text)}
        _check(check, overrides, f"--expedite={text}")
        found[f"expedite {text}"] = overrides
    return found


def _check(check, overrides, flag):
    try:
        check(overrides)
    except UserError as error:
        raise UserError(f"{flag} does not fit the model: {error}") from error


def parse_keep(text: str, model: str) -> tuple[int, ...]:
    """Reads a value of --keep as the number of patches kept after each block.

    Args:
      text: "196,195,..." or "level3".
      model: name of the model; selects the levels.

    Raises:
      UserError: the text has another form.
    """
    levels = TOKEN_POOLING.get(model, TOKEN_POOLING["deit_s"])
    level = re.fullmatch(r"level(\d)", text)
    if level and int(level[1]) < len(levels):
        return levels[int(level[1])].keep
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise UserError(
            f"--keep={text} is not valid; valid: numbers separated by commas, one for every block, "
            f"or level0 to level{len(levels) - 1}"
        )
    return tuple(map(int, text.split(",")))


def parse_expedite(text: str) -> dict[str, Any]:
    """Reads a value of --expedite, such as "10,14,28x28,logits", as arguments of `Expedite`.

    Raises:
      UserError: the text has another form.
    """
    found = EXPEDITE.fullmatch(text)
    if not found:
        raise UserError(
            f"--expedite={text} is not valid; valid: ALPHA,BETA,ROWSxCOLUMNS, such as 10,14,28x28, "
            "then optionally ,logits and ,temperature=20"
        )
    alpha, beta, *clusters = map(int, found.groups()[:4])
    where = "logits" if found[5] else "blocks"
    settings = {"alpha": alpha, "beta": beta, "clusters": tuple(clusters), "where": where}
    return settings | ({"temperature": float(found[6])} if found[6] else {})


def describe(expedite: "Expedite") -> str:
    """Returns a setting as a value of --expedite, such as "10,14,28x28,logits"."""
    text = f"{expedite.alpha},{expedite.beta},{'x'.join(map(str, expedite.clusters))}"
    text += ",logits" * (expedite.where == "logits")
    if expedite.temperature != type(expedite).temperature:
        text += f",temperature={expedite.temperature:g}"
    return text

"""Random settings of models and heads, plausible and meaningless, and the right results.

A trial is right if the settings are refused with one line that names one of them, or if a model
comes out whose outputs have the shapes that they should have. It is wrong if it ends in another
exception or takes too long, or if a value without any meaning is accepted.
"""

import contextlib
import dataclasses
import functools
import math
import random
import signal
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.models import model_settings
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.reducers import METHODS, TokenReducer
from tokenvit_jax.models.resnet_stem import ResNetStem
from tokenvit_jax.tasks.segmentation.model import HEADS

SECONDS = 60  # a trial that takes longer hangs
BATCH, SIDE = 2, 64  # images
OWNERS = (*tv.list_models(), *HEADS)
PARTS = {"token_reducer": TokenReducer, "expedite": Expedite, "stem": ResNetStem}

# Small models are traced in seconds.
PLAIN = {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 16, "position_size": (64, 64)}
PYRAMID = {"dims": (8, 8, 16, 16), "num_heads": (2, 2, 2, 2), "depths": (1, 1, 1, 1)}
SMALL_HEADS = {
    "mask_transformer": {"head_dim": 8}, "upernet": {"channels": 8}, "semantic_fpn": {"channels": 8}
}  # fmt: skip
SMALL_PARTS = {
    "token_reducer": {"keep": (8, 4), "method": "powerbert"},
    "expedite": {"alpha": 1, "beta": 1, "clusters": (2, 2)},
    "stem": {"first": 8, "widths": (16, 16, 32), "depths": (1, 1, 1), "num_groups": 4},
}

NAN, INFINITE = math.nan, math.inf
# No setting can have one of these values.
ODD = [NAN, -INFINITE, (), [], {}, object(), 1j, b"1", "nonsense", "", " ", "x" * 5000, "a\nb",
       {"a": 1}, {1, 2}, jnp.float32, -1, -(10**30), 10**5000]  # fmt: skip
PARTS_OF_NO_KIND = [True, 3, (3,), {"nonsense": 1}, {1: 2}, {"": None}]
MEANINGLESS = {
    int: [*ODD, None, True, 1.5, INFINITE, "3", (3,), [3], 10**12, -7],
    float: [*ODD, None, True, INFINITE, "0.1", (0.1,), -0.5, -1e-30, 1e30],
    bool: [*ODD, None, 0, 1, "True", 0.5, (True,)],
    str: [*ODD, None, True, 3, ("token",)],
    tuple: [
        *(odd for odd in ODD if odd not in ((), [])), None, True, 3, 0.5, (3,) * 7, [[3]] * 9,
        *(form([value] * size) for size in (2, 4) for form in (tuple, list)
          for value in (NAN, INFINITE, None, -1, 1.5, "8", True, 10**12, {}))
    ],
    "part": [*ODD, *PARTS_OF_NO_KIND],
    "optional": [*(odd for odd in ODD if odd != {}), *PARTS_OF_NO_KIND],  # {}: its defaults
    "dtype": [*(odd for odd in ODD if odd is not jnp.float32), None, True, 3, int, dict, "int8",
              "float33", jnp.int32, "f4,f4"],
    "axis": [NAN, (), [], {}, object(), "", " ", True, 3, b"x"],
}  # fmt: skip
KINDS = {**dict.fromkeys(PARTS, "part"), "stem": "optional", "dtype": "dtype", "axis_name": "axis",
         "temperature": float, "batch_norm": int}  # fmt: skip
# Numbers for which 0 means something.
ZERO = {
    "num_classes", "drop_path", "dropout", "num_registers", "layer_scale", "projection", "adaptive",
    "centroid_old_weight", "penalty", "learning_rate_factor", "alpha", "iterations",
}  # fmt: skip
RATES = {"drop_path", "dropout", "adaptive", "centroid_old_weight"}
ZERO_IN_HEADS = ZERO - {"num_classes"} | {"depth"}

# Values that are valid, or that are valid with some values of the other settings.
PLAUSIBLE_HEADS = {int: [1, 2, 3], tuple: [(1, 1, 1, 1), [2, 4, 4, 8], (3, 1, 1, 1)]}
PLAUSIBLE = {
    "num_classes": [0, 1, 3, 1000], "drop_path": [0, 0.1, 0.99], "dropout": [0.5],
    "remat": [True], "dtype": [jnp.bfloat16, "bfloat16", "float32", jnp.dtype("float16")],
    "axis_name": [None], "dim": [8, 12, 18, 7], "depth": [1, 2, 3], "mlp_ratio": [1, 2, 3],
    "patch_size": [8, 14, 32, 33, 65], "position_size": [(32, 32), [64, 48], (224, 224), (8, 8)],
    "position_resize": ["bicubic_antialias", "bicubic", "bilinear"], "front_position": [False],
    "num_registers": [0, 1, 4], "pre_norm": [True], "patch_bias": [False],
    "layer_scale": [0, 1e-5, 1], "activation": ["gelu", "quick_gelu"], "projection": [0, 5],
    "pool": ["token", "mean"], "distilled": [True, False], "qk_norm": ["none", "fixed", "learned"],
    "norm_epsilon": [1e-12, 1e-5], "init_std": [0.1, 1.0],
    "dims": [(8, 8, 8, 8), [8, 16, 24, 32], (6, 6, 6, 7)],
    "depths": [(1, 0, 0, 0), (0, 0, 0, 0), (0, 1, 2, 0)],
    "mlp_ratios": [(1, 1, 1, 1), [2, 2, 2, 2]],
    "ratios": [((4,), (4,), (1,), (1,)), [[16, 4], [4, 1], [1], [1]], ((4, 8),) * 4, ((),) * 4,
               ((64,),) * 4, ((8, 2), (2,), (1,), (1,))],
    "aggregation": ["clusters", "grid"], "assign": ["nearest", "parent"], "adaptive": [0, 0.5],
    "stem_dim": [4], "first": [8, 12],
    "widths": [(32,), [8, 16], (8, 8, 8, 8)], "num_groups": [1, 5, 48],
    "top_k": [1, 10**4], "head_dim": [4, 5, 8],
    "post_norm_cosine": [True, False], "centroid_rule": ["literal", "swapped", "constant"],
    "centroid_old_weight": [0, 0.9, 1], "block": ["swin", "cswin", "cmt"],
    "pale_sizes": [(1, 1, 1, 1), [2, 3, 4, 5]],
    "mode": ["parallel", "sequential", "cross", "vanilla", "soft", "hard", "window", "bilinear"],
    "mask_padding": [True], "position": ["none", "ape", "cpe"], "token_head": [True],
    "window_size": [1, 3, 16], "released_mask": [False, True],
    "pretrained_window_sizes": [(8, 8, 8, 4), [1, 1, 1, 1]],
    "method": list(METHODS),
    "initial": ["score", "random"], "carry": [True, False], "diagonal": [True, False],
    "keep": [(8, 4), [4, 8], (0, 0), (1, 99), (3,), (3, 3, 3)],
    "clusters": [(1, 1), [2, 3], (4, 4), (9, 9)],
    "blocks": [(1,), [2], (1, 2), (3,), (1, 1)], "penalty": [0, 0.1],
    "learning_rate_factor": [0, 1, 10], "alpha": [0, 1, 2], "beta": [1, 2, 3],
    "where": ["blocks", "logits"],
    "window": [1, 3, 4], "iterations": [0, 1, 9], "temperature": ["auto", 0.5, 50, 1e-6],
    "batch_norm": ["global", "local", 1, 4], "neighbors": [1, 20, 999], "normalize": ["sum", "l2"],
    "channels": [1, 12, 256], "neck_channels": [1, 7], "auxiliary_channels": [1, 256],
}  # fmt: skip


class Trial(NamedTuple):
    """Settings of a model or a head.

    Attributes:
      owner: name of a model, or of a head.
      settings: all settings by name.
      drawn: names of the settings that differ from those of the small model.
      meaningless: whether a value has no meaning.
    """

    owner: str
    settings: dict[str, Any]
    drawn: list[str]
    meaningless: bool


def draw_trial(rng: random.Random) -> Trial:
    """Draws one to three settings of a random model or head."""
    owner = rng.choice(OWNERS)
    settings = small_settings(owner)
    drawn = rng.sample(sorted(fields_of(owner)), rng.randint(1, 3))
    wrong = [_draw(rng, owner, name, settings) for name in drawn]
    return Trial(owner, settings, drawn, any(wrong))


def _draw(rng, owner, name, settings):
    """Sets a setting; returns whether the value is meaningless."""
    wrong = rng.random() < (0.2 if name in PARTS else 0.4)
    if name in PARTS and not wrong:
        settings[name] = part = dict(SMALL_PARTS[name])
        inner = rng.sample(sorted(fields_of(name)), rng.randint(0, 3))
        wrongs = [_draw(rng, name, one, part) for one in inner]
        return any(wrongs)
    if wrong:
        values = meaningless_values(owner, name)
    else:
        values = PLAUSIBLE_HEADS[fields_of(owner)[name]] if name == "num_heads" else PLAUSIBLE[name]
    settings[name] = rng.choice(values)
    return wrong


def small_settings(owner: str) -> dict[str, Any]:
    """Returns the settings of a small model or head."""
    if owner in HEADS:
        return {"num_classes": 3, **SMALL_HEADS.get(owner, {})}
    settings = model_settings(owner)
    stem = {"stem": SMALL_PARTS["stem"]} if getattr(settings, "stem", None) else {}
    return {"num_classes": 3} | (PLAIN | stem if hasattr(settings, "dim") else PYRAMID)


@functools.cache
def fields_of(owner: str) -> Mapping[str, Any]:
    """Returns the settings of a model, head or part, and their kinds."""
    cls = PARTS.get(owner) or HEADS.get(owner) or type(model_settings(owner))
    return {
        field.name: KINDS.get(field.name, typing.get_origin(field.type) or field.type)
        for field in dataclasses.fields(cls)
        if field.name not in ("parent", "name")
    }


def meaningless_values(owner: str, name: str) -> list[Any]:
    """Returns values that a setting cannot have."""
    kind = fields_of(owner)[name]
    values = list(MEANINGLESS[kind])
    if kind in (int, float) and name not in (ZERO_IN_HEADS if owner in HEADS else ZERO):
        values += [0, 0.0]
    if kind is float and name not in RATES:
        values += [1e-300]  # 0 in 32 bits
    return values


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises TimeoutError after `SECONDS`."""

    def stop(number, frame):
        raise TimeoutError(f"{SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_trial(trial: Trial, trace: bool = True) -> tuple[str, str]:
    """Returns "refused" or "accepted", and a fault; "": there is none.

    Args:
      trial: the settings.
      trace: whether to compute the shapes of the parameters and outputs of an accepted model.
    """
    outcome = "refused"
    try:
        with time_limit():
            model = make(trial)
            outcome = "accepted"
            if trial.meaningless:
                return outcome, "a meaningless value is accepted"
            hash(model)
            return outcome, shapes_fault(trial, model) if trace else ""
    except UserError as error:
        return outcome, message_fault(str(error), trial.drawn)
    except Exception as error:  # any other one is a fault
        return outcome, f"{type(error).__name__}: {error}"


def make(trial: Trial) -> Any:
    """Returns the model or head of a trial."""
    if trial.owner in HEADS:
        return HEADS[trial.owner](**trial.settings)
    return tv.create_model(trial.owner, **trial.settings)


def message_fault(message: str, drawn: list[str]) -> str:
    """Returns what is wrong with a message; "": nothing."""
    if len(message.splitlines()) != 1 or len(message) > 600:
        return f"the message is not one line: {message}"
    return "" if any(name in message for name in drawn) else f"no setting is named: {message}"


def shapes_fault(trial: Trial, model: Any) -> str:
    """Returns what is wrong with the outputs of a model; "": nothing."""
    x, size = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.float32), ()
    if trial.owner in HEADS:
        sizes = [(8, 8), (4, 4), (2, 2), (1, 1)] if model.reads == "maps" else [(9,)]
        maps = [jax.ShapeDtypeStruct((BATCH, *size, 16), jnp.float32) for size in sizes]
        x, size = maps if model.reads == "maps" else maps[0], sizes[0]
    rngs = {name: jax.random.key(0) for name in ("params", "dropout", "routing")}

    def run(x):
        variables = model.init(rngs, x, train=False)
        del rngs["params"]
        found, _ = model.apply(variables, x, train=True, rngs=rngs, mutable=True)
        return found, model.apply(variables, x, train=False)

    for found in jax.eval_shape(run, x):
        classes = trial.settings["num_classes"] or found.shape[-1]  # 0: the pooled features
        if found.shape != (BATCH, *size, classes) or found.dtype != jnp.float32:
            return f"the output is {found}"
    return ""

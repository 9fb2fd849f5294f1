"""Prints the parameters and multiply-adds (MACs) of models at any input size.

    python -m tokenvit_jax.summary --model=dgt_t,dgt_s --image_size=224 --format=table
    python -m tokenvit_jax.summary --model=deit_s --keep=level3 --method=powerbert,kmedoids

MACs are counted from shapes for the forward pass of one image: linear layers, convolutions and
attention. The count of an operator of this package follows from its mathematics (attention in
groups: 2kLC + 2LGC, Eq. 6 of DGT), not from its implementation. The column "as published" leaves
out the parts that the model's paper does not count. --keep adds a plain host with a token reducer,
--expedite a host whose tokens are clustered.
"""

import functools
import json

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.expediting import insertions

FLAGS = flags.FlagValues()
flags.DEFINE_list("model", None, "names, separated by commas; default: all", flag_values=FLAGS)
flags.DEFINE_string("image_size", "224", "224 or HEIGHTxWIDTH [pixels]", flag_values=FLAGS)
flags.DEFINE_enum("format", "table", ["table", "json"], "output format", flag_values=FLAGS)
insertions.define_flags(FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Prints the summary of each model."""
    from tokenvit_jax.measure import macs
    from tokenvit_jax.models import create_model, list_models

    names = flag_values.model or list_models()
    image_size = macs.parse_image_size(flag_values.image_size)
    variants = {
        name: insertions.from_flags(
            flag_values, name, macs.fits(functools.partial(create_model, name), image_size)
        )
        for name in names
    }
    summaries = macs.summarize_models(names, image_size, variants)
    if flag_values.format == "json":
        print(json.dumps([summary._asdict() for summary in summaries], indent=2))
    else:
        print(macs.format_summaries(summaries, image_size))


if __name__ == "__main__":
    cli.run(main, FLAGS)

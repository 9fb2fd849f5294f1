"""Writes a network from a Python package as a run, and the photographs as files.

python -m experiments.real_networks.make_run --network=vit_s14_dinov2 --out=RUN --photographs=PHOTOS
python -m tokenvit_jax.expedite --workdir=RUN --budget=0.66 --images=PHOTOS/coffee.png,...
"""

import dataclasses
from pathlib import Path

from absl import flags

from experiments.real_networks import networks, photographs
from tokenvit_jax import cli
from tokenvit_jax.models.settings import BackboneSettings
from tokenvit_jax.models.vit import SIZES
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.new_run import write_run

FLAGS = flags.FlagValues()
flags.DEFINE_enum("network", None, ["vit_s14_dinov2", "clip_vit_b16"], "network", flag_values=FLAGS)
flags.DEFINE_string("out", None, "new folder of the run", flag_values=FLAGS)
flags.DEFINE_string("photographs", None, "folder for the photographs", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Writes the run and the photographs."""
    model, variables = getattr(networks, flag_values.network)()
    config = default_config("classification")
    config.model = {"vit_s14_dinov2": "vit_s", "clip_vit_b16": "vit_b"}[flag_values.network]
    config.model_overrides = {
        field.name: getattr(model.settings, field.name)
        for field in dataclasses.fields(model.settings)
        if getattr(model.settings, field.name) != getattr(SIZES[config.model], field.name)
        and field.name not in {field.name for field in dataclasses.fields(BackboneSettings)}
    }
    config.dataset, config.image_size = "none", networks.IMAGE_SIZE
    config.data.normalization = networks.NORMALIZATION[flag_values.network]
    write_run(Path(flag_values.out), config, variables)
    folder = Path(flag_values.photographs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in photographs.read_photographs().items():
        image.save(folder / f"{name}.png")


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("network", "out", "photographs"))

"""Builds timm models as peers; torch and timm are imported by the functions that need them."""

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.measure.torch_peers import TorchWork, import_package


def timm_work(name: str, image_size: tuple[int, int], mode: str) -> TorchWork:
    """Builds a timm model with 1000 classes and random weights; its loss is the cross-entropy.

    Args:
      name: name of the timm architecture.
      image_size: height and width [pixels].
      mode: "forward" | "train".

    Raises:
      UserError: torch or timm is not installed, timm has no model of this name, or the model does
        not take images of this size.
    """
    del mode  # the same model in both
    torch, _ = import_package("timm")

    def targets(batch_size, generator):
        return torch.randint(1000, (batch_size,), generator=generator)

    def loss(compute, images, labels):
        return torch.nn.functional.cross_entropy(compute(images), labels)

    return TorchWork(_create(name, image_size), targets, loss)


def _create(name, image_size):
    """Creates a timm model and applies it to an image of this size."""
    torch, timm = import_package("timm")
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise UserError(f"--against: timm {timm.__version__} has no model {name!r}{hint}")
    # Only models that are built for one image size have the argument img_size.
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    size = {"img_size": image_size} if fixed else {}
    try:
        model = timm.create_model(name, num_classes=1000, **size).eval()
        with torch.inference_mode():
            model(torch.zeros(1, 3, *image_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        height, width = image_size
        raise UserError(f"timm's {name} does not take {height}x{width} images: {error}") from error
    return model

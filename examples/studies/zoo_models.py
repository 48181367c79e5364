"""Which models the zoo study takes, and the smallest inputs that each of them takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxbasis.copying import copy_model
from fxbasis.errors import FxBasisError
from fxbasis.models import load_model
from fxbasis.nests import tensors_of
from fxbasis.running import run

SIDES = (64, 96, 128, 160)
SMALL = ("test", "atto", "femto", "pico", "nano", "xxs", "xs", "tiny", "mini", "small", "_s", "b0", "_t")
CANDIDATES = 6
"""How many models of a timm file are counted to find its smallest."""

MORE = """
botnet26t_256 caformer_s18 coatnet_nano_rw_224 convformer_s18 convnext_atto_ols convnextv2_atto cspdarknet53
cspresnet50 dm_nfnet_f0 ecaresnet26t eca_halonext26ts eca_nfnet_l0 efficientnet_b0 efficientnet_es
efficientnetv2_rw_t efficientvit_l1 fastvit_mci0 fastvit_sa12 fbnetc_100 gernet_s ghostnetv2_100
lambda_resnet26t maxvit_nano_rw_256 maxvit_tiny_tf_224 mixnet_s mobilenetv2_050 mobilenetv4_conv_small
mobilenetv4_hybrid_medium mobileone_s0 mobilevitv2_050 regnetz_b16 repvgg_a0 resnest26d resnet10t resnet26d
resnet50_gn resnet51q resnetblur50 resnetv2_50x1_bit sebotnet33ts_256 semnasnet_075 seresnext26t_32x4d
skresnext50_32x4d spnasnet_100 tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mixnet_s
tf_mobilenetv3_small_minimal_100 tinynet_e vit_tiny_r_s16_p8_224 xception41
"""
"""timm models beside those: other blocks, attention, paddings and weight standardisation."""

ONNX_SAMPLE = """
torchvision:densenet121 torchvision:efficientnet_b0 torchvision:fasterrcnn_mobilenet_v3_large_320_fpn
torchvision:googlenet torchvision:lraspp_mobilenet_v3_large torchvision:mnasnet0_5 torchvision:mobilenet_v2
torchvision:mobilenet_v3_small torchvision:regnet_x_400mf torchvision:resnet18 torchvision:resnext50_32x4d
torchvision:shufflenet_v2_x0_5 torchvision:squeezenet1_1 torchvision:swin_t torchvision:vgg11_bn
timm:convnextv2_atto timm:cspresnet50 timm:fastvit_t8 timm:ghostnet_050 timm:hrnet_w18_small
timm:mobilenetv4_conv_small timm:repvgg_a0 timm:resnetblur50 timm:tf_efficientnet_lite0
timm:vit_tiny_r_s16_p8_224
"""
"""The models that ``--onnx-sample`` exports: each family once, a detector and a segmenter among them."""


def model_names() -> list[str]:
    """Torchvision's models (not quantized), the smallest timm model of each file and class, and ``MORE``.

    The fewest parameters come first, so that torchvision and timm are both covered early.
    """
    from torchvision.models import get_model_weights, list_models

    names = [name for name in list_models() if "quantized" not in name]
    known = {name: next(iter(get_model_weights(name))).meta["num_params"] for name in names}
    counts = {f"torchvision:{name}": count for name, count in known.items()}
    counts |= {f"timm:{name}": _built(f"timm:{name}")[1] for name in MORE.split()}
    counts |= dict(_smallest_timm())
    return sorted(counts, key=lambda name: counts[name])


def _smallest_timm() -> Iterator[tuple[str, int]]:
    """Of each module file, and of each class in it, the smallest; those with a Conv2d are preferred."""
    import timm

    for file in timm.list_modules():
        models = timm.list_models(module=file)
        ranked = sorted(models, key=lambda name: (not any(mark in name for mark in SMALL), len(name), name))
        built = {name: _built(f"timm:{name}") for name in ranked[:CANDIDATES]}
        for kind in {kind for kind, _, _ in built.values()}:
            same = [name for name in built if built[name][0] == kind]
            smallest = min(same, key=lambda name: (not built[name][2], built[name][1], name))
            yield f"timm:{smallest}", built[smallest][1]


def _built(name: str) -> tuple[str, int, bool]:
    """Class, parameters, and whether there is a Conv2d: from a build that makes no weights."""
    with torch.device("meta"):
        model = load_model(name)
    convs = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return type(model).__name__, sum(p.numel() for p in model.parameters()), convs


def is_detector(model: nn.Module) -> bool:
    """Whether this is one of torchvision's detectors, which take a list of images."""
    return hasattr(model, "transform") and hasattr(model, "backbone")


def enlivened(model: nn.Module) -> nn.Module:
    """The model with noise on every parameter that is constant: a zero gain would hide what is behind it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if is_detector(model) and not model.transform.fixed_size:
        model.transform.min_size, model.transform.max_size = (128,), 192
    return model


def examples(name: str, model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The smallest inputs that the model takes, in train() too if it can; others in batch and in size.

    Raises:
        FxBasisError: when it takes none, with the message for the largest.
    """
    fallback: Any = None
    failure: FxBasisError | None = None
    for example, others in _choices(name, model):
        copied = copy_model(model, share_parameters=True)
        try:
            if not finite(run(copied, example)):
                continue
            fallback = fallback or (example, others)
            run(copied, example, training=True)
            return example, others
        except FxBasisError as error:
            failure = error
    if fallback is None:
        raise failure or FxBasisError("its outputs are not finite at any size")
    return fallback


def _choices(name: str, model: nn.Module) -> Iterator[tuple[Any, dict[str, Any]]]:
    kind = name.partition(":")[2]
    if is_detector(model):
        images = ([torch.rand(3, 128, 160), torch.rand(3, 128, 128)],)
        others = {"batch": ([torch.rand(3, 128, 144)],), "size": ([torch.rand(3, 160, 128)] * 2,)}
        yield images, others
    elif kind.startswith("raft"):
        pairs = [tuple(torch.rand(n, 3, 128, w) for _ in "ab") for n, w in ((2, 128), (1, 128), (2, 160))]
        yield pairs[0], {"batch": pairs[1], "size": pairs[2]}
    else:
        for channels, height, width in _shapes(name, model):
            others = {"batch": torch.randn(3, channels, height, width)}
            others["size"] = torch.randn(2, channels, height + 32, width + 32)
            yield torch.randn(2, channels, height, width), others


def _shapes(name: str, model: nn.Module) -> list[tuple[int, int, int]]:
    if not name.startswith("timm:"):
        side = 299 if "inception" in name else 224
        return [(3, size, size) for size in (*SIDES, side)]
    made_for = tuple(model.default_cfg["input_size"])
    if model.default_cfg.get("fixed_input_size"):
        return [made_for]
    smaller = [(made_for[0], size, size) for size in SIDES if size < min(made_for[1:])]
    return [*smaller, made_for]


def sides(example: Any) -> str:
    """The shapes of the inputs, for the table.

    >>> sides(torch.zeros(2, 3, 64, 64))
    '2x3x64x64'
    """
    return " ".join("x".join(map(str, tensor.shape)) for tensor in tensors_of(example))


def finite(output: Any) -> bool:
    """Whether every tensor of an output is finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors_of(output))


def sampled(pattern: str, sample: bool, name: str) -> bool:
    """Whether this model is to be exported to ONNX too."""
    return bool(re.search(pattern, name)) or (sample and name in ONNX_SAMPLE.split())

"""Weights of other implementations under the names of this one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# By timm's class of block: its children and ours. timm numbers the BNs by their place in the block.
_DEPTHWISE_SEPARABLE = {
    "conv_dw": "depthwise.conv",
    "bn1": "depthwise.bn",
    "conv_pw": "project.conv",
    "bn2": "project.bn",
}
_INVERTED_RESIDUAL = {
    "conv_pw": "expand.conv",
    "bn1": "expand.bn",
    "conv_dw": "depthwise.conv",
    "bn2": "depthwise.bn",
    "conv_pwl": "project.conv",
    "bn3": "project.bn",
}
_SQUEEZE_EXCITE = {
    "se.conv_reduce": "squeeze_excite.reduce",
    "se.conv_expand": "squeeze_excite.expand",
}
_OUTER = {
    "conv_stem": "stem.conv",
    "bn1": "stem.bn",
    "conv_head": "head.conv",
    "bn2": "head.bn",
    "classifier": "classifier",
}


def from_timm_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of timm's ``efficientnet_b*`` under the names of ``EfficientNet``.

    Args:
        state_dict: keys as in timm's ``EfficientNet``; a ``tf_`` variant has the same keys, but
            pads and normalises (eps 1e-3) differently.

    Returns:
        The same tensors.

    Raises:
        ValueError: a key is none of that model's.
    """
    blocks = sorted({tuple(map(int, k.split(".")[1:3])) for k in state_dict if _in_block(k)})
    place = {block: index for index, block in enumerate(blocks)}
    renamed = {}
    for key, tensor in state_dict.items():
        prefix, name, names = "", key, _OUTER
        if _in_block(key):
            _, stage, index, name = key.split(".", 3)
            prefix = f"blocks.{place[int(stage), int(index)]}."
            expands = f"blocks.{stage}.{index}.conv_pwl.weight" in state_dict
            names = (_INVERTED_RESIDUAL if expands else _DEPTHWISE_SEPARABLE) | _SQUEEZE_EXCITE
        module, _, parameter = name.rpartition(".")
        if module not in names:
            raise ValueError(
                f"state_dict: got key {key!r}, which timm's EfficientNet does not have"
            )
        renamed[f"{prefix}{names[module]}.{parameter}"] = tensor
    return renamed


def _in_block(key: str) -> bool:
    parts = key.split(".")
    return len(parts) > 4 and parts[0] == "blocks" and parts[1].isdigit() and parts[2].isdigit()

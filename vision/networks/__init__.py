"""The networks: a registry of frozen records, and one file per family.

Every network is two parts, `features` and `head`, and `forward` is head(features(x)). `features` ends
at the layer that Grad-CAM weighs, so the head alone says whether its map has a closed form.
"""

from vision.networks.registry import MODELS, ModelRecipe, build_model

__all__ = ["MODELS", "ModelRecipe", "build_model"]

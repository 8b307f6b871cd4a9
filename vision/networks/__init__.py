"""The networks: a registry of frozen records, and one file per family.

Every network is two parts, `features` and `head`, and `forward` is head(features(x)). `features` ends
at the target layer of Grad-CAM, so the head alone determines whether the map has a closed form.
"""

from vision.networks.registry import MODELS, ModelRecipe, build_model

__all__ = ["MODELS", "ModelRecipe", "build_model"]

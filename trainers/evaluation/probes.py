"""The shape of what probing a model gives beyond its answers: robustness curves and explanation quality.

Both are measured on a bounded sample, because they cost many forward and backward passes. Intervals
are 95 %, by bootstrap over groups within class. Undefined is null.
"""

from pydantic import BaseModel, ConfigDict, Field

Interval = tuple[float, float]


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class AttackPoint(_Shape):
    """What is left of a model when every image may be changed by up to epsilon."""

    epsilon: float = Field(ge=0, description="largest change of a colour value, in 1/255 of the pixel range")
    accuracy: float = Field(description="at the class shares of the whole split, not of the sample")
    accuracy_ci: Interval
    balanced_accuracy: float
    balanced_accuracy_ci: Interval
    key_class_sensitivity: float | None = Field(
        default=None, description="share of the key class's images that are answered with it"
    )
    key_class_sensitivity_ci: Interval | None = None
    key_class_referred: float | None = Field(
        default=None, description="share of the key class's images at or above its refer threshold"
    )
    key_class_referred_ci: Interval | None = None


class RobustnessReport(_Shape):
    """Accuracy under attack with full knowledge of the network, in fp32."""

    images: int = Field(ge=1, description="images attacked")
    groups: int = Field(ge=1, description="independent units among them")
    key_class: str | None = None
    pgd_steps: int = Field(ge=1)
    attacks: dict[str, list[AttackPoint]] = Field(description="fgsm and pgd, each by ascending epsilon from 0")


class ReplacementCurve(_Shape):
    """Deletion or insertion: the class's probability while pixels are replaced, most important first."""

    auc: float = Field(description="mean area under the curve; low is good for deletion, high for insertion")
    random_auc: float = Field(description="the same with the cells of each map shuffled")
    gain: float = Field(description="how much better than shuffled: above 0 means that the map knows something")
    gain_ci: Interval
    curve: list[float] = Field(description="mean probability at equal steps of the replaced share, 0 to 1")
    random_curve: list[float]


class MaskEnergy(_Shape):
    """How much of the maps' energy lies on the lesion."""

    images: int = Field(ge=1, description="images with a mask and a map")
    energy: float = Field(description="mean share of a map's energy inside the lesion mask")
    energy_ci: Interval
    area: float = Field(description="mean share of the image that the mask covers: what an even map would reach")
    above_area: float = Field(description="share of the images whose map is more on the lesion than an even one")


class ExplanationQuality(_Shape):
    """How far the heat maps can be believed."""

    method: str
    images: int = Field(ge=1, description="images whose map was tested")
    constant_maps: int = Field(ge=0, description="further images whose map is flat, which explains nothing")
    deletion: ReplacementCurve
    insertion: ReplacementCurve
    randomisation_similarity: float | None = Field(
        default=None, description="mean absolute rank correlation with the maps of a random network; low is good"
    )
    mask_energy: MaskEnergy | None = None

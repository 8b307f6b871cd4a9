"""What a policy document is: a name, a list of operations and perhaps a mixing, checked as a whole and hashable.

As YAML:

    name: mine
    operations:
      - {operation: horizontal_flip, probability: 0.5}
      - {operation: rotate, probability: 0.3, parameters: {limit_deg: 20}}
    mixing: {kind: mixup, alpha: 0.2, probability: 0.5}
    phases:
      - {from_epoch: 5, operations: [{operation: rotate, probability: 0.3, parameters: {limit_deg: 40}}]}
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core.core_schema import ValidationInfo

from records.errors import ConfigError
from records.ids import hash_of
from records.settings import first_problem
from trainers.augmentation.mixing import Mixing
from trainers.augmentation.operations import OPERATIONS
from trainers.augmentation.parameters import Parameters


class Operation(BaseModel):
    """One step of a policy."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    operation: str = Field(description="see `relook catalog augmentations`")
    probability: float = Field(default=0.5, gt=0, le=1, description="share of the images that it changes")
    parameters: dict[str, Any] = Field(default_factory=dict, description="what is left out has the operation's default")

    @field_validator("operation")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in OPERATIONS:
            raise ValueError(f"there is no operation {value!r}; there are {', '.join(OPERATIONS)}")
        return value

    @field_validator("parameters")
    @classmethod
    def _fit_the_operation(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "operation" not in info.data:
            return value
        model = OPERATIONS[info.data["operation"]].parameters
        try:
            return model.model_validate(value).model_dump(mode="json")
        except ValidationError as error:
            raise ValueError(_parameter_sentence(error, info.data["operation"], model)) from error

    def checked_parameters(self) -> Parameters:
        """Return the parameters as the operation's own model."""
        return OPERATIONS[self.operation].parameters.model_validate(self.parameters)


class Phase(BaseModel):
    """Operations that take the place of those before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    from_epoch: int = Field(ge=2, description="the first epoch with them; 1 is the first of a run")
    operations: tuple[Operation, ...] = ()


class Policy(BaseModel):
    """Operations, applied in order, each to its share of the images; then whole batches may be mixed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    operations: tuple[Operation, ...] = ()
    mixing: Mixing | None = None
    phases: tuple[Phase, ...] = Field(default=(), description="in order of their epochs; `operations` hold until then")

    @field_validator("phases")
    @classmethod
    def _ascend(cls, value: tuple[Phase, ...]) -> tuple[Phase, ...]:
        starts = [phase.from_epoch for phase in value]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases begin with the epochs {starts}; every phase begins after the one before")
        return value

    def operations_at(self, epoch: int) -> tuple[Operation, ...]:
        """Return the operations of an epoch; 1 is the first."""
        begun = [phase for phase in self.phases if phase.from_epoch <= epoch]
        return begun[-1].operations if begun else self.operations

    @property
    def changes_nothing(self) -> bool:
        """Whether images are shown as they are, in every epoch."""
        later = any(phase.operations for phase in self.phases)
        return not (self.operations or later or self.mixing)

    def shortened(self, factor: float) -> "Policy":
        """Return the policy for a training shortened by a factor; of phases that would coincide the last one stays."""
        phases = {scaled_start(phase.from_epoch, factor): phase.operations for phase in self.phases}
        kept = tuple(Phase(from_epoch=start, operations=operations) for start, operations in phases.items())
        return self.model_copy(update={"phases": kept})

    def content_hash(self) -> str:
        """Return the hash of what the policy does, defaults written out and the name left out; 64 hex characters."""
        # Parts that are not used are left out, so that hashes of policies without them do not change when such a part
        # is added to the format.
        left_out = {"name"} | {part for part in ("mixing", "phases") if not getattr(self, part)}
        return hash_of(self.model_dump(mode="json", exclude=left_out))


def scaled_start(from_epoch: int, factor: float) -> int:
    """Return the epoch at which something begins in a training that is longer or shorter by a factor.

    >>> scaled_start(3, 2.0), scaled_start(5, 0.5), scaled_start(2, 0.1)
    (5, 3, 2)
    """
    return 1 + max(1, round((from_epoch - 1) * factor))


def parse_policy(document: Any, source: str) -> Policy:
    """Check a policy document.

    Raises ConfigError: a field is unknown or out of range; the message names field, value and a valid one.
    """
    try:
        return Policy.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"augmentation policy {source}: {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    """Name the first field that cannot work, its value, and what would be right."""
    first = error.errors(include_url=False)[0]
    loc = first["loc"]
    field, reason = first_problem(error)
    field = field or "the document"
    model = _model_at(loc)
    name = str(loc[-1]) if loc else ""
    if first["type"] == "extra_forbidden":
        return f"{field} is {first['input']!r}: there is no such field; there are {', '.join(model.model_fields)}"
    given = "" if first["type"] in {"value_error", "missing"} else f" is {first['input']!r}"
    known = model.model_fields.get(name)
    valid = f"; a valid value is {known.default}" if given and known and isinstance(known.default, float) else ""
    return f"{field}{given}: {reason}{valid}"


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    if loc[:1] == ("phases",) and len(loc) > 2:
        return Phase if loc[2] != "operations" or len(loc) < 5 else Operation
    if loc[:1] == ("operations",) and len(loc) > 2:
        return Operation
    return Mixing if loc[:1] == ("mixing",) else Policy


def _parameter_sentence(error: ValidationError, operation: str, model: type[Parameters]) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        takes = f"it takes {', '.join(model.model_fields)}" if model.model_fields else "it takes none"
        return f"{operation} has no parameter {name!r}; {takes}"
    reason = first_problem(error)[1].replace("Input should", "it should")
    default = model.model_fields[name].default
    valid = list(default) if isinstance(default, tuple) else default
    return f"{operation}.{name} cannot be {first['input']!r}: {reason}; a valid value is {valid}"

"""What every description in Gearshift has in common."""

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A frozen description. Unknown keys are refused, and every field says what it means."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

"""The base of every configuration section: frozen, plain values, unknown keys refused."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings. The docstring under a field is its documentation and says its unit."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

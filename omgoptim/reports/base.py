"""Base class of all reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from typing_extensions import Self

from omgoptim.text import clean, clean_block, clean_exact


class Record(BaseModel):
    """Base class of all reports: immutable, without extra fields, its docstrings are the schema's descriptions.

    Every text in it is clean (`omgoptim.text`), wherever it comes from: one bounded line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    exact: ClassVar[tuple[str, ...]] = ()
    """Fields whose visible text is kept unchanged: commands and paths. Objects of arguments always are."""
    multiline: ClassVar[tuple[str, ...]] = ()
    """Fields whose text may have several lines: logs and code."""

    @field_validator("*", mode="after")
    @classmethod
    def _clean_text(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        if isinstance(value, (str, list, tuple, dict)):
            return _clean(value, clean_block if name in cls.multiline else clean_exact if name in cls.exact else clean)
        return value

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with changes, which are validated and cleaned."""
        if not update:
            return super().model_copy(deep=deep)
        return type(self).model_validate({name: getattr(self, name) for name in type(self).model_fields} | dict(update))


def _clean(value: Any, form: Any) -> Any:
    """Return a field's value with its texts in the given form; nested records are clean already."""
    if isinstance(value, str):
        return form(value)
    if isinstance(value, dict):  # objects of arguments, of files, of an error's parts
        inner = clean_exact if form is clean else form
        return {clean_exact(str(key)): _clean(item, inner) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clean(item, form) for item in value)
    return value

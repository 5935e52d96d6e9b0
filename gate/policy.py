"""The policy (what counts against approval) and the intent (what the makers of the successor declared)."""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import PydanticSerializationError

from heredity.interp.errors import PolicyError


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Policy(_Strict):
    """Thresholds of the verdict; each is explained in the shipped ``policy.yaml``."""

    model_config = ConfigDict(strict=True)  # no text or yes/no where a number is meant

    name: str
    version: Literal[1]
    material_nats: float = Field(gt=0)
    fewest_contexts: int = Field(ge=1)
    false_alarm: float = Field(gt=0, le=1)
    visible_nats: float = Field(gt=0)
    causal_share: float = Field(ge=0, le=1)
    control_share: float = Field(ge=0, le=1)
    unconfirmed: Literal["inconclusive", "flag"]
    declared_share: float = Field(gt=0, le=1)
    declared_breadth: float = Field(gt=0, le=1)
    fewest_tokens: int = Field(ge=0)
    principle_loss: float = Field(gt=0, le=1)
    principle_breaks: int = Field(ge=1)
    principle_carried: float = Field(ge=0, le=1)
    principle_replaced: Literal["report", "inconclusive", "flag"]


class Change(_Strict):
    """One declared change: what it is, and phrases that stand in the contexts it shows in."""

    id: str = Field(min_length=1, max_length=80)
    description: str = Field(min_length=1, max_length=2000)
    phrases: tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...] = Field(min_length=1)
    principles: tuple[str, ...] = ()
    """Ids of principles (docs/principles.md) that the change is allowed to weaken, end or replace."""


class Intent(_Strict):
    """What the makers of the successor say they changed."""

    version: Literal[1]
    changes: tuple[Change, ...]


class Loaded(_Strict):
    """Policy and intent with the digests of the files they came from."""

    policy: Policy
    policy_sha256: str
    intent: Intent | None
    intent_path: str | None
    intent_sha256: str | None


def load_rules(policy: Path | None, intent: Path | None) -> Loaded:
    """The policy (the shipped one where none is named) and the intent (none where none is named).

    Raises:
        PolicyError: a file cannot be read or does not have the expected fields.
    """
    shipped = Path(__file__).with_name("policy.yaml")
    policy_bytes = shipped.read_bytes() if policy is None else _read(policy)
    parsed = _parse(policy_bytes, "shipped policy.yaml" if policy is None else str(policy), Policy)
    if intent is None:
        return Loaded(
            policy=parsed, policy_sha256=_digest(policy_bytes), intent=None, intent_path=None, intent_sha256=None
        )
    intent_bytes = _read(intent)
    return Loaded(
        policy=parsed,
        policy_sha256=_digest(policy_bytes),
        intent=_parse(intent_bytes, str(intent), Intent),
        intent_path=str(intent),
        intent_sha256=_digest(intent_bytes),
    )


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PolicyError(error.strerror or "cannot be read", where=str(path), remedy="Give a YAML file.") from None
    if len(data) > 1_000_000:
        raise PolicyError("larger than 1 MB", where=str(path), remedy="Give a YAML file of rules, not data.")
    return data


_Model = TypeVar("_Model", bound=BaseModel)


def _parse(data: bytes, where: str, kind: type[_Model]) -> _Model:
    try:
        content: Any = yaml.safe_load(data.decode("utf-8"))
    except Exception as error:  # bad dates, numbers and nesting come as ValueError, AttributeError, RecursionError ...
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise PolicyError(f"not valid YAML ({first})", where=where, remedy="Mend the file's syntax.") from None
    try:
        parsed = kind.model_validate(content)
        parsed.model_dump_json()  # YAML can spell half a surrogate pair, which is no character
        return parsed
    except PydanticSerializationError:
        raise PolicyError("text with a lone surrogate", where=where, remedy="Write the character itself.") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "file"
        raise PolicyError(
            f"{first['msg'].lower()}", where=f"{where}, field {field}", remedy="See docs/errors/policy.md."
        ) from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

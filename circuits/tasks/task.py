"""What a task file says (docs/circuits.md): templates with slots, or examples one by one, and the metric."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from heredity.interp.errors import HeredityError, TaskError, one_line

SHIPPED = ("ioi", "greater-than", "subject-verb", "pronoun", "induction", "docstring", "copy")
"""Names that :func:`load_task` knows."""

MetricName = Literal["logit_difference", "probability", "kl"]
Text = Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
Filler = str | dict[str, str | tuple[str, ...]]
SLOT = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)(?:\.([A-Za-z][A-Za-z0-9_]*))?\}")
_BYTES = 20_000_000
_FORMAT = "docs/circuits.md has the format."


class Strict(BaseModel):
    """Base of what files say: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Template(Strict):
    """A clean and a counterfactual prompt and answers on the clean one; ``{SLOT}`` or ``{SLOT.field}`` is filled."""

    clean: Text
    counterfactual: Text
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _one_answer_or_several(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: (v,) if k in ("right", "wrong") and isinstance(v, str) else v for k, v in value.items()}
        return value


class Task(Strict):
    """One task.

    Attributes:
        name: what it is called.
        about: one sentence.
        metric: what is measured at the last token: the difference of mean logits of right and wrong answers, that of
            their probabilities, or −KL from the clean prediction.
        accuracy: share of clean prompts on which the model must prefer the right answers, or the task is refused.
        chat: prompts are the user's turns, put into the model's chat template.
        reply: of a chat, how the model's turn begins.
        fillers: what slots are filled with: lists of strings, or of records of strings (or of lists, for answers).
        slots: from which list each slot is filled; slots of one list get different fillers.
        single: lists of which only those that are one token (after a space) are used.
        templates: with slots.
        examples: without.
        sha256: of the file.
        file: where it was read from.
    """

    version: Literal[1] = 1
    name: str = Field(min_length=1, max_length=80)
    about: str = ""
    source: str = ""
    metric: MetricName = "logit_difference"
    accuracy: float = Field(default=0.8, ge=0, le=1)
    chat: bool = False
    reply: str = Field(default="", max_length=2000)
    fillers: dict[str, tuple[Filler, ...]] = Field(default_factory=dict)
    slots: dict[str, str] = Field(default_factory=dict)
    single: tuple[str, ...] = ()
    templates: tuple[Template, ...] = ()
    examples: tuple[Template, ...] = ()
    sha256: str = ""
    file: str = ""

    @model_validator(mode="after")
    def _fits(self) -> "Task":
        if bool(self.templates) == bool(self.examples):
            raise ValueError("give either templates or examples")
        if self.reply and not self.chat:
            raise ValueError("a reply begins the model's turn of a chat: set chat to true")
        for name in (*self.slots.values(), *self.single):
            if name not in self.fillers:
                raise ValueError(f"no list of fillers is called {name!r}")
        for i, template in enumerate(self.templates, 1):
            for text in (template.clean, template.counterfactual, *template.right, *template.wrong):
                for slot, field in SLOT.findall(text):
                    self._check_slot(f"template {i}", slot, field)
        if self.metric != "kl":
            for kind, group in (("template", self.templates), ("example", self.examples)):
                for i, one in enumerate(group, 1):
                    if not one.right or (self.metric == "logit_difference" and not one.wrong):
                        raise ValueError(f"{kind} {i}: this metric needs right and wrong answers")
        return self

    def _check_slot(self, where: str, slot: str, field: str) -> None:
        if slot not in self.slots:
            raise ValueError(f"{where}: no slot is called {slot!r}")
        for filler in self.fillers[self.slots[slot]]:
            if isinstance(filler, str) == bool(field) or (isinstance(filler, dict) and field not in filler):
                raise ValueError(f"{where}: {{{slot}{'.' if field else ''}{field}}} does not fit the filler {filler!r}")


def load_task(task: str | Path) -> Task:
    """The shipped task of that name, or the one in a ``.yaml``, ``.yml`` or ``.jsonl`` file.

    A ``.jsonl`` file has an example a line, ``{"clean", "counterfactual", "right", "wrong"}``, measured by logit
    difference.

    Raises:
        TaskError: no such file or name, or it is malformed.
    """
    shipped = str(task) in SHIPPED
    path = Path(__file__).parent / "shipped" / f"{task}.yaml" if shipped else Path(task)
    where = str(task)
    if path.suffix not in (".yaml", ".yml", ".jsonl"):
        raise TaskError(
            "neither a shipped task nor a .yaml or .jsonl file", where=where, remedy=f"Shipped: {', '.join(SHIPPED)}."
        )
    data, text = read_file(path, where)
    content = _lines(text, path, where) if path.suffix == ".jsonl" else parse_yaml(text, where)
    if not isinstance(content, dict):
        raise TaskError(f"a {type(content).__name__}, not a mapping", where=where, remedy=_FORMAT)
    return validated(Task, content | {"sha256": hashlib.sha256(data).hexdigest(), "file": where}, where)


def read_file(path: Path, where: str, error: type[HeredityError] = TaskError) -> tuple[bytes, str]:
    """The bytes of a file and the text they spell.

    Raises:
        HeredityError: (an ``error``) it cannot be read, is too large or is no UTF-8.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as fault:
        raise error(fault.strerror or "cannot be read", where=where, remedy="Check the path.") from None
    except UnicodeDecodeError as fault:
        raise error(f"invalid UTF-8 at byte {fault.start}", where=where, remedy="Save it as UTF-8.") from None
    if len(data) > _BYTES:
        raise error(f"larger than {_BYTES // 10**6} MB", where=where, remedy="Give fewer examples.")
    return data, text


def parse_yaml(text: str, where: str, error: type[HeredityError] = TaskError) -> Any:
    """What ``text`` says.

    Raises:
        HeredityError: (an ``error``) it is no YAML.
    """
    try:
        return yaml.safe_load(text)
    except Exception as fault:  # bad dates, numbers and nesting come as ValueError, AttributeError, RecursionError ...
        first = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise error(f"not valid YAML ({first})", where=where, remedy="Mend the file's syntax.") from None


_Kind = TypeVar("_Kind", bound=BaseModel)


def validated(
    kind: type[_Kind],
    content: Any,
    where: str,
    error: type[HeredityError] = TaskError,
    remedy: str = _FORMAT,
    names: Mapping[str, str] | None = None,
) -> _Kind:
    """``content`` as a ``kind``.

    Args:
        names: what fields are called in the file, where they have other names there.

    Raises:
        HeredityError: (an ``error``) a field is missing, unknown or wrong.
    """
    try:
        found = kind.model_validate(content)
        found.model_dump_json().encode()  # YAML and JSON can spell half a surrogate pair, which is no character
        return found
    except ValidationError as fault:
        first = fault.errors()[0]
        field = ".".join((names or {}).get(str(part), str(part)) for part in first["loc"]) or "file"
        raise error(one_line(first["msg"], 200), where=f"{where}, {one_line(field, 80)}", remedy=remedy) from None
    except ValueError:
        raise error("text with a lone surrogate", where=where, remedy="Write the character itself.") from None


def _lines(text: str, path: Path, where: str) -> dict[str, Any]:
    examples = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            examples.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise TaskError(
                f"not a JSON value ({type(error).__name__})", where=f"{where}:{number}", remedy=_FORMAT
            ) from None
    return {"name": path.stem[:80] or "task", "examples": examples}

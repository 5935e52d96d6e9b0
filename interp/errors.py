"""What a user's mistake or a faulty input raises: one line that says what, where and what to do.

Every class has a page under ``docs/errors/`` and ends the command line with exit code 2.
"""


class HeredityError(Exception):
    """A problem with what the user gave.

    Args:
        what: the fault, in words (no trailing period).
        where: the file, field or index it was found in.
        remedy: what the user can do about it.
    """

    page = "input"

    def __init__(self, what: str, *, where: str, remedy: str) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what, where, remedy)

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.what}. {self.remedy} [docs/errors/{self.page}.md]")


class ModelError(HeredityError):
    """A model directory or file that cannot or must not be loaded."""

    page = "model"


class AdapterError(HeredityError):
    """A PEFT adapter that is malformed or does not fit its base."""

    page = "adapter"


class TokenizerError(HeredityError):
    """A tokenizer that is absent, unreadable, or does not fit the embedding."""

    page = "tokenizer"


class WrapperError(HeredityError):
    """The hooked model disagrees with the bare one by more than the tolerance."""

    page = "wrapper"


class CorpusError(HeredityError):
    """Text that cannot be read or holds nothing to measure."""

    page = "corpus"


class TaskError(HeredityError):
    """A task file that is malformed, does not fit the tokenizer, or asks for what the model does not do."""

    page = "task"


class PrinciplesError(HeredityError):
    """A file of principles that is malformed."""

    page = "principles"


class SiteError(HeredityError):
    """A site name that this model does not have."""

    page = "site"


class StoreError(HeredityError):
    """An activation store that is damaged or belongs to another capture."""

    page = "store"


class DictionaryError(HeredityError):
    """A sparse dictionary that cannot be read, is ambiguous, or does not fit the model."""

    page = "dictionary"


class GraphError(HeredityError):
    """A file of a circuit or an attribution graph that cannot be read."""

    page = "graph"


class TrainingError(HeredityError):
    """Settings with which a dictionary cannot be trained, or a training that belongs to other settings."""

    page = "training"


class PolicyError(HeredityError):
    """A policy or intent file that is malformed."""

    page = "policy"


class OutputError(HeredityError):
    """An output directory that cannot be used."""

    page = "output"


def one_line(text: str, limit: int = 600) -> str:
    """``text`` with control characters (ANSI escapes, newlines) shown as escapes, cut to ``limit`` characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"

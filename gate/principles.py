"""Principles and tasks in an audit: the parent's mechanism, the same prompts in the successor, what changed."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from heredity.circuits.intervals import Interval as Raw
from heredity.circuits.layout import layout_of
from heredity.circuits.matching import match_nodes
from heredity.circuits.mechanism import Readings, locate, measure, ranked, readings, same_prompts
from heredity.circuits.mechanism_change import Change, NodeChange, Resampled, compare, wilson
from heredity.circuits.null import NullSuccessors
from heredity.circuits.tasks.prepare import half_of
from heredity.circuits.tasks.screen import values
from heredity.circuits.tasks.task import Task, Template
from heredity.interp.errors import ModelError, OutputError, TaskError
from heredity.interp.model import Model

from .budget import Budget
from .policy import Intent, Policy
from .principle_files import Asked
from .principle_records import BrokenPrompt, MechanismNode, PrincipleRecord, TaskRecord
from .values import Estimate, Interval, NotMeasured, tidy
from .work import write_atomically

if TYPE_CHECKING:
    from .assemble import Setting
    from .records import Null

PAIRS = {True: 32, False: 24}
"""Pairs in each half, for small models and for others."""
MEASURED = {"quick": 8, "standard": 16, "thorough": 32}
"""Nodes measured one by one; of small models all are."""
SEARCHED = 12
"""Pairs on which nodes of larger models are ranked and carriers chosen, and on which single nodes are measured."""
NULLS = {True: 9, False: 3}
"""Null successors that read the prompts, of those that the audit has."""
LIBRARIES = ("heredity", "torch", "transformers", "transformer-lens", "numpy")
CODE = 1
"""Raised whenever a change of the code changes what is found in a parent."""
LISTED_NODES = 12
LISTED_PROMPTS = 3

Counterpart = Callable[[str], str | None]
"""The successor's node for a node of the parent."""

_Kept = TypeVar("_Kept", PrincipleRecord, TaskRecord)


def parent_mechanism(parent: Model, task: Task, sizes: Budget, seed: int) -> dict[str, Any]:
    """The parent's mechanism of ``task``, as JSON can hold it: the same whatever the successor.

    Raises:
        TaskError: the prompts do not fit the parent.
        ModelError: its parts cannot be exchanged one by one.
    """
    if sizes.small:
        return locate(parent, task, pairs=PAIRS[True], measured=sizes.measured, seed=seed)
    return locate(parent, task, pairs=PAIRS[False], measured=MEASURED[sizes.name], searched=SEARCHED, seed=seed)


def mechanism_key(parent: Model, task: Task, sizes: Budget, seed: int) -> str:
    """What :func:`parent_mechanism` depends on, as a name for its result."""
    machine = [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), *map(version, LIBRARIES)]
    parts = [CODE, machine, parent.digest, task.sha256, sizes.name, sizes.small, seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def correspondence(s: "Setting", texts: Sequence[str]) -> Counterpart | None:
    """How heads and MLPs of the two models correspond: by identity, or where they differ in shape by what they do on
    ``texts``; None where too little of it can be aligned."""
    if s.same_parameters:
        return lambda name: name

    def compute() -> dict[str, Any]:
        try:
            return {match.parent: match.successor for match in match_nodes(s.parent, s.successor, texts).matches}
        except ValueError as error:
            return {"error": str(error)}

    found = s.work.step("counterparts", compute)
    return None if "error" in found else found.get


def examine(
    s: "Setting", asked: Asked, null: "Null", texts: Sequence[str]
) -> tuple[tuple[PrincipleRecord, ...], tuple[TaskRecord, ...]]:
    """Records of all principles and tasks.

    Args:
        s: the setting of the audit.
        asked: what to look at.
        null: whose scale and draws the null successors here have.
        texts: ordinary text, by which parts of models of different shapes are matched.

    Raises:
        TaskError: prompts of a principle do not fit the parent.
    """
    if not asked.all:
        return (), ()
    located: list[dict[str, Any]] = []
    total = len(asked.all)
    for number, task in enumerate(asked.all):
        s.progress("locating mechanisms", number, total)
        key = mechanism_key(s.parent, task, s.sizes, s.seed)

        # Prompts of a principle that do not fit are a mistake to mend; tasks decide nothing, and one need not cost all.
        faults = (ModelError,) if number < len(asked.principles) else (ModelError, TaskError)

        def compute(task: Task = task, faults: Any = faults) -> dict[str, Any]:
            return _or_error(lambda: parent_mechanism(s.parent, task, s.sizes, s.seed), *faults)

        found = s.work.step(f"mechanism-{key}", lambda key=key, compute=compute: _kept(s, key, compute))
        located.append(found | {"key": key})
    s.progress("locating mechanisms", total, total)
    nulls = _nulls(s, asked.all, located, null)
    counterpart = correspondence(s, texts)
    looked = [
        _look(s, task, found, own, counterpart) for task, found, own in zip(asked.all, located, nulls, strict=True)
    ]
    cut = len(asked.principles)
    policy, intent = s.rules.policy, s.rules.intent
    return (
        tuple(_principle(look, policy, intent) for look in looked[:cut]),
        tuple(_task(look, policy) for look in looked[cut:]),
    )


@dataclass(frozen=True)
class _Look:
    """One task with what was compared, or why it was not."""

    task: Task
    parent: Readings | None
    successor: Readings | None
    change: Change | None
    reason: str
    texts: tuple[str, ...] = ()
    carriers: tuple[str, ...] = ()
    matched: bool = False


def _look(
    s: "Setting", task: Task, found: Mapping[str, Any], nulls: Sequence[np.ndarray], counterpart: Counterpart | None
) -> _Look:
    if "error" in found:
        return _Look(task, None, None, None, found["error"])
    s.progress(f"comparing {len(found['testing'])} prompts", 0, 1)
    parent = readings(found["readings"])
    names = [counterpart(name) for name in parent.effects] if counterpart else []
    carriers = [counterpart(name) for name in found["carriers"]] if counterpart else []

    def compute() -> dict[str, Any]:
        half = same_prompts(s.successor, task, found["testing"])
        nodes = [name for name in names if name]
        if counterpart and len(layout_of(s.successor).sources) > len(parent.effects) + 1:
            more = ranked(s.successor, same_prompts(s.successor, task, found["discovery"]), len(parent.effects))
            nodes += [name for name in more if name not in nodes]
        few = None if s.sizes.small else SEARCHED
        return measure(s.successor, half, nodes, [name for name in carriers if name], few).plain()

    # A new name where nodes correspond otherwise.
    pairing = hashlib.sha256(json.dumps([names, carriers]).encode()).hexdigest()[:8]
    plain = s.work.step(f"successor-{found['key']}-{pairing}", lambda: _or_error(compute, TaskError, ModelError))
    s.progress(f"comparing {len(found['testing'])} prompts", 1, 1)
    if "error" in plain:
        return _Look(task, parent, None, None, plain["error"])
    successor = readings(plain)
    change = compare(parent, successor, nulls, counterpart or (lambda _: None), found["carriers"], s.seed)
    return _Look(
        task,
        parent,
        successor,
        change,
        "",
        tuple(example["clean"] for example in found["testing"]),
        tuple(found["carriers"]),
        counterpart is not None,
    )


def _nulls(
    s: "Setting", tasks: Sequence[Task], located: Sequence[Mapping[str, Any]], null: "Null"
) -> list[list[np.ndarray]]:
    """Per task, the metric of every null successor on the parent's prompts, [2, N] each."""
    out: list[list[np.ndarray]] = [[] for _ in tasks]
    if not null.scale or null.kind == "benign":
        return out
    noise = null.kind == "noise"
    makers: list[NullSuccessors] = []
    key = hashlib.sha256("".join(found["key"] for found in located).encode()).hexdigest()[:16]
    draws = min(null.draws, NULLS[s.sizes.small])
    for draw in range(draws):
        s.progress("null successors on the prompts", draw, draws)

        def compute(draw: int = draw) -> list[Any]:
            if not makers:
                makers.append(NullSuccessors(s.parent, s.another_parent() if noise else s.successor, noise=noise))
            with makers[0].draw(s.seed * 1000 + draw, null.scale) as model:
                return [_values(model, s.parent, task, found) for task, found in zip(tasks, located, strict=True)]

        for own, value in zip(out, s.work.step(f"null-prompts-{key}-{draw:03d}", compute), strict=True):
            if value is not None:
                own.append(np.array(value))
    s.progress("null successors on the prompts", draws, draws)
    return out


def _kept(s: "Setting", key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found in the parent, kept for other candidates where the audit keeps its parent's work."""
    folder = s.remembered.folder
    if folder is None:
        return compute()
    path = folder / f"mechanism-{key}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and ("error" in found or found.keys() >= {"testing", "readings", "carriers"}):
            return found
    except (OSError, ValueError):
        pass
    found = compute()
    with suppress(OutputError):  # a folder that cannot be written costs time on the next run, nothing else
        write_atomically(path, json.dumps(found))
    return found


def _values(model: Model, parent: Model, task: Task, found: Mapping[str, Any]) -> Any:
    if "error" in found:
        return None
    half = half_of(parent, task, [Template.model_validate(example) for example in found["testing"]])
    return [value.tolist() for value in values(model, half)]


def _or_error(compute: Callable[[], dict[str, Any]], *errors: type[TaskError | ModelError]) -> dict[str, Any]:
    try:
        return compute()
    except errors as error:
        return {"error": f"{error.where}: {error.what}"}


def _principle(look: _Look, policy: Policy, intent: Intent | None) -> PrincipleRecord:
    missing = look.reason or _not_the_parents(look)
    status: Any = "unmeasured"
    if not missing and look.change:
        fate = _fate(look, policy)
        status = {"kept": "present", "moved": "replaced"}.get(fate, fate)
    declared = None
    for change in intent.changes if intent else ():
        if look.task.name in change.principles:
            declared = declared or change.id
    against = status in ("gone", "weakened") or (status == "replaced" and policy.principle_replaced == "flag")
    return _record(
        PrincipleRecord, look, missing, status=status, declared_by=declared, counts=against and declared is None
    )


def _task(look: _Look, policy: Policy) -> TaskRecord:
    status: Any = "unmeasured"
    if look.change and look.parent is not None:
        fate = _fate(look, policy)
        status = {"kept": "inherited", "gone": "lost"}.get(fate, fate)
        if _not_the_parents(look):
            status = "new" if _does(look.successor, look.task) else "absent"
    return _record(TaskRecord, look, look.reason or _not_the_parents(look), status=status)


def _fate(look: _Look, policy: Policy) -> str:
    """``gone``, ``weakened``, ``moved`` or ``kept``, under the policy's shares."""
    change = look.change
    assert change is not None
    if change.fate == "gone":
        return "gone"
    lost = change.fate == "weakened" and change.lost.low >= policy.principle_loss
    if lost or len(change.broken) >= policy.principle_breaks:
        return "weakened"
    return "moved" if look.matched and change.carried.high < policy.principle_carried else "kept"


def _not_the_parents(look: _Look) -> str:
    """Why the parent cannot be said to do it; empty where it does."""
    if look.parent is None or _does(look.parent, look.task):
        return ""
    kept = float((look.parent.clean > 0).mean())
    return (
        f"the parent itself gives the right answer on {kept:.0%} of {len(look.parent.clean)} prompts "
        f"({look.task.accuracy:.0%} are asked for), with an effect of {float(look.parent.effect.mean()):.3g}"
    )


def _does(of: Readings | None, task: Task) -> bool:
    """Whether a model does the task: often enough, and by more than nothing."""
    if of is None:
        return False
    draws = np.random.default_rng(0).integers(len(of.clean), size=(1000, len(of.clean)))
    return float((of.clean > 0).mean()) >= task.accuracy and Resampled(draws).mean(of.effect).low > 0


def _record(kind: type[_Kept], look: _Look, reason: str, **own: Any) -> _Kept:
    absent = NotMeasured(reason=look.reason or "not compared")
    unmatched = NotMeasured(reason="the parts of the two models do not correspond one to one")
    change, n = look.change, 0 if look.parent is None else len(look.parent.clean)

    def told(value: Raw | None, matched: bool = True) -> Estimate:
        if value is None:
            return absent
        return _interval(value, n) if matched else unmatched

    def of(name: str, matched: bool = True) -> Estimate:
        return told(getattr(change, name), matched) if change else absent

    effect, kept = of("effect_parent"), of("kept_parent")
    if change is None and look.parent is not None:
        draws = np.random.default_rng(0).integers(n, size=(1000, n))
        effect = told(Resampled(draws).mean(look.parent.effect))
        kept = told(wilson(int((look.parent.clean > 0).sum()), n))
    broken = sorted(change.broken if change else (), key=lambda i: look.successor.clean[i] - look.parent.clean[i])  # type: ignore[union-attr]
    return kind(
        id=look.task.name,
        description=look.task.about,
        source=look.task.file,
        metric=look.task.metric,  # type: ignore[arg-type]
        pairs=n,
        reason=reason,
        effect_parent=effect,
        effect_successor=of("effect_successor"),
        difference=of("difference"),
        lost=of("lost"),
        tolerance=tidy(change.tolerance) if change else None,
        kept_parent=kept,
        kept_successor=of("kept_successor"),
        broken=len(broken),
        broken_prompts=tuple(_broken(look, i) for i in broken[:LISTED_PROMPTS]),
        carriers=look.carriers,
        necessity_parent=of("necessity_parent"),
        necessity_successor=of("necessity_successor", look.matched),
        carried=of("carried", look.matched),
        least=change.least if change and look.matched else None,
        inherited=of("inherited", look.matched),
        nodes=tuple(_node(node, look, n) for node in change.nodes[:LISTED_NODES]) if change and look.matched else (),
        **own,
    )


def _broken(look: _Look, row: int) -> BrokenPrompt:
    assert look.parent is not None and look.successor is not None
    return BrokenPrompt(
        text=look.texts[row], parent=tidy(look.parent.clean[row]), successor=tidy(look.successor.clean[row])
    )


def _node(node: NodeChange, look: _Look, n: int) -> MechanismNode:
    nowhere = NotMeasured(reason="no counterpart there")
    return MechanismNode(
        parent=node.parent_node,
        successor=node.successor_node,
        carrier=node.parent_node in look.carriers,
        share_parent=_interval(node.parent, n) if node.parent else nowhere,
        share_successor=_interval(node.successor, n) if node.successor else nowhere,
        change=_plain(node.change, n),
        inherited=None if node.inherited is None else tidy(node.inherited),
        moved=node.moved,
    )


def _interval(value: Raw, n: int) -> Estimate:
    if not np.isfinite([value.estimate, value.low, value.high]).all():
        return NotMeasured(reason="a share of an effect that cannot be told from none")
    return _plain(value, n)


def _plain(value: Raw, n: int) -> Interval:
    return Interval(estimate=tidy(value.estimate), low=tidy(value.low), high=tidy(value.high), n=n)

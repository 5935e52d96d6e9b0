"""``heredity train-dictionary``: what is asked for as a recipe and a source, and what came of it in words."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from heredity.interp.errors import DictionaryError, HeredityError, TrainingError

from .progress import Bars

if TYPE_CHECKING:
    from heredity.interp.dictionaries.training import Recipe, Row, Running, Stores, Trained
    from heredity.interp.dictionaries.training.loop import Probe
    from heredity.interp.model import Encoded, Model

Kind = Literal["sae", "transcoder", "crosscoder", "difference"]
Setting = Literal["topk", "batchtopk", "jumprelu"]
HELD_OUT = 32
"""Texts on which the loss recovered is measured; not trained on."""


def command(say: Any, errors: Any) -> Any:
    """The command; ``say`` prints a line of results, ``errors`` is the console of progress."""

    def train_dictionary(
        kind: Annotated[Kind, typer.Argument(help="difference: an SAE of the second source minus the first.")],
        sources: Annotated[
            list[str],
            typer.Argument(help="Directories made by `heredity capture`; or, with --corpus, models. One per model."),
        ],
        site: Annotated[
            list[str],
            typer.Option(
                help="Where, e.g. resid_post@12. A transcoder: twice, read and written. Several models: once for all, "
                "or once for each."
            ),
        ],
        out: Annotated[Path, typer.Option("--out", help="Directory to write into; an interrupted run resumes there.")],
        latents: Annotated[int, typer.Option(help="Latents in the dictionary.", min=1)],
        k: Annotated[int, typer.Option(help="Active latents per token.", min=1)] = 32,
        activation: Annotated[Setting, typer.Option(help="Which latents are active.")] = "batchtopk",
        corpus: Annotated[
            list[Path] | None,
            typer.Option(help="Text to run models on while training. The last texts are held out, for the loss."),
        ] = None,
        field: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files that holds the text.")] = "text",
        tokens: Annotated[
            int | None, typer.Option(help="Tokens to train on. Default: as many as there are.", min=1)
        ] = None,
        batch: Annotated[int, typer.Option(help="Tokens in a step.", min=1)] = 1024,
        rate: Annotated[float, typer.Option(help="Adam's rate.")] = 3e-3,
        skip: Annotated[bool, typer.Option("--skip", help="A transcoder with a linear path beside.")] = False,
        shared: Annotated[
            float, typer.Option(help="Share of a crosscoder's latents with one decoder row for all models (DSF).")
        ] = 0.0,
        dedicated: Annotated[
            float, typer.Option(help="Share of its latents dedicated to each single model (DFC).")
        ] = 0.0,
        massive: Annotated[
            float, typer.Option(help="Leave out tokens of a norm above so many medians; 0 leaves out none.", min=0)
        ] = 3.0,
        memory: Annotated[float, typer.Option(help="GB to stay within.", min=0)] = 4.0,
        seed: Annotated[int, typer.Option(help="Seeds every random choice.", min=0)] = 0,
    ) -> None:
        """Train a sparse dictionary on stored activations, or on models as they run."""
        given = {
            "kind": kind,
            "latents": latents,
            "k": k,
            "activation": activation,
            "tokens": tokens,
            "batch": batch,
            "rate": rate,
            "skip": skip,
            "shared": shared,
            "dedicated": dedicated,
            "massive": massive or None,
            "seed": seed,
        }
        recipe = _recipe(given)
        with Bars(errors) as bars:
            source, probe = _source(recipe, sources, site, corpus, field, bars)
            done = _train(recipe, source, probe, out, memory * 1e9, bars)
        say(_words(done, out))

    return train_dictionary


def _recipe(given: dict[str, Any]) -> "Recipe":
    from heredity.interp.dictionaries.training.recipe import Recipe

    try:
        return Recipe(**given)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = "--" + ".".join(map(str, first["loc"])).replace("_", "-")
        raise TrainingError(first["msg"], where=where, remedy="Choose another value.") from None


def _source(
    recipe: "Recipe", sources: list[str], sites: list[str], corpus: list[Path] | None, field: str, bars: Bars
) -> tuple["Stores | Running", "Probe | None"]:
    """What to train on, and how the loss recovered is measured where models are at hand."""
    from heredity.interp.dictionaries.record import Port

    models = 1 if recipe.kind in ("sae", "transcoder") else max(2, len(sources))
    if len(sources) != models:
        what = f"a {recipe.kind} needs {models} of them, not {len(sources)}"
        raise TrainingError(what, where="SOURCES", remedy="Give one store, or one model with --corpus, per model.")
    if recipe.kind == "transcoder":
        wanted = {2}
        numbers = [0, 0]
    else:
        wanted, numbers = {1, models}, list(range(models))
    if len(sites) not in wanted:
        what = f"a {recipe.kind} of {models} model(s) needs {' or '.join(map(str, sorted(wanted)))}, not {len(sites)}"
        raise TrainingError(what, where="--site", remedy="See heredity train-dictionary --help.")
    named = sites if len(sites) == len(numbers) else sites * len(numbers)
    ports = tuple(Port(name, model) for name, model in zip(named, numbers, strict=True))
    if corpus:
        return _running(recipe, sources, ports, corpus, field, bars)
    from heredity.interp.dictionaries.training.stores import Stores
    from heredity.interp.store import open_store

    for source in sources:
        if not (Path(source) / "manifest.json").is_file():
            raise TrainingError(
                "is no activation store",
                where=source,
                remedy="Name a directory made by `heredity capture`; to run a model, add --corpus.",
            )
    return Stores(tuple(open_store(source) for source in sources), ports), None


def _running(
    recipe: "Recipe", names: list[str], ports: Any, paths: list[Path], field: str, bars: Bars
) -> tuple["Running", "Probe | None"]:
    from heredity.interp.corpus import Corpus, read_corpus
    from heredity.interp.dictionaries.training.running import Running
    from heredity.interp.load import load

    whole = read_corpus(paths, field=field)
    loaded: dict[str, Model] = {}
    for i, name in enumerate(names):
        bars.update("loading models", i, len(names))
        if name not in loaded:
            loaded[name] = load(name)
    bars.update("loading models", len(names), len(names))
    models = tuple(loaded[name] for name in names)
    held = min(HELD_OUT, len(whole.texts) // 10)
    texts = [models[-1].encode(text.text) for text in whole.texts[len(whole.texts) - held :]]
    source = Running(models, ports, Corpus(whole.texts[: len(whole.texts) - held]))
    return source, _probe(recipe, models, texts)


def _probe(recipe: "Recipe", models: "tuple[Model, ...]", texts: "list[Encoded]") -> "Probe | None":
    """The loss of the last model; none for differences, which cannot be spliced, or where nothing could be held out."""
    from heredity.interp.dictionaries.recovered import loss_recovered

    if recipe.kind == "difference" or not any(len(text.ids) > 1 for text in texts):
        return None

    def probe(dictionary: Any) -> float | None:
        try:
            return loss_recovered(models, dictionary, texts, side=len(models) - 1).recovered
        except DictionaryError:
            return None  # two tokenizers: their tokens cannot be read side by side

    return probe


def _train(
    recipe: "Recipe", source: "Stores | Running", probe: "Probe | None", out: Path, budget: float, bars: Bars
) -> "Trained":
    from heredity.interp.dictionaries.training.loop import train
    from heredity.interp.dictionaries.training.memory import within
    from heredity.interp.dictionaries.training.plots import figure

    def progress(done: int, total: int, row: "Row") -> None:
        bars.update("training", done, total)
        bars.note(in_words(row))

    trained = train(recipe, within(recipe, source, budget), out=out, probe=probe, progress=progress)
    if trained.history:
        page = figure(trained.history, title=f"{recipe.kind} of {recipe.latents} latents")
        try:
            page.write_html(out / "history.html", include_plotlyjs=True)
        except OSError as fault:
            remedy = "Check space and permissions."
            raise HeredityError(f"cannot be written ({fault})", where=str(out), remedy=remedy) from None
    return trained


def in_words(row: "Row") -> str:
    """One line on a step."""
    explained = " / ".join("–" if each is None else f"{each:.1%}" for each in row.fve)
    recovered = "" if row.recovered is None else f", loss recovered {row.recovered:.1%}"
    return (
        f"{row.tokens} tokens: variance explained {explained}, {row.l0:.1f} active, {row.dead:.1%} dead{recovered}, "
        f"{row.seconds:.0f} s"
    )


def _words(trained: "Trained", out: Path) -> str:
    last = f"; {in_words(trained.history[-1])}" if trained.history else ""
    return f"{trained.dictionary!r} in {out}{last}"

"""Running a model over a corpus: batches of like length, and activations written to a store as they come."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .corpus import Corpus
from .errors import CorpusError, StoreError
from .model import Encoded, Model, pad
from .store import (
    COLUMNS,
    Manifest,
    Store,
    check_free,
    check_same,
    code_version,
    open_store,
    read_manifest,
    replacing,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from pyarrow import Table


def batches(encoded: Sequence[Encoded], max_tokens: int) -> list[list[int]]:
    """Indices into ``encoded`` grouped so that a batch padded to its longest text has at most ``max_tokens`` tokens.

    Shortest first, equal lengths in the order given. A text longer than ``max_tokens`` is a batch by itself; one
    without tokens is in no batch.
    """
    return by_length([len(text.ids) for text in encoded], max_tokens)


def capture(
    model: Model,
    corpus: Corpus,
    sites: Sequence[str],
    out: str | Path,
    *,
    batch_tokens: int = 2048,
    shard_tokens: int = 16_384,
    dtype: Literal["float32", "float16"] = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """The values at ``sites`` of every token of ``corpus``, as a store in the directory ``out``.

    Memory holds one batch of activations and one open shard per site. A capture that was cut off goes on after the
    shards it finished, and ends in the same bytes as one that was not.

    Args:
        model: the model to run.
        corpus: the texts; what lies beyond the model's context length is not captured.
        sites: site names.
        out: a new or empty directory, or one in which the same capture was begun.
        batch_tokens: padded tokens in one forward.
        shard_tokens: tokens after which a shard is closed (at the end of a batch).
        dtype: the stored element type.
        progress: called with tokens done and tokens in all, after each batch.

    Raises:
        SiteError: a site this model does not have.
        CorpusError: no text gives a token.
        StoreError: ``out`` holds something else, cannot be written, or values overflow float16.
    """
    out = Path(out)
    wanted: dict[str, Any] = {
        "code": code_version(),
        "weights": model.digest,
        "corpus": corpus.digest,
        "sites": {name: _shape(model, name) for name in sorted(set(sites))},
        "dtype": dtype,
        "batch_tokens": batch_tokens,
        "shard_tokens": shard_tokens,
    }
    if (out / "manifest.json").exists():
        store = Store(out, read_manifest(out))
        check_same(out, store.manifest, wanted)
    else:
        check_free(out)
        store = _begin(model, corpus, out, wanted)
    _fill(store, model, progress or (lambda done, total: None))
    return open_store(out)


def _begin(model: Model, corpus: Corpus, out: Path, wanted: dict[str, Any]) -> Store:
    """The store with its index and manifest, and no shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Texts are encoded twice rather than kept encoded: spans take more memory than the text itself.
    lengths = [len(model.encode(text.text).ids) for text in corpus.texts]
    plan = _plan(lengths, wanted["batch_tokens"], wanted["shard_tokens"])
    if not plan:
        raise CorpusError("no text gives a token", where=model.spec, remedy="Give text this tokenizer can read.")
    with (
        replacing(out / "index.parquet") as partial,
        pq.ParquetWriter(partial, pa.schema([(name, pa.int32()) for name in COLUMNS])) as writer,
    ):
        for shard, members in enumerate(plan):
            table = _index(model, corpus, shard, members)
            writer.write_table(table, row_group_size=table.num_rows)
    manifest = Manifest(n_tokens=sum(lengths), n_shards=len(plan), **wanted)
    write_manifest(out, manifest)
    return Store(out, manifest)


def _fill(store: Store, model: Model, progress: Callable[[int, int], None]) -> None:
    """Every shard that is not there yet."""
    done = 0
    for shard in range(store.n_shards):
        missing = [site for site in store.sites if not store.shard_path(site, shard).is_file()]
        table = store.index(shard)
        if missing:
            _write(store, model, shard, missing, table, lambda n, done=done: progress(done + n, store.n_tokens))
        done += table.num_rows


def _write(
    store: Store, model: Model, shard: int, sites: Sequence[str], table: "Table", progress: Callable[[int], None]
) -> None:
    """One shard of ``sites``, which is let go of before the next is opened."""
    opened = {
        site: torch.empty(table.num_rows, *store.manifest.sites[site], dtype=store.manifest.torch_dtype)
        for site in sites
    }
    row = 0
    for tokens, mask in _forwards(table, store.manifest.batch_tokens):
        n = int(mask.sum())
        for site, values in _values(model, tokens, mask, sites).items():
            opened[site][row : row + n] = _fitting(values, store, site)
        row += n
        progress(row)
    for site, values in opened.items():
        write_shard(store, site, shard, values)


def _forwards(table: "Table", batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded tokens and mask of each batch of a shard, in the order of its rows."""
    ids = table["token"].to_numpy().tolist()
    starts = [i for i, position in enumerate(table["position"].to_numpy().tolist()) if position == 0]
    texts = [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    # A shard begins where a batch began, so batching it alone gives the batches of the plan.
    for members in by_length([len(text) for text in texts], batch_tokens):
        yield pad([texts[i] for i in members])


@torch.inference_mode()
def _values(model: Model, tokens: Tensor, mask: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
    """Values of the real tokens at each site, [token, *site shape]."""
    device = next(model.bridge.original_model.parameters()).device
    captured = model.capture(tokens.to(device), sites)
    return {site: values.cpu()[mask] for site, values in captured.items()}


def _fitting(values: Tensor, store: Store, site: str) -> Tensor:
    stored = values.to(store.manifest.torch_dtype)
    if stored.dtype != values.dtype and bool((stored.isinf() & ~values.isinf()).any()):
        raise StoreError(
            f"values at {site} are too large for {store.manifest.dtype}",
            where=str(store.directory),
            remedy="Capture in float32, into a new directory.",
        )
    return stored


# --- which token goes where ---


def _shape(model: Model, name: str) -> list[int]:
    site = model.site(name)
    if site.kind == "mlp_post":
        return [len(model.neuron_weights(site.layer or 0)[0])]
    heads = {"attn_q": model.shape.n_heads, "attn_z": model.shape.n_heads}
    heads |= {"attn_k": model.shape.n_kv_heads, "attn_v": model.shape.n_kv_heads}
    return [heads[site.kind], model.shape.d_head] if site.kind in heads else [model.shape.d_model]


def by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """:func:`batches` for texts of these numbers of tokens."""
    groups: list[list[int]] = []
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _plan(lengths: Sequence[int], batch_tokens: int, shard_tokens: int) -> list[list[int]]:
    """The texts of each shard: whole batches, until there are ``shard_tokens`` tokens."""
    plan: list[list[int]] = []
    room = 0
    for batch in by_length(lengths, batch_tokens):
        if room <= 0:
            plan.append([])
            room = shard_tokens
        plan[-1] += batch
        room -= sum(lengths[i] for i in batch)
    return plan


def _index(model: Model, corpus: Corpus, shard: int, members: Sequence[int]) -> "Table":
    import pyarrow as pa

    columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for i in members:
        encoded = model.encode(corpus.texts[i].text)
        columns["text"] += [corpus.texts[i].id] * len(encoded.ids)
        columns["position"] += range(len(encoded.ids))
        columns["token"] += encoded.ids
        columns["start"] += [start for start, _ in encoded.spans]
        columns["end"] += [end for _, end in encoded.spans]
    columns["row"] += range(len(columns["text"]))
    columns["shard"] += [shard] * len(columns["text"])
    return pa.table({name: pa.array(values, pa.int32()) for name, values in columns.items()})

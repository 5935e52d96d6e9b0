"""Activations on disk: safetensors shards for each site, one Parquet index of tokens, a manifest that says what of.

::

    DIR/manifest.json            what was captured from what, by which code
    DIR/index.parquet            a row per token (text, position, token, start, end, shard, row); a row group per shard
    DIR/<site>/00000.safetensors "values" [tokens in the shard, *site shape], crc32 in its header

The same site in the same shard and row holds the same token. Texts never straddle shards. Files appear whole
(written beside and renamed), the manifest after the index and before the first shard.
"""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from .errors import StoreError
from .sites import parse_site

if TYPE_CHECKING:
    from pyarrow import Table

SCHEMA_VERSION = 1
# To be raised whenever captured values change for the same model and corpus.
CODE_VERSION = 1
COLUMNS = ("text", "position", "token", "start", "end", "shard", "row")
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_AGAIN = "Delete it and capture again."


def code_version() -> str:
    """The version of the code that captures: of this format's writer and of the package."""
    return f"{CODE_VERSION}/heredity-{version('heredity')}"


class Manifest(BaseModel):
    """What a store holds; two captures may share a directory only where all of it is equal."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: int = SCHEMA_VERSION
    code: str = Field(default_factory=code_version)
    weights: str
    """Content digest of the model."""
    corpus: str
    """Digest of the texts."""
    sites: dict[str, list[PositiveInt]]
    """Shape of one token's value at each site."""
    dtype: Literal["float32", "float16"] = "float32"
    batch_tokens: PositiveInt
    """Padded tokens in a forward; part of the identity because sums may round differently at another width."""
    shard_tokens: PositiveInt
    """Tokens after which a shard is closed."""
    n_tokens: NonNegativeInt
    n_shards: NonNegativeInt

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type of the shards."""
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class Store:
    """A directory of captured activations."""

    directory: Path
    manifest: Manifest

    @property
    def n_tokens(self) -> int:
        """Tokens in the store, the same for every site."""
        return self.manifest.n_tokens

    @property
    def n_shards(self) -> int:
        """Shards of each site."""
        return self.manifest.n_shards

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites captured."""
        return tuple(self.manifest.sites)

    def read(self, site: str, shard: int) -> Tensor:
        """Values of one shard, [tokens, *site shape] in the stored dtype.

        Raises:
            StoreError: the site is not in the store; the shard is absent or damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self.shard_path(site, shard)
        try:
            with safe_open(path, framework="pt") as handle:
                values, expected = handle.get_tensor("values"), (handle.metadata() or {}).get("crc32")
        except (OSError, SafetensorError) as fault:
            raise StoreError(f"damaged or absent shard ({fault})", where=str(path), remedy=_AGAIN) from fault
        if list(values.shape[1:]) != self.manifest.sites[site] or values.dtype != self.manifest.torch_dtype:
            raise StoreError("shard of another shape or dtype", where=str(path), remedy=_AGAIN)
        if _checksum(self, site, shard, values) != expected:
            raise StoreError("damaged shard (checksum differs)", where=str(path), remedy=_AGAIN)
        return values

    def index(self, shard: int | None = None) -> "Table":
        """The rows of one shard, or of all, as int32 columns :data:`COLUMNS` in stored order.

        Raises:
            StoreError: the index is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.directory / "index.parquet"
        try:
            with pq.ParquetFile(path) as handle:
                if handle.metadata.num_rows != self.n_tokens or handle.num_row_groups != self.n_shards:
                    raise StoreError("index does not fit the manifest", where=str(path), remedy=_AGAIN)
                if tuple(handle.schema_arrow.names) != COLUMNS:
                    raise StoreError("index has other columns", where=str(path), remedy=_AGAIN)
                return handle.read() if shard is None else handle.read_row_group(shard)
        except (OSError, pa.ArrowException) as fault:
            raise StoreError(f"damaged index ({fault})", where=str(path), remedy=_AGAIN) from fault

    def shard_path(self, site: str, shard: int) -> Path:
        """The file of one shard.

        Raises:
            StoreError: the site is not in the store.
        """
        if site not in self.manifest.sites:
            have = ", ".join(self.sites)
            raise StoreError(f"no site {site!r} in this store", where=str(self.directory), remedy=f"It has {have}.")
        return self.directory / site / f"{shard:05d}.safetensors"


def open_store(directory: str | Path) -> Store:
    """The finished store in ``directory``.

    Raises:
        StoreError: it holds no store, one of another schema, a damaged one, or an unfinished capture.
    """
    directory = Path(directory)
    store = Store(directory, read_manifest(directory))
    store.index(0) if store.n_shards else store.index()
    for site in store.sites:
        for shard in range(store.n_shards):
            path = store.shard_path(site, shard)
            if not path.is_file():
                raise StoreError(
                    "shard absent: the capture is unfinished", where=str(path), remedy="Run the same capture again."
                )
    return store


# --- writing ---


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreError: it is absent, malformed, or of another schema version.
    """
    path = directory / "manifest.json"
    try:
        data = path.read_bytes()
        found = json.loads(data).get("schema_version")
        if found != SCHEMA_VERSION:
            raise StoreError(
                f"schema_version is {found!r}, not {SCHEMA_VERSION}",
                where=str(path),
                remedy="Capture into a new directory.",
            )
        manifest = Manifest.model_validate_json(data)
    except OSError as fault:
        reason = fault.strerror or str(fault)
        raise StoreError(
            f"no readable manifest ({reason})", where=str(path), remedy="Name a store directory."
        ) from fault
    except ValidationError as fault:
        first = fault.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise StoreError(f"malformed {field} ({first['msg']})", where=str(path), remedy=_AGAIN) from fault
    except (ValueError, AttributeError, RecursionError) as fault:
        raise StoreError(f"manifest is not a JSON object ({fault})", where=str(path), remedy=_AGAIN) from fault
    for site in manifest.sites:
        if parse_site(site) is None:  # a site is also a folder name, and must not lead elsewhere
            raise StoreError(f"malformed site name {site!r}", where=str(path), remedy=_AGAIN)
    return manifest


def check_same(directory: Path, found: Manifest, wanted: dict[str, Any]) -> None:
    """Nothing, if the manifest in ``directory`` agrees with every field ``wanted``.

    Raises:
        StoreError: names the first field that differs.
    """
    for name, value in wanted.items():
        if getattr(found, name) != value:
            raise StoreError(
                f"holds another capture: {name} is {_short(getattr(found, name))}, not {_short(value)}",
                where=str(directory),
                remedy="Capture into a new directory.",
            )


def check_free(directory: Path) -> None:
    """Nothing, if a store without a manifest may be begun in ``directory``.

    Raises:
        StoreError: it is no directory or holds something else.
    """
    ours = {"index.parquet", "index.parquet.tmp", "manifest.json.tmp"}
    try:
        foreign = sorted(entry.name for entry in directory.iterdir() if entry.name not in ours)
    except FileNotFoundError:
        return
    except OSError as fault:
        raise _unwritable(directory, fault) from fault
    if foreign:
        raise StoreError(
            f"holds {foreign[0]!r} and no manifest, so it is not a store",
            where=str(directory),
            remedy="Capture into a new or empty directory.",
        )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """The manifest as JSON, whole or not at all."""
    with replacing(directory / "manifest.json") as partial:
        partial.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def write_shard(store: Store, site: str, shard: int, values: Tensor) -> None:
    """One shard, whole or not at all; the same values give the same bytes."""
    from safetensors.torch import save_file

    # One metadata key only: safetensors does not fix the order of several.
    with replacing(store.shard_path(site, shard)) as partial:
        save_file({"values": values}, partial, metadata={"crc32": _checksum(store, site, shard, values)})


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of ``path`` once the block ends well.

    Raises:
        StoreError: the file cannot be written.
    """
    from safetensors import SafetensorError

    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as fault:
        raise _unwritable(path, fault) from fault


def _checksum(store: Store, site: str, shard: int, values: Tensor) -> str:
    # Begun with what the shard is, so that a good shard of another place or capture is found out too.
    name = f"{store.manifest.weights} {store.manifest.corpus} {site} {shard}"
    return f"{zlib.crc32(values.numpy().data, zlib.crc32(name.encode())):08x}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _unwritable(path: Path, fault: Exception) -> StoreError:
    reason = getattr(fault, "strerror", None) or str(fault)
    return StoreError(f"cannot be written ({reason})", where=str(path), remedy="Check space and permissions.")

"""A stream's log in pieces: an endless stream writes them out and drops them; they are joined when they are read.

`LogBuilder.cut` makes a LogPiece; a PieceSink takes it; `join_pieces` gives the StreamLog back, field for field. A token may
be evicted long after its piece was written: a later piece then amends its expiry.

Live streams only: no stage of a run writes pieces. Programs that drive an engine by themselves do (docs/memory.md),
`benchmarks.endless` among them.

Invariants:
* pieces follow one another without gap;
* an amendment only lowers, and never to before the piece that brings it: the pieces read so far are exact for the tokens
  they hold, whatever comes later.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from streams.log.builder import LogPiece
from streams.log.record import ChunkRecord, LogHeader, StreamLog
from streams.positions.regions import RegionLog

FORMAT = 1
_REGIONS = "regions."


class PieceSink(Protocol):
    """Receives the pieces of one stream, in order, between two engine steps; other streams wait meanwhile."""

    def write(self, piece: LogPiece) -> None:
        """Write a piece. Raises OSError if it cannot; that ends this stream and no other."""


def join_pieces(pieces: Iterable[LogPiece], *, prefix: bool = False) -> StreamLog:
    """Return the log that these pieces make up.

    prefix: accept a stream that has not finished, and return it as far as it has come.
    Raises ValueError, with the stream and the piece, if one is missing, out of order, of another stream, or contradicts
    an earlier one.
    """
    read: list[LogPiece] = []
    length = 0
    for piece in pieces:
        _check_follows(piece, read[-1] if read else None, length)
        read.append(piece)
        length += len(piece)
    if not read:
        raise ValueError("no piece of a log was given")
    header = read[0].header
    assert header is not None
    if not (read[-1].last or prefix):
        raise ValueError(
            f"stream {header.stream_id} has not finished: piece {read[-1].number} is not its last; read what is there with "
            "prefix=True"
        )
    columns = {
        name: np.concatenate([piece.columns[name] for piece in read], axis=-1)
        for name in read[0].columns  # positions are [3, n]
    }
    for piece in read:
        _amend(columns["expiry"], piece)
    regions = [piece.regions for piece in read if piece.regions is not None]
    if len(regions) not in (0, len(read)):
        raise ValueError(f"stream {header.stream_id}: some of its pieces have regions, others do not")
    return StreamLog(
        header=header,
        chunks=tuple(chunk for piece in read for chunk in piece.chunks),
        regions=RegionLog.join(regions) if regions else None,
        **columns,
    )


def _check_follows(piece: LogPiece, before: LogPiece | None, length: int) -> None:
    here = f"stream {piece.stream_id}, piece {piece.number}"
    number = 0 if before is None else before.number + 1
    if piece.number != number:
        raise ValueError(f"{here}: piece {number} was expected; one is missing or out of order")
    if before is not None and before.last:
        raise ValueError(f"{here}: piece {before.number} was the stream's last")
    if before is not None and piece.stream_id != before.stream_id:
        raise ValueError(f"{here}: the pieces before it are of stream {before.stream_id}")
    if (piece.header is None) != (number > 0):
        raise ValueError(f"{here}: the first piece, and no other, carries the header")
    if piece.first != length:
        raise ValueError(f"{here} begins at token {piece.first}, but the pieces before it hold {length}")


def _amend(expiry: np.ndarray, piece: LogPiece) -> None:
    index, lowered = piece.amended, piece.amended_expiry
    here = f"stream {piece.stream_id}, piece {piece.number}"
    for wrong, why in (
        ((index < 0) | (index >= piece.first), "amends a token that is in no earlier piece"),
        (lowered < piece.first, "lets a token expire before the piece begins"),
    ):
        if wrong.any():
            raise ValueError(f"{here} {why}: token {index[wrong][0]} to expiry {lowered[wrong][0]}")
    raised = lowered > expiry[index]
    if raised.any():
        token = index[raised][0]
        raise ValueError(f"{here} raises the expiry of token {token} from {expiry[token]} to {lowered[raised][0]}")
    expiry[index] = lowered


class PieceFolder:
    """A PieceSink with one file per piece. A file is written under another name first: one that exists is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, piece: LogPiece) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _name(piece.number)
        if path.exists():
            raise FileExistsError(f"{path} exists: every stream needs a folder of its own")
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                file.write(_pack(piece))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read_pieces(folder: Path) -> Iterator[LogPiece]:
    """Yield the pieces in a PieceFolder. Raises ValueError that names a file which is missing or broken."""
    found = sorted(folder.glob(_name("*")))
    if not found:
        raise ValueError(f"{folder} holds no piece of a log")
    for number, path in enumerate(found):
        if path.name != _name(number):
            raise ValueError(f"{folder / _name(number)} is missing: the next piece there is {path.name}")
        try:
            yield _unpack(path.read_bytes())
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is no piece of a log, or broken: {error}") from error


def _name(number: int | str) -> str:
    return f"piece-{number:08d}.npz" if isinstance(number, int) else f"piece-{number}.npz"


def _pack(piece: LogPiece) -> bytes:
    words = {
        "format": FORMAT,
        "stream_id": piece.stream_id,
        "number": piece.number,
        "first": piece.first,
        "last": piece.last,
        "header": None if piece.header is None else asdict(piece.header),
        "chunks": [asdict(chunk) for chunk in piece.chunks],
    }
    arrays = {**piece.columns, "amended": piece.amended, "amended_expiry": piece.amended_expiry}
    if piece.regions is not None:
        arrays |= {_REGIONS + name: array for name, array in vars(piece.regions).items()}
    file = io.BytesIO()
    np.savez(file, words=np.frombuffer(json.dumps(words).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _unpack(data: bytes) -> LogPiece:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    words = json.loads(arrays.pop("words").tobytes())
    if words["format"] != FORMAT:
        raise ValueError(f"format {words['format']}, this version reads {FORMAT}")
    header = words["header"]
    regions = {name.removeprefix(_REGIONS): arrays.pop(name) for name in list(arrays) if name.startswith(_REGIONS)}
    return LogPiece(
        stream_id=words["stream_id"],
        number=words["number"],
        first=words["first"],
        last=words["last"],
        header=None if header is None else LogHeader(**_tuples(header)),
        chunks=tuple(ChunkRecord(**_tuples(chunk)) for chunk in words["chunks"]),
        amended=arrays.pop("amended"),
        amended_expiry=arrays.pop("amended_expiry"),
        regions=RegionLog(**regions) if regions else None,
        columns=arrays,
    )


def _tuples(words: dict[str, Any]) -> dict[str, Any]:
    """Convert the lists of JSON to the tuples of our records."""
    return {name: _tuple(value) for name, value in words.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value

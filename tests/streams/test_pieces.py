"""A log in pieces: joined it is the log that was never cut; what is missing, out of order or broken is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.log.builder import LogPiece
from streams.log.pieces import PieceFolder, join_pieces, read_pieces
from streams.log.record import ChunkRecord, StreamLog
from streams.memory import POLICIES, MemoryConfig, make_policy
from streams.positions.mrope import PositionCursor
from streams.writing.writer import StreamWriter, TurnInput
from tests.support.logs import assert_same_log, file_size_limit
from tests.support.policies import LAYOUTS, MEMORIES, generate, header, plans

RCSM = MemoryConfig("rcsm", 2, text_window=2)
CONTIGUOUS = MemoryConfig("sink_window", 1, text_window=2, sink_tokens=2, tail_tokens=3, positions="contiguous")
PLAN = tuple(TurnInput(ChunkRecord(turn, "v", (turn + 0.1, turn + 0.6), (1, 2, 2))) for turn in range(12))


def written(memory, layout, plan, seed, cuts) -> tuple[StreamLog, list[LogPiece]]:
    """The same stream by two writers, of which one hands out pieces at the given moments."""
    whole, cut = (StreamWriter(header(memory), layout, make_policy(memory), PositionCursor(2.0, 0.5)) for _ in range(2))
    rngs = [np.random.default_rng(seed) for _ in range(2)]
    pieces, moments = [], iter(cuts)

    def maybe_cut() -> None:
        share = next(moments, None)
        if share is not None:
            pieces.append(cut.log.cut(cut.log.first + round(share * (cut.log.length - cut.log.first))))

    for turn_input in plan:
        for writer, rng in zip((whole, cut), rngs, strict=True):
            writer.begin_turn(turn_input, 3)
            if writer is cut:
                maybe_cut()
            generate(writer, layout, rng)
        maybe_cut()
    return whole.finish(), [*pieces, cut.log.cut(cut.log.length, last=True)]


SHARES = st.lists(st.none() | st.sampled_from([0.0, 0.4, 1.0]), max_size=30)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(data=st.data())
@settings(max_examples=25)
def test_pieces_cut_anywhere_join_to_the_log_that_was_never_cut(name, data, tmp_path_factory):
    layout = data.draw(st.sampled_from(LAYOUTS))
    whole, pieces = written(
        data.draw(MEMORIES[name]), layout, data.draw(plans()), data.draw(st.integers(0, 99)), data.draw(SHARES)
    )
    assert_same_log(join_pieces(pieces), whole)
    folder = PieceFolder(tmp_path_factory.mktemp("pieces"))
    for piece in pieces:
        folder.write(piece)
    assert_same_log(join_pieces(read_pieces(folder.folder)), whole)


@pytest.fixture(scope="module")
def made() -> tuple[StreamLog, list[LogPiece]]:
    return written(RCSM, LAYOUTS[0], PLAN, 1, [None, 1.0] * 11)


def test_pieces_of_a_contiguous_stream_say_where_its_tokens_stand():
    whole, pieces = written(CONTIGUOUS, LAYOUTS[0], PLAN, 1, [None, 1.0] * 11)
    assert whole.regions is not None
    assert sum(len(piece.regions.token) > 0 for piece in pieces) > 3, "tokens must move in several pieces"
    assert_same_log(join_pieces(pieces), whole)
    with pytest.raises(ValueError, match="others do not"):
        join_pieces([*pieces[:-1], dataclasses.replace(pieces[-1], regions=None)])


def test_a_prefix_is_exact_for_the_tokens_that_it_holds(made):
    whole, pieces = made
    assert len(pieces) > 6
    assert any(len(piece.amended) for piece in pieces), "tokens must expire after their piece was cut"
    for count in range(1, len(pieces)):
        with pytest.raises(ValueError, match=r"stream s has not finished.*prefix=True"):
            join_pieces(pieces[:count])
        part = join_pieces(pieces[:count], prefix=True)
        end = len(part)
        assert end == sum(len(p) for p in pieces[:count])
        np.testing.assert_array_equal(part.ids, whole.ids[:end])
        # What leaves later is still visible to every token of the prefix.
        np.testing.assert_array_equal(np.minimum(part.expiry, end), np.minimum(whole.expiry[:end], end))


def test_pieces_that_do_not_follow_one_another_are_named(made):
    _, pieces = made
    other = dataclasses.replace(pieces[1], stream_id="other")
    for wrong, message in (
        ([], "no piece"),
        (pieces[1:], "piece 1: piece 0 was expected; one is missing or out of order"),
        ([*pieces[:2], *pieces[3:]], "piece 3: piece 2 was expected"),
        ([pieces[0], pieces[2], pieces[1]], "piece 2: piece 1 was expected"),
        ([pieces[0], other], "stream other, piece 1: the pieces before it are of stream s"),
        ([*pieces, dataclasses.replace(pieces[-1], number=len(pieces))], "was the stream's last"),
        ([pieces[0], dataclasses.replace(pieces[1], first=3)], "begins at token 3, but the pieces before it hold"),
        ([dataclasses.replace(pieces[0], header=None)], "carries the header"),
        ([pieces[0], dataclasses.replace(pieces[1], header=pieces[0].header)], "carries the header"),
    ):
        with pytest.raises(ValueError, match=message):
            join_pieces(wrong, prefix=True)


def test_amendments_only_lower_and_only_what_is_in_earlier_pieces(made):
    _, pieces = made
    at = next(i for i, piece in enumerate(pieces) if len(piece.amended))
    right, token = pieces[at], pieces[at].amended[0]

    def joined(index: int, expiry: int) -> StreamLog:
        amended = dataclasses.replace(
            right, amended=np.array([index]), amended_expiry=np.array([expiry], right.amended_expiry.dtype)
        )
        return join_pieces([*pieces[:at], amended], prefix=True)

    with pytest.raises(ValueError, match="in no earlier piece"):
        joined(right.first, right.first)
    with pytest.raises(ValueError, match="in no earlier piece"):
        joined(-1, right.first)
    with pytest.raises(ValueError, match="expire before the piece begins"):
        joined(token, right.first - 1)
    again = dataclasses.replace(
        pieces[at + 1], amended=right.amended[:1], amended_expiry=right.amended_expiry[:1] + right.amended_expiry[:1]
    )
    with pytest.raises(ValueError, match=f"piece {at + 1} raises the expiry of token {token} from"):
        join_pieces([*pieces[: at + 1], again], prefix=True)


def test_what_was_handed_out_is_gone_from_the_builder():
    writer = StreamWriter(header(RCSM), LAYOUTS[0], make_policy(RCSM), PositionCursor(2.0, 0.5))
    rng = np.random.default_rng(0)
    writer.begin_turn(PLAN[0], 0)
    generate(writer, LAYOUTS[0], rng)
    writer.log.cut(4)
    assert writer.log.column("ids", 4).shape == (writer.log.length - 4,)
    with pytest.raises(AssertionError, match="tokens before 4 were handed out"):
        writer.log.column("ids")
    with pytest.raises(AssertionError, match="tokens before 4 were handed out"):
        writer.finish()


def test_what_a_builder_holds_of_regions_is_counted_and_handed_out():
    writer = StreamWriter(header(CONTIGUOUS), LAYOUTS[0], make_policy(CONTIGUOUS), PositionCursor(2.0, 0.5))
    rng = np.random.default_rng(0)
    for turn in PLAN[:6]:
        writer.begin_turn(turn, 0)
        generate(writer, LAYOUTS[0], rng)
    tokens = dataclasses.replace(writer.log, regions=None).nbytes
    assert writer.log.nbytes - tokens >= writer.regions.log().nbytes > 0
    held = writer.regions.nbytes
    said = writer.log.cut(writer.log.length).regions
    assert held - writer.regions.nbytes >= said.token.nbytes


class TestFolder:
    def store(self, made, folder: Path) -> list[Path]:
        for piece in made[1]:
            PieceFolder(folder).write(piece)
        return sorted(folder.iterdir())

    def test_a_missing_piece_is_named(self, made, tmp_path):
        files = self.store(made, tmp_path)
        files[2].unlink()
        with pytest.raises(ValueError, match=r"piece-00000002\.npz is missing: the next piece there is piece-00000003"):
            join_pieces(read_pieces(tmp_path))
        with pytest.raises(ValueError, match="holds no piece"):
            join_pieces(read_pieces(tmp_path / "nothing"))

    @pytest.mark.parametrize("damage", [b"", b"not a piece", None])
    def test_a_broken_piece_is_named(self, made, tmp_path, damage):
        files = self.store(made, tmp_path)
        whole = files[1].read_bytes()
        files[1].write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        with pytest.raises(ValueError, match=r"piece-00000001\.npz is no piece of a log, or broken"):
            join_pieces(read_pieces(tmp_path))

    def test_two_streams_do_not_share_a_folder(self, made, tmp_path):
        self.store(made, tmp_path)
        with pytest.raises(FileExistsError, match="a folder of its own"):
            PieceFolder(tmp_path).write(made[1][0])

    def test_a_piece_that_cannot_be_written_leaves_nothing_behind(self, made, tmp_path):
        with file_size_limit(100), pytest.raises(OSError, match="too large"):
            PieceFolder(tmp_path).write(made[1][0])
        assert list(tmp_path.iterdir()) == []

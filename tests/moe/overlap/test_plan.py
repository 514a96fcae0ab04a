"""Plans of exchanges: the plans of all ranks together move every row once, to where it belongs."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_moe.moe.overlap.plan import Chunk, Chunking, ExchangePlan, Message, Piece, plan_exchange


class Row(NamedTuple):
    """A row, by where it comes from: the rank, the slot among those of all ranks, and the number within these."""

    source: int
    slot: int
    number: int


class Case(NamedTuple):
    counts: list[list[int]]
    chunking: Chunking

    @property
    def ranks(self) -> int:
        return len(self.counts)

    @property
    def local_slots(self) -> int:
        return len(self.counts[0]) // len(self.counts)

    def plans(self) -> list[ExchangePlan]:
        return [plan_exchange(self.counts, rank, self.chunking) for rank in range(self.ranks)]

    def send_buffer(self, rank: int) -> list[Row]:
        return [Row(rank, slot, n) for slot, count in enumerate(self.counts[rank]) for n in range(count)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks, local_slots = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    slots = ranks * local_slots
    # Bytes are drawn much faster than lists of numbers. More than half of them are zeros here.
    drawn = draw(st.binary(min_size=ranks * slots, max_size=ranks * slots))
    numbers = [max(0, byte % 20 - 10) for byte in drawn]
    # Besides, ranks that send nothing at all, and slots that get nothing.
    idle_ranks, idle_slots = draw(st.sets(st.integers(0, 4), max_size=2)), draw(st.sets(st.integers(0, 29), max_size=5))
    counts = [
        [numbers[r * slots + s] if r not in idle_ranks and s not in idle_slots else 0 for s in range(slots)]
        for r in range(ranks)
    ]
    by_expert = st.builds(Chunking, st.just("expert"), st.integers(1, local_slots + 1), st.booleans())
    by_source = st.builds(Chunking, st.just("source"), st.just(1), st.booleans())
    return Case(counts, draw(by_source | by_expert))


def expected_rows(case: Case, rank: int, chunk: Chunk, piece: Piece) -> list[Row]:
    """Rows of a piece: sorted by slot, then by source in ring order, then as they were sent."""
    slots = range(piece.slots.start, piece.slots.stop)
    return [
        Row(source, slot, n)
        for slot in (rank * case.local_slots + local for local in slots)
        for source in chunk.sources
        for n in range(case.counts[source][slot])
    ]


def exchange(case: Case, plans: list[ExchangePlan]) -> list[list[Row | None]]:
    """Carry out the messages of all chunks, and place the own rows; the computed buffer of every rank.

    Messages have no label on their way: those from one rank to another are matched by their order.
    """
    sent = [case.send_buffer(rank) for rank in range(case.ranks)]
    buffers: list[list[Row | None]] = [[None] * plan.num_computed for plan in plans]

    def write(buffer: list[Row | None], start: int, rows: list[Row]) -> None:
        assert buffer[start : start + len(rows)] == [None] * len(rows), "a row is written twice"
        buffer[start : start + len(rows)] = rows

    for index in range(len(plans[0].chunks)):
        under_way: dict[tuple[int, int], list[list[Row]]] = {}
        for rank, plan in enumerate(plans):
            for peer, start, rows in plan.chunks[index].send:
                under_way.setdefault((rank, peer), []).append(sent[rank][start : start + rows])
        for rank, plan in enumerate(plans):
            for peer, start, rows in plan.chunks[index].receive:
                arrived = under_way[peer, rank].pop(0)
                assert len(arrived) == rows
                write(buffers[rank], start, arrived)
        assert not any(under_way.values()), "a message is never received"
    for rank, plan in enumerate(plans):
        position = plan.own_start
        for piece in plan.chunks[0].pieces:
            write(buffers[rank], piece.start, sent[rank][position : position + sum(piece.counts)])
            position += sum(piece.counts)
    return buffers


@settings(max_examples=600)
@given(cases())
@example(Case([[0, 0, 0], [0, 0, 0], [0, 0, 0]], Chunking("expert", 1)))
@example(Case([[1, 2], [3, 0]], Chunking("expert", 1)))
@example(Case([[4, 0, 2]], Chunking("expert", 2)))
def test_plans_of_all_ranks(case: Case) -> None:
    plans = case.plans()
    assert len({len(plan.chunks) for plan in plans}) == 1
    check_that_rows_arrive_once(case, plans)
    for index in range(len(plans[0].chunks)):
        check_that_messages_match([plan.chunks[index] for plan in plans])
    for rank, plan in enumerate(plans):
        assert plan.rank == rank
        check_own_rows(case, plan)
        check_order(case, plan)
        check_what_is_sent(plan)


def own(case: Case, rank: int, row: Row) -> bool:
    return row.slot // case.local_slots == rank


def check_that_rows_arrive_once(case: Case, plans: list[ExchangePlan]) -> None:
    """Where they belong, labels and all; every piece has rows, and every row is in one piece."""
    for rank, (plan, buffer) in enumerate(zip(plans, exchange(case, plans), strict=True)):
        meant = [row for source in range(case.ranks) for row in case.send_buffer(source) if own(case, rank, row)]
        assert sorted(row for row in buffer if row is not None) == sorted(meant)
        assert len(buffer) == len(meant)
        covered = []
        for chunk in plan.chunks:
            for piece in chunk.pieces:
                assert sum(piece.counts) > 0
                assert buffer[piece.rows] == expected_rows(case, rank, chunk, piece)
                covered += list(range(piece.rows.start, piece.rows.stop))
            assert len(chunk.pieces) <= (case.local_slots if case.chunking.slot_major else 1)
        assert sorted(covered) == list(range(len(buffer)))


def check_that_messages_match(chunks: list[Chunk]) -> None:
    """Between every pair of ranks in order and in size; none is empty, none goes to the rank itself."""
    for rank, chunk in enumerate(chunks):
        for message in (*chunk.send, *chunk.receive):
            assert message.rows > 0
            assert message.peer != rank
        for peer, other in enumerate(chunks):
            sent = [message.rows for message in chunk.send if message.peer == peer]
            assert sent == [message.rows for message in other.receive if message.peer == rank]


def check_own_rows(case: Case, plan: ExchangePlan) -> None:
    """They are one run of the send buffer."""
    buffer = case.send_buffer(plan.rank)
    assert plan.num_sent == len(buffer)
    chunk = plan.chunks[0]
    assert chunk.sources == (plan.rank,)
    assert chunk.receive == chunk.send == ()
    rows = buffer[plan.own_start : plan.own_start + chunk.rows]
    assert rows == [row for row in buffer if own(case, plan.rank, row)]


def check_what_is_sent(plan: ExchangePlan) -> None:
    """Every row that is not an own one, once."""
    sent = [i for chunk in plan.chunks for _, start, rows in chunk.send for i in range(start, start + rows)]
    own_rows = range(plan.own_start, plan.own_start + plan.chunks[0].rows)
    assert sorted([*sent, *own_rows]) == list(range(plan.num_sent))


def check_order(case: Case, plan: ExchangePlan) -> None:
    """Round the ring; by source one message each, by expert all local slots once, in order."""
    backward = [(plan.rank - i) % case.ranks for i in range(1, case.ranks)]
    forward = [(plan.rank + i) % case.ranks for i in range(1, case.ranks)]
    remote = plan.chunks[1:]
    if case.chunking.by == "source":
        assert [chunk.sources for chunk in remote] == [(source,) for source in backward]
        for chunk, target in zip(remote, forward, strict=True):
            assert len(chunk.receive) <= (case.local_slots if case.chunking.slot_major else 1)
            assert {message.peer for message in chunk.send} <= {target}
    elif case.ranks == 1:
        assert remote == ()
    else:
        assert len(remote) == min(case.chunking.groups, case.local_slots)
        slots = [slot for chunk in remote for slot in slots_of(chunk)]
        assert slots == sorted(set(slots))
        for chunk in remote:
            assert chunk.sources == tuple(backward)
            assert rounds([backward.index(message.peer) for message in chunk.receive]) <= max(1, len(slots_of(chunk)))
            assert rounds([forward.index(message.peer) for message in chunk.send]) <= case.local_slots


def slots_of(chunk: Chunk) -> list[int]:
    """Slots that have rows."""
    return [slot for piece in chunk.pieces for slot, count in enumerate(piece.counts, piece.first_slot) if count]


def rounds(turns: list[int]) -> int:
    """How often one goes round the ring to serve peers in this order."""
    return bool(turns) + sum(after <= before for before, after in pairwise(turns))


@settings(max_examples=600)
@given(cases(), st.data())
def test_segments_partition_the_rows(case: Case, data: st.DataObject) -> None:
    """Each run holds rows of its slot alone; those of all slots hold every row once, those of some only theirs."""
    rank = data.draw(st.integers(0, case.ranks - 1))
    plan = plan_exchange(case.counts, rank, case.chunking)
    slot_of_row = [-1] * plan.num_computed
    for piece in (piece for chunk in plan.chunks for piece in chunk.pieces):
        slots_of_piece = [piece.first_slot + i for i, count in enumerate(piece.counts) for _ in range(count)]
        slot_of_row[piece.rows] = slots_of_piece
    first = data.draw(st.integers(0, case.local_slots))
    slots = slice(first, data.draw(st.integers(first, case.local_slots)))
    segments = plan.segments(slots)
    assert len(segments) == slots.stop - slots.start
    for slot, runs in enumerate(segments, slots.start):
        assert all(start < end for start, end in runs)
        assert runs == sorted(runs)
        assert len(runs) <= (1 if case.chunking.slot_major else len(plan.chunks))
        covered = [row for start, end in runs for row in range(start, end)]
        assert covered == [row for row, its_slot in enumerate(slot_of_row) if its_slot == slot]
        assert len(covered) == sum(source[rank * case.local_slots + slot] for source in case.counts)


def test_by_hand() -> None:
    """Three ranks with two slots each; rank 1 sends nothing to slot 0 of rank 0 and one row to its slot 1."""
    counts = [[1, 2, 3, 0, 5, 6], [0, 1, 2, 2, 4, 0], [7, 0, 1, 1, 0, 2]]
    assert plan_exchange(counts, 0, Chunking("expert", 2)) == ExchangePlan(
        rank=0,
        num_sent=17,
        own_start=0,
        chunks=(
            Chunk((0,), (Piece(0, 0, (1, 2)),), (), ()),
            Chunk((2, 1), (Piece(3, 0, (7,)),), (Message(2, 3, 7),), (Message(1, 3, 3), Message(2, 6, 5))),
            Chunk((2, 1), (Piece(10, 1, (1,)),), (Message(1, 10, 1),), (Message(2, 11, 6),)),
        ),
    )
    by_source = plan_exchange(counts, 2, Chunking("source"))
    assert by_source.own_start == 9
    assert by_source.chunks[1:] == (
        Chunk((1,), (Piece(2, 0, (4, 0)),), (Message(1, 2, 4),), (Message(0, 0, 7),)),
        Chunk((0,), (Piece(6, 0, (5, 6)),), (Message(0, 6, 11),), (Message(1, 7, 2),)),
    )
    slot_major = plan_exchange(counts, 2, Chunking("source", slot_major=True))
    assert slot_major.chunks == (
        Chunk((2,), (Piece(9, 1, (2,)),), (), ()),
        Chunk((1,), (Piece(0, 0, (4,)),), (Message(1, 0, 4),), (Message(0, 0, 7),)),
        Chunk(
            (0,),
            (Piece(4, 0, (5,)), Piece(11, 1, (6,))),
            (Message(0, 4, 5), Message(0, 11, 6)),
            (Message(1, 7, 1), Message(1, 8, 1)),
        ),
    )

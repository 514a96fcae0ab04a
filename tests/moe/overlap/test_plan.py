"""Plans of exchanges: the plans of all ranks together move every row once, to where it belongs."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_moe.moe.overlap.plan import Chunk, Chunking, ExchangePlan, Message, plan_exchange


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
    by_expert = st.builds(Chunking, st.just("expert"), st.integers(1, local_slots + 1))
    return Case(counts, draw(st.just(Chunking("source")) | by_expert))


def expected_region(case: Case, rank: int, sources: tuple[int, ...], chunk: Chunk) -> list[Row]:
    """Rows of a chunk: sorted by slot, then by source in ring order, then as they were sent."""
    slots = range(chunk.slots.start, chunk.slots.stop)
    return [
        Row(source, slot, n)
        for slot in (rank * case.local_slots + local for local in slots)
        for source in sources
        for n in range(case.counts[source][slot])
    ]


def exchange(case: Case, plans: list[ExchangePlan], index: int) -> list[list[Row | None]]:
    """Carry out the messages of one chunk; the region of every rank.

    Messages have no label on their way: those from one rank to another are matched by their order.
    """
    buffers = [case.send_buffer(rank) for rank in range(case.ranks)]
    under_way: dict[tuple[int, int], list[list[Row]]] = {}
    for rank, plan in enumerate(plans):
        for peer, start, rows in plan.chunks[index].send:
            under_way.setdefault((rank, peer), []).append(buffers[rank][start : start + rows])
    regions: list[list[Row | None]] = []
    for rank, plan in enumerate(plans):
        chunk = plan.chunks[index]
        region: list[Row | None] = [None] * chunk.rows
        for peer, start, rows in chunk.receive:
            arrived = under_way[peer, rank].pop(0)
            assert len(arrived) == rows
            assert region[start : start + rows] == [None] * rows, "a row is written twice"
            region[start : start + rows] = arrived
        regions.append(region)
    assert not any(under_way.values()), "a message is never received"
    return regions


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
    """Where they belong: in the region's order, labels and all."""
    computed = [[row for row in case.send_buffer(rank) if own(case, rank, row)] for rank in range(case.ranks)]
    for index in range(1, len(plans[0].chunks)):
        for rank, region in enumerate(exchange(case, plans, index)):
            chunk = plans[rank].chunks[index]
            assert region == expected_region(case, rank, chunk.sources, chunk)
            computed[rank] += [row for row in region if row is not None]
    for rank, rows in enumerate(computed):
        meant = [row for source in range(case.ranks) for row in case.send_buffer(source) if own(case, rank, row)]
        assert sorted(rows) == sorted(meant)
        assert plans[rank].num_computed == len(meant)


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
    """They are computed where they are."""
    buffer = case.send_buffer(plan.rank)
    assert plan.num_sent == len(buffer)
    chunk = plan.chunks[0]
    assert chunk.sources == (plan.rank,)
    assert chunk.receive == chunk.send == ()
    rows = buffer[plan.own_start : plan.own_start + chunk.rows]
    assert rows == [row for row in buffer if own(case, plan.rank, row)]
    assert rows == expected_region(case, plan.rank, (plan.rank,), chunk)


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
            assert len(chunk.receive) <= 1
            assert [message.peer for message in chunk.send] in ([], [target])
            assert chunk.slots == slice(0, case.local_slots)
    elif case.ranks == 1:
        assert remote == ()
    else:
        assert len(remote) == min(case.chunking.groups, case.local_slots)
        slots = [slot for chunk in remote for slot in range(chunk.slots.start, chunk.slots.stop)]
        assert slots == list(range(case.local_slots))
        sizes = [len(chunk.counts) for chunk in remote]
        assert max(sizes) - min(sizes) <= 1
        for chunk in remote:
            assert chunk.sources == tuple(backward)
            assert rounds([forward.index(message.peer) for message in chunk.send]) <= len(chunk.counts)
            assert rounds([backward.index(message.peer) for message in chunk.receive]) <= len(chunk.counts)


def rounds(turns: list[int]) -> int:
    """How often one goes round the ring to serve peers in this order."""
    return bool(turns) + sum(after <= before for before, after in pairwise(turns))


@settings(max_examples=600)
@given(cases(), st.data())
def test_segments_partition_the_rows(case: Case, data: st.DataObject) -> None:
    """Each run holds rows of its slot alone; those of all slots hold every row once, those of some only theirs."""
    rank = data.draw(st.integers(0, case.ranks - 1))
    plan = plan_exchange(case.counts, rank, case.chunking)
    slot_of_row = [
        chunk.first_slot + i for chunk in plan.chunks for i, count in enumerate(chunk.counts) for _ in range(count)
    ]
    first = data.draw(st.integers(0, case.local_slots))
    slots = slice(first, data.draw(st.integers(first, case.local_slots)))
    segments = plan.segments(slots)
    assert len(segments) == slots.stop - slots.start
    for slot, runs in enumerate(segments, slots.start):
        assert all(start < end for start, end in runs)
        assert runs == sorted(runs)
        covered = [row for start, end in runs for row in range(start, end)]
        assert covered == [row for row, its_slot in enumerate(slot_of_row) if its_slot == slot]
        assert len(covered) == sum(source[rank * case.local_slots + slot] for source in case.counts)
    assert plan.starts == tuple(sum(chunk.rows for chunk in plan.chunks[:i]) for i in range(len(plan.chunks)))


def test_by_hand() -> None:
    """Three ranks with two slots each; rank 1 sends nothing to slot 0 of rank 0 and one row to its slot 1."""
    counts = [[1, 2, 3, 0, 5, 6], [0, 1, 2, 2, 4, 0], [7, 0, 1, 1, 0, 2]]
    assert plan_exchange(counts, 0, Chunking("expert", 2)) == ExchangePlan(
        rank=0,
        num_sent=17,
        own_start=0,
        chunks=(
            Chunk((0,), 0, (1, 2), (), ()),
            Chunk((2, 1), 0, (7,), (Message(2, 0, 7),), (Message(1, 3, 3), Message(2, 6, 5))),
            Chunk((2, 1), 1, (1,), (Message(1, 0, 1),), (Message(2, 11, 6),)),
        ),
    )
    by_source = plan_exchange(counts, 2, Chunking("source"))
    assert by_source.own_start == 9
    assert by_source.chunks[1:] == (
        Chunk((1,), 0, (4, 0), (Message(1, 0, 4),), (Message(0, 0, 7),)),
        Chunk((0,), 0, (5, 6), (Message(0, 0, 11),), (Message(1, 7, 2),)),
    )

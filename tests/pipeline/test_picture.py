"""Pictures and traces of schedules show every action once, at its time."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from lightning_moe.pipeline.costs import Costs
from lightning_moe.pipeline.picture import COLOURS, schedule_page, schedule_svg
from lightning_moe.pipeline.registry import make_schedule, schedule_names
from lightning_moe.pipeline.simulate import simulate
from lightning_moe.pipeline.trace import chrome_trace

COSTS = Costs(1.0, 1.3, 0.8, communication=0.1)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", schedule_names())
def test_the_picture_has_every_action(name: str) -> None:
    schedule = make_schedule(name, 3, 6, costs=COSTS)
    simulation = simulate(schedule, COSTS)
    svg = ElementTree.fromstring(schedule_svg(schedule, simulation))
    boxes = [box for box in svg.iter(f"{SVG}rect") if box.get("class") == "action"]
    assert len(boxes) == sum(len(actions) for actions in schedule.ranks)
    kinds = Counter(action.kind for actions in schedule.ranks for action in actions)
    assert Counter(box.get("fill") for box in boxes) == Counter({COLOURS[kind]: n for kind, n in kinds.items()})
    assert len([box for box in svg.iter(f"{SVG}rect") if box.get("class") == "legend"]) == len(kinds)

    rows: dict[str, list[tuple[float, float]]] = {}
    for box in boxes:
        rows.setdefault(str(box.get("y")), []).append((float(str(box.get("x"))), float(str(box.get("width")))))
    assert len(rows) == 3
    for row in rows.values():  # 0.02: coordinates have two digits
        assert all(left + width <= later + 0.02 for (left, width), (later, _) in pairwise(row))
    titles = [str(title.text) for title in svg.iter(f"{SVG}title")]
    assert len(titles) == len(boxes)
    assert titles[0].startswith("F0: forward of microbatch 0, stage 0 (rank 0, chunk 0), from 0 to ")


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    schedule = make_schedule("zb-h1", 4, 8)
    page = schedule_page(schedule, simulate(schedule, Costs()), title="a <b> & c", report="rank < 2 & more")
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert root.findtext("body/h1") == "a <b> & c"
    assert root.findtext("body/pre") == "rank < 2 & more"
    assert "11.1%" in str(root.findtext("body/p"))
    assert not any(
        word in page.replace('xmlns="http://www.w3.org/2000/svg"', "") for word in ("http", "src=", "@import")
    )


def test_times_far_from_one_are_drawn_in_bounds() -> None:
    for unit in (1e-6, 1e6):
        costs = Costs(unit, unit, unit)
        schedule = make_schedule("1f1b", 2, 3, costs=costs)
        svg = ElementTree.fromstring(schedule_svg(schedule, simulate(schedule, costs)))
        numbers = [text for text in svg.iter(f"{SVG}text") if text.get("y") == numbers_line(svg)]
        assert 50 < float(str(svg.get("width"))) < 20_000
        assert 2 <= len(numbers) < 50


def numbers_line(svg: ElementTree.Element) -> str:
    """Height at which the numbers of the axis stand: those of the text "0"."""
    return next(str(text.get("y")) for text in svg.iter(f"{SVG}text") if text.text == "0")


def test_the_trace_has_a_thread_for_each_rank() -> None:
    schedule = make_schedule("interleaved-1f1b", 2, 4, costs=COSTS)
    simulation = simulate(schedule, COSTS)
    trace = json.loads(json.dumps(chrome_trace(schedule, simulation, milliseconds=2.0), allow_nan=False))
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert names == {0: "rank 0", 1: "rank 1"}
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for rank, actions in enumerate(schedule.ranks):
        own = [event for event in events if event["tid"] == rank]
        assert [event["name"] for event in own] == [str(action) for action in actions]
        assert [event["args"]["chunk"] for event in own] == [action.chunk for action in actions]
        assert all(event["args"]["stage"] == rank + 2 * event["args"]["chunk"] for event in own)
        assert all(one["ts"] + one["dur"] <= after["ts"] + 1e-6 for one, after in pairwise(own))
    end = max(event["ts"] + event["dur"] for event in events)
    assert end == pytest.approx(simulation.makespan * 2000, rel=1e-12)  # microseconds

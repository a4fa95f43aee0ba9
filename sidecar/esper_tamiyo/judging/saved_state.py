"""Saved state: the engine's data as plain data, and back into an engine.

Of each stateful class a struct of :mod:`~esper_tamiyo.judging.saved_structs` has the fields;
what is worked out of them, or of the table, is in
:data:`~esper_tamiyo.judging.saved_structs.DERIVED`. A field that is in neither
is forgotten by a restart, and a test looks for it. What is put back goes into objects that
were made by the rank's table, in place, because guards and rules hold on to them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any

from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.excursions import Excursions
from esper_tamiyo.judging.history import History
from esper_tamiyo.judging.liveness import Key
from esper_tamiyo.judging.observations import Extreme, FrozenMedian, RollingMedian
from esper_tamiyo.judging.peers import ARRIVAL_NS, HINDSIGHT_NS, KEPT_STEPS, PeerBoard
from esper_tamiyo.judging.rule_status import _OF_OTHERS, RuleStatus, RuleTarget
from esper_tamiyo.judging.rules import compiled
from esper_tamiyo.judging.run_state import RunState
from esper_tamiyo.judging.saved_structs import (
    SAVED,
    SavedEngine,
    SavedHistory,
    SavedRank,
    SavedStatus,
    SavedTarget,
)
from esper_tamiyo.judging.silences import SilencedRules, Silences

LOOKED_BACK_NS = ARRIVAL_NS + HINDSIGHT_NS
"""How far before its newest step another rank may still want to look at a rank's steps."""


_NAMES: dict[type, tuple[str, ...]] = {
    kind: tuple(
        field if field in kind.__slots__ else f"_{field}"  # type: ignore[attr-defined]
        for field in saved.__struct_fields__
    )
    for kind, saved in SAVED.items()
    if kind not in (Engine, History, RunState)
}
"""The attributes of a class that the fields of its struct are, in their order."""


SEEDS_AT_ONCE = 16
"""Seeds of a rank that are saved in half a millisecond."""


class UnfitStateError(ValueError):
    """What was saved does not fit the table that it was saved under."""


def saved_engine(engine: Engine) -> SavedEngine:
    """What ``engine`` knows besides ranks."""
    silences: Silences = engine._silences
    return SavedEngine(
        [(*key, instance) for key, instance in engine.roster._retired],
        {run: dict(rules._until) for run, rules in silences._runs.items() if rules.used},
    )


def put_engine_back(saved: SavedEngine, engine: Engine) -> None:
    """Have ``engine`` know what was saved, besides what it knows."""
    for run, rank, instance in saved.retired:
        engine.roster._retired[(run, rank), instance] = None
    for run, until in saved.silences.items():
        rules: SilencedRules = engine._silences.of_run(run)
        rules._until, rules.used = dict(until), True
        engine._silences.used = True


def saved_rank(engine: Engine, key: Key) -> SavedRank | None:
    """All that ``engine`` knows of a rank, None where it knows none.

    The rank goes over to the table in use first, if it has not yet.
    """
    state = _up_to_date(engine, key)
    if state is None:
        return None
    return _saved(engine, key, state, state._seeds.values())


def saved_rank_in_parts(engine: Engine, key: Key) -> Iterator[list[SavedTarget] | SavedRank]:
    """Most seeds of a rank that has many, some at a time, and last the rank with the others: an
    ask may come between.

    Without the last where the rank has gone on meanwhile: all is to be of one step.
    """
    state = _up_to_date(engine, key)
    if state is None:
        return
    book, newest = state.book, state.newest
    seeds = list(state._seeds.values())
    while len(seeds) > SEEDS_AT_ONCE:
        yield [*map(_taken, seeds[:SEEDS_AT_ONCE])]
        if engine._runs.get(key) is not state or (state.book, state.newest) != (book, newest):
            return
        del seeds[:SEEDS_AT_ONCE]
    yield _saved(engine, key, state, seeds)


def _up_to_date(engine: Engine, key: Key) -> RunState | None:
    """The rank, gone over to the table in use."""
    state = engine._runs.get(key)
    if state is not None and state.book is not engine._book:
        engine._catch_up(state, key)
    if state is not None:
        state.stretch.catch_up(state)
    return state


def _saved(engine: Engine, key: Key, state: RunState, seeds: Iterable[RuleTarget]) -> SavedRank:
    board = engine.roster._boards[key[0]]
    return SavedRank(
        comparison=_taken(state._comparison),
        gaps=list(state._gaps),
        live=[seed.seed_id or "" for seed in state._live],
        rank=_taken(state._rank),
        seeds=[_taken(seed) for seed in seeds],
        acting=state.acting,
        clean_steps=state.clean_steps,
        conservative=state.conservative,
        decision=state.decision,
        fired=[(entry.rule, finding) for entry, finding in state.fired],
        first=state.first,
        first_ns=state.first_ns,
        instance=state.instance,
        newest=state.newest,
        pace=_taken(state.pace),
        warm_up=_taken(state.warm_up),
        there_since_ns=board._first_ns.get(key[1]),
        posts=_posts_of(board, key[1], state.pace.last_ns),
    )


def put_rank_back(saved: SavedRank, engine: Engine, key: Key, heard_ns: int) -> None:
    """Have ``engine`` know a rank as it was saved under the table in use.

    ``heard_ns`` is when it counts as heard, by the clock of
    :meth:`~esper_tamiyo.judging.engine.Engine.tick`. Raises :class:`UnfitStateError`, and then
    nothing was changed.
    """
    run, rank = key
    board = engine.roster._boards.get(run) or PeerBoard()
    silences = engine._silences.of_run(run)
    state = RunState(saved.instance, engine._book, board, rank, silences)
    try:
        _put_state(saved, state)
    except (ValueError, LookupError, TypeError) as error:
        raise UnfitStateError(f"run {run}, rank {rank}: {error!r}") from error
    state.pace.heard_ns = heard_ns
    roster = engine.roster
    before = roster.ranks.get(key)
    board.ranks += before is None
    roster.seeds += len(state.seeds) - (0 if before is None else len(before.seeds))
    roster._boards[run] = board
    roster.believed.add(key)
    if saved.pace.ending is not None:
        roster.endings.remember(key)
    for step, time_ns, values in saved.posts:
        board.post(rank, step, time_ns, values)
    note_company(saved, engine, key)
    engine._runs[key] = state
    engine._runs.move_to_end(key)


def note_company(saved: SavedRank, engine: Engine, key: Key) -> None:
    """Have the other ranks of a run know since when there is this one."""
    if saved.there_since_ns is not None:
        first_ns = engine.roster._boards.setdefault(key[0], PeerBoard())._first_ns
        since_ns = saved.there_since_ns
        first_ns[key[1]] = min(since_ns, first_ns.get(key[1], since_ns))


def judge_again(engine: Engine, frame: StepFrame, at_ns: int) -> None:
    """Judge a step that was judged before: it and its process were let in then."""
    key, roster = (frame.run, frame.rank), engine.roster
    if frame.ended is not None:
        engine.observe(frame, at_ns=at_ns)
        return
    before = roster.ranks.get(key)
    if before is None or (frame.instance and before.instance != frame.instance):
        if before is not None and not before.instance and before.newest < frame.step:
            before.instance = frame.instance
        else:
            roster.ranks[key] = roster._new_state(frame, engine._book, before)
            roster.ranks.move_to_end(key)
        roster.believed.add(key)
    engine.observe(frame, at_ns=at_ns, asked=True)


def post_again(engine: Engine, frame: StepFrame, *, began_anew: bool) -> None:
    """Show the other ranks a step of one that will be put back as it was after it.

    ``began_anew``: it is the first of another process.
    """
    if engine._book.ranks:
        values = frame.values
        picked = {key: values[key] for key in engine._book.rank_keys if key in values}
        board = engine.roster._boards.setdefault(frame.run, PeerBoard())
        if began_anew:
            board.remove_rank(frame.rank)
        board.post(frame.rank, frame.step, frame.time_unix_nano, picked)


def changes_besides_ranks(engine: Engine) -> tuple[int, object]:
    """Another value whenever :func:`saved_engine` may have changed."""
    return engine._silences.orders, next(reversed(engine.roster._retired), None)


def heard_ns(engine: Engine, key: Key) -> int:
    """When a rank was heard last, by the same clock; 0 where it is not known."""
    state = engine._runs.get(key)
    return 0 if state is None else state.pace.heard_ns


def finish(engine: Engine, order: Iterable[Key], away_ns: int) -> int:
    """All that was saved is back: ``order`` has the ranks, the last heard at the end, and for
    ``away_ns`` nobody listened to them. Returns how many ranks there are.

    As many are forgotten as are too many, and what is known of runs without ranks with them.
    What was counted on the way counts as nothing: it was counted when it came first.
    """
    for key in order:
        if key in engine._runs:
            engine._runs.move_to_end(key)
            engine._runs[key].pace.away_ns = away_ns
    roster = engine.roster
    while len(roster.ranks) > roster.capacity.ranks:
        roster._forget(next(iter(roster.ranks)))
    roster.believed.intersection_update(roster.ranks)
    roster.forgotten = 0
    runs = {run for run, _ in engine._runs}
    for run in [run for run in roster._boards if run not in runs]:
        del roster._boards[run]
    for run in [run for run in engine._silences._runs if run not in runs]:
        engine._silences.forget_run(run)
    engine._counts = dict.fromkeys(engine._counts, 0)
    engine._refused = Counter(dict.fromkeys(engine._refused, 0))
    return len(engine._runs)


def _posts_of(
    board: PeerBoard, rank: int, last_ns: int
) -> list[tuple[int, int, dict[str, float]]]:
    """The newest steps of a rank that others may still want to look at, the oldest first."""
    in_company = board._first_ns.keys() != {rank}
    found: list[tuple[int, int, dict[str, float]]] = []
    for step, time_ns, values in board.told_by(rank):
        is_near = in_company and time_ns > last_ns - LOOKED_BACK_NS
        if len(found) >= KEPT_STEPS and not is_near:
            break
        found.append((step, time_ns, dict(values)))
    return found[::-1]


def _put_state(saved: SavedRank, state: RunState) -> None:
    book = state.book
    for name in ("acting", "clean_steps", "conservative", "decision"):
        setattr(state, name, getattr(saved, name))
    state.first, state.first_ns, state.newest = saved.first, saved.first_ns, saved.newest
    _put(saved.warm_up, state.warm_up)
    state._gaps.extend(saved.gaps)
    _put(saved.pace, state.pace)
    by_id = {entry.rule.id: entry for entry in book.rules}
    for rule, finding in saved.fired:
        entry = by_id.get(rule.id)
        same = entry is not None and entry.rule == rule
        state.fired.append((entry if entry and same else compiled(rule), finding))
    _put(saved.rank, state._rank)
    _put(saved.comparison, state._comparison)
    for each in saved.seeds:
        if each.seed_id is None:
            raise UnfitStateError("a seed without an id")
        past = History(book.seed_watch, state._rank.history)
        seed = RuleTarget(each.seed_id, len(book.rules), past, book.seed_places)
        _put(each, seed)
        state._seeds[each.seed_id] = seed
    state._live = [state._seeds[seed_id] for seed_id in saved.live]
    state._guard_updates(saved.newest)
    state.renew_guards()


def _taken(thing: object) -> Any:
    """``thing`` as the struct that it is saved as."""
    if isinstance(thing, History):
        return _taken_history(thing)
    if isinstance(thing, RuleStatus):
        return SavedStatus(
            active=thing.active,
            fired_at=thing.fired_at,
            hits=thing.hits,
            recent=f"{thing.recent:x}",
            silenced_by=thing.silenced_by,
            since=thing.since,
            state=thing.state,
        )
    kind = type(thing)
    return SAVED[kind](*[_plain(getattr(thing, name)) for name in _NAMES[kind]])


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in SAVED:
        return _taken(value)
    if kind is deque:
        return list(value)
    if kind is list:
        return [_taken(each) for each in value]
    if kind is dict and value and type(next(iter(value.values()))) in SAVED:
        return [_taken(each) for each in value.values()]
    return value


def _taken_history(past: History) -> SavedHistory:
    own = [past.baselines[watch.name] for watch in past._watched.baselines]
    return SavedHistory(
        phase=past._phase,
        baselines=[_taken(each) for each in own if isinstance(each, RollingMedian)],
        frozen=[_taken(each) for each in own if isinstance(each, FrozenMedian)],
        extremes=[_taken(each) for each in own if isinstance(each, Extreme)],
        excursions=[_taken(past.excursions[key]) for key in past.own_excursions],
        lasts=[_taken(last) for _, last in past._own_lasts],
        peers=dict(past.peers),
        slopes=[_taken(past.slopes[key]) for key in past._watched.slopes],
        earlier=[_taken(past.earlier[key]) for key in past._watched.earlier],
    )


def _put(saved: Any, thing: Any) -> None:
    """Have ``thing`` be what was saved of it."""
    if isinstance(thing, History):
        _put_history(saved, thing)
        return
    for name, field in zip(_NAMES[type(thing)], saved.__struct_fields__, strict=True):
        value, there = getattr(saved, field), getattr(thing, name)
        if type(there) is deque:
            there.clear()
            there.extend(value)
        elif type(there) in SAVED:
            _put(value, there)
        elif type(there) is dict and there and type(next(iter(there.values()))) in SAVED:
            _put_each(value, list(there.values()))
        elif name == "statuses":
            _put_each(value, there)
        elif name == "recent":
            thing.recent = int(value, 16)
        else:
            setattr(thing, name, value)
    _work_out(thing)


def _put_each(saved: list[Any], things: list[Any]) -> None:
    for each, thing in zip(saved, things, strict=True):
        if thing is not _OF_OTHERS:
            _put(each, thing)


def _put_history(saved: SavedHistory, past: History) -> None:
    own = [past.baselines[watch.name] for watch in past._watched.baselines]
    _put_each(saved.baselines, [each for each in own if isinstance(each, RollingMedian)])
    _put_each(saved.frozen, [each for each in own if isinstance(each, FrozenMedian)])
    _put_each(saved.extremes, [each for each in own if isinstance(each, Extreme)])
    _put_each(saved.excursions, [past.excursions[key] for key in past.own_excursions])
    _put_each(saved.lasts, [last for _, last in past._own_lasts])
    _put_each(saved.slopes, [past.slopes[key] for key in past._watched.slopes])
    _put_each(saved.earlier, [past.earlier[key] for key in past._watched.earlier])
    past._phase, past.peers = saved.phase, saved.peers


def _work_out(thing: Any) -> None:
    """The fields of ``thing`` that follow from the others."""
    if isinstance(thing, RollingMedian):
        if len(thing._arrived) > thing._window:
            raise UnfitStateError("more observations than a baseline spans")
        thing._ordered = sorted(thing._arrived)
    elif isinstance(thing, Excursions):
        thing._ordered = sorted(thing._distances)
    elif isinstance(thing, RuleStatus):
        thing.enter(thing.state, thing.since)

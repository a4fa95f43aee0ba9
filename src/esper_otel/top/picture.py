"""The picture: runs as rows of text, for a terminal of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from esper_otel.leyline.terminal import printable, sparkline
from esper_otel.report.rulings import CONTINUE, Ruling
from esper_otel.top.charts import Drawn, StepRange, braille, filled, means
from esper_otel.top.choice import WINDOWS, Choice
from esper_otel.top.rows import Piece, Row, fitted
from esper_otel.top.watched import PHASES, WatchedRank, WatchedRun, WatchedSeed

SMALLEST, SMALLEST_ROWS = 40, 10
"""Columns and rows below which nothing sensible can be drawn."""

_TWO_CHARTS = 70
"""Columns from which on two charts lie side by side."""

_MOST_CHART, _LEAST_CHART = 16, 2
_KEYS = "←→ run  ↑↓ rank  c curve  w {window}  l {scale}  a all runs  space hold  q quit"
_ACTIONS = {"PAUSE": "alarm", "OPTIMIZER": "warn", "SEED": "good", CONTINUE: "dim"}
_STATES = {"stale": "warn", "failed": "alarm"}


def picture(
    runs: Sequence[WatchedRun],
    choice: Choice,
    width: int,
    height: int,
    where: str,
    problem: str,
) -> list[Row]:
    """Rows of a picture, at most ``height`` of at most ``width`` columns.

    ``where`` says where it comes from, ``problem`` what is wrong with that.
    """
    if width < SMALLEST or height < SMALLEST_ROWS:
        told = fitted([Piece(f"at least {SMALLEST}x{SMALLEST_ROWS}")], width)
        return [told, *([] for _ in range(height - 1))]
    run, rank = choice.resolve(runs)
    if run is None or rank is None:
        rows = [[Piece(f" no step of a run yet: {where}", "dim")]]
    elif choice.shows_all:
        rows = [*_all_runs(runs, run, width, height - 1)]
    else:
        rows = [*_one_run(run, rank, choice, width, height - 1)]
    rows = rows[: height - 1]
    rows += [[] for _ in range(height - 1 - len(rows))]
    rows.append([Piece(f" {problem}", "alarm")] if problem else [_keys(choice)])
    return [fitted(row, width) for row in rows]


def snapshot(runs: Sequence[WatchedRun], choice: Choice, width: int, height: int) -> list[Row]:
    """Rows of one picture to be printed: as many as there is something for, without keys."""
    run, rank = choice.resolve(runs)
    if run is None or rank is None:
        return []
    rows: list[Row] = []
    if len(runs) > 1:
        rows += [*_all_runs(runs, run, width, height), []]
    rows += _one_run(run, rank, choice, width, height)
    while rows and not rows[-1]:
        rows.pop()
    return [fitted(row, width) for row in rows]


def _keys(choice: Choice) -> Piece:
    steps = WINDOWS[choice.window]
    window = f"last {steps:,}" if steps else "all steps"
    keys = _KEYS.format(window=window, scale="log" if choice.is_log else "linear")
    return Piece(f" {'HELD  ' if choice.is_held else ''}{keys}", "dim")


def _one_run(
    run: WatchedRun, rank: WatchedRank, choice: Choice, width: int, height: int
) -> Iterator[Row]:
    first, last = (rank.trainers[0].steps()[1], rank.step) if rank.trainers else (0, rank.step)
    if WINDOWS[choice.window]:
        first = max(first, last - WINDOWS[choice.window] + 1)
    span = StepRange(first, max(last, first))
    phases = [*_phases(rank, span, width)]
    seeds = [_seed_row(seed, width) for seed in rank.seeds()]
    ranks = [*_rank_rows(run, rank)] if len(run.ranks) > 1 else []
    told = [*_decisions(run, rank)]
    room = height - 1
    phases = phases[: max(room // 4 + 1, 1)]
    room -= len(phases)
    most = max(room // 6, 1)
    seeds, ranks = _cut(seeds, most), _cut(ranks, most)
    room -= len(seeds) + len(ranks)
    decisions = max(min(len(told), room // 3), 2)
    charts = max(min(room - decisions, _MOST_CHART + 2), _LEAST_CHART + 2)
    yield _head(run, rank)
    yield from _charts(run, rank, choice, span, width, charts - 2)
    yield from phases
    yield from seeds
    yield from ranks
    yield from told[: max(room - charts, 0)]


def _cut(rows: list[Row], most: int) -> list[Row]:
    """At most so many rows, the last of which says how many more there are."""
    if len(rows) <= most:
        return rows
    return [*rows[: most - 1], [Piece(f" … {len(rows) - most + 1} more", "dim")]]


def _head(run: WatchedRun, rank: WatchedRank) -> Row:
    row = [Piece(f" {printable(run.name) or '(no run id)'}", "title")]
    if len(run.ranks) > 1 or rank.rank:
        row.append(Piece(f"  rank {rank.rank} of {len(run.ranks)}"))
    row.append(Piece(f"  step {rank.step:,}"))
    loss, latency = rank.newest("loss"), rank.newest("step_latency_ms")
    if loss is not None:
        row.append(Piece(f"  loss {loss:.4g}", "loss"))
    elif rank.newest("nonfinite"):
        row.append(Piece("  loss not finite", "alarm"))
    if latency is not None:
        row.append(Piece(f"  {latency:.3g} ms"))
    if rank.mode:
        row.append(Piece(f"  {rank.mode}", "dim"))
    row.append(_state(rank, "newest step at"))
    return row


def _state(rank: WatchedRank, since: str = "at") -> Piece:
    """How it is doing; without word of that, when its newest step ended."""
    if rank.state:
        ended = f": {printable(rank.ended)}" if rank.ended else ""
        return Piece(f"  {rank.state}{ended}", _STATES.get(rank.state, "good"))
    if not rank.clock:
        return Piece("")
    at = datetime.fromtimestamp(rank.clock / 1e9).astimezone()
    return Piece(f"  {since} {at:%H:%M:%S}", "dim")


def _charts(
    run: WatchedRun, rank: WatchedRank, choice: Choice, span: StepRange, width: int, rows: int
) -> Iterator[Row]:
    keys = [choice.curve]
    other = "gradient_norm" if choice.curve != "gradient_norm" else "loss"
    if width >= _TWO_CHARTS and rank.curve(other) is not None:
        keys.append(other)
    columns = width // len(keys) - 2
    steps = sorted({ruling.step for ruling in _of(run, rank)})
    parts = [_chart(rank, key, choice, span, columns, rows) for key in keys]
    for row in zip(*parts, strict=True):
        yield [piece for part in row for piece in (Piece(" "), *part, Piece(" "))]
    axis = _axis(span, columns, steps)
    yield [piece for _ in keys for piece in (Piece(" "), *axis, Piece(" "))]


def _chart(
    rank: WatchedRank, key: str, choice: Choice, span: StepRange, columns: int, rows: int
) -> list[Row]:
    """Its title, and as many ``rows`` of the curve."""
    curve, style = rank.curve(key), "loss" if key == choice.curve else "norm"
    drawn: Drawn | None = None
    if curve is not None:
        drawn = braille(curve.points(), span, columns, rows, log=choice.is_log)
    if curve is None or drawn is None:
        blank: list[Row] = [[Piece(" " * columns)] for _ in range(rows)]
        return [fitted([Piece(f"{key}: no value", "dim")], columns, pad=True), *blank]
    total = curve.total
    told = f" {total.first:.3g} → {total.last:.3g}"
    extremes = f"  [{drawn.low:.2g}, {drawn.high:.2g}]{' log' if choice.is_log else ''}"
    title = [Piece(printable(key), "title"), Piece(told, style)]
    if len(key) + len(told) + len(extremes) <= columns:
        title.append(Piece(extremes, "dim"))
    return [
        fitted(title, columns, pad=True),
        *([Piece(line, style)] for line in drawn.lines),
    ]


def _axis(span: StepRange, columns: int, decided: Sequence[int]) -> Row:
    """The first and the last step, and between them where something was decided."""
    marks = {span.column_of(step, columns) for step in decided if step >= span.first}
    left, right = f"{span.first:,}", f"{span.last:,}"
    pieces: Row = []
    for column in range(columns):
        edge = right[column - columns :] if column >= columns - len(right) else ""
        if column in marks:
            pieces.append(Piece("▲", "warn"))
        elif column < len(left):
            pieces.append(Piece(left[column], "dim"))
        else:
            pieces.append(Piece(edge[:1] or " ", "dim"))
    return _joined(pieces)


def _joined(pieces: Row) -> Row:
    """Neighbours of one style as one piece."""
    row: Row = []
    for piece in pieces:
        if row and row[-1].style == piece.style:
            row[-1] = Piece(row[-1].text + piece.text, piece.style)
        else:
            row.append(piece)
    return row


def _phases(rank: WatchedRank, span: StepRange, width: int) -> Iterator[Row]:
    """Step time and its parts, a row each: how each went, and what it took on average."""
    columns = min(max(width - 36, 8), 120)
    latency = rank.curve("step_latency_ms")
    if latency is None:
        return
    whole = _mean(means(latency.points(), span, columns))
    for key, name in {"step_latency_ms": "step time", **PHASES}.items():
        curve = rank.curve(key)
        if curve is None:
            continue
        values = means(curve.points(), span, columns)
        mean = _mean(values)
        if mean is None:
            continue
        share = f"{mean / whole:4.0%}" if whole and key in PHASES else "    "
        yield [
            Piece(f" {name:10}", "title" if key not in PHASES else ""),
            Piece(f"{sparkline(filled(values), 0.0):{columns}}", key),
            Piece(f" {_figure(mean):>9} ms {share}"),
        ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _seed_row(seed: WatchedSeed, width: int) -> Row:
    stage, since = seed.stages[-1]
    style = {"FOSSILIZED": "good", "BLENDING": "warn", "CULLED": "alarm"}.get(stage.name, "")
    past = " → ".join(f"{each.name.lower()} {at:,}" for each, at in seed.stages[-4:])
    blended = 0 if seed.is_gone else round(8 * min(max(seed.alpha, 0.0), 1.0))
    return [
        Piece(" seed ", "dim"),
        *fitted([Piece(printable(seed.name))], 18, pad=True),
        Piece(f" {'culled' if seed.is_gone else stage.name.lower():13}", style),
        Piece(f"{seed.alpha:.2f} {'█' * blended:8} ", "good"),
        Piece(past if width >= SMALLEST else f"since {since:,}", "dim"),
    ]


def _rank_rows(run: WatchedRun, chosen: WatchedRank) -> Iterator[Row]:
    order = sorted(run.ranks.values(), key=lambda each: (each is not chosen, each.rank))
    slowest = max(run.ranks.values(), key=lambda each: each.newest("step_latency_ms") or 0.0)
    for rank in order:
        loss, latency = rank.newest("loss"), rank.newest("step_latency_ms")
        yield [
            Piece(f" {'▸' if rank is chosen else ' '}rank {rank.rank:<5} step {rank.step:>9,}"),
            Piece(f"  loss {'' if loss is None else f'{loss:.4g}':8}", "loss"),
            Piece(
                f" {'' if latency is None else _figure(latency):>8} ms",
                "warn" if rank is slowest and latency else "",
            ),
            _state(rank),
        ]


def _of(run: WatchedRun, rank: WatchedRank) -> list[Ruling]:
    return [ruling for ruling in run.rulings if ruling.rank == rank.rank]


def _decisions(run: WatchedRun, rank: WatchedRank) -> Iterator[Row]:
    """The newest first; those that are the same at step after step are one row."""
    rulings = _of(run, rank)
    yield [
        Piece(" decisions and notices", "title"),
        Piece(f" {run.decided:,} so far" if run.decided else " none so far", "dim"),
    ]
    groups: list[list[Ruling]] = []
    for ruling in reversed(rulings):
        if groups and _are_alike(groups[-1][-1], ruling):
            groups[-1].append(ruling)
        else:
            groups.append([ruling])
    for group in groups:
        newest, oldest = group[0], group[-1]
        steps = f"{newest.step:,}"
        if oldest.step != newest.step:
            steps = f"{oldest.step:,}-{newest.step:,}"
        action = "UPDATE" if newest.of_update else newest.action
        seen = [f.values for f in newest.findings if f.rule == newest.reason][:1]
        values = ", ".join(f"{key} {v:.4g}" for each in seen for key, v in each.items())
        yield [
            Piece(f" {steps:>11} "),
            Piece(
                f"{action if action != CONTINUE else 'notice':9} ", _ACTIONS.get(action, "warn")
            ),
            Piece(printable(_about(newest)), "title"),
            Piece(f" ×{len(group)}" if len(group) > 1 else ""),
            Piece(f" {_done(newest)} {printable(values)}", "dim"),
        ]


def _about(ruling: Ruling) -> str:
    """The rule that won; of a seed operation also that."""
    if ruling.seed_operation is None:
        return ruling.reason
    words = (ruling.seed_operation, ruling.target_seed or "", ruling.reason)
    return " ".join(filter(None, words))


def _are_alike(one: Ruling, other: Ruling) -> bool:
    """Whether two decisions about steps that follow each other are the same."""
    return (
        one.step - other.step in (0, 1)
        and one.of_update == other.of_update
        and (one.action, _about(one)) == (other.action, _about(other))
    )


def _done(ruling: Ruling) -> str:
    if ruling.action == CONTINUE:
        return ""
    if ruling.applied is not None:
        return "applied" if ruling.applied else "not applied"
    return "reported" if ruling.mode == "advise" else ""


def _all_runs(
    runs: Sequence[WatchedRun], chosen: WatchedRun, width: int, height: int
) -> Iterator[Row]:
    """A row for each run, the one that was heard of last first."""
    name, curve = max(width - 61, 12), 12
    columns = f"{'ranks':>5} {'step':>9} {'loss':>{curve + 9}} {'ms':>7}"
    yield [Piece(f"  {f'{len(runs)} runs':{name}} {columns}", "title")]
    for run in [*reversed(runs)][: height - 1]:
        rank = run.lead
        if rank is None:
            continue
        loss, latency = rank.newest("loss"), rank.newest("step_latency_ms")
        curve_of = rank.curve("loss")
        line = ""
        if curve_of is not None and rank.trainers:
            whole = StepRange(rank.trainers[0].steps()[1], rank.step)
            line = sparkline(filled(means(curve_of.points(), whole, curve)))
        yield [
            Piece(" ▸" if run is chosen else "  "),
            *fitted([Piece(printable(run.name) or "(no run id)", "title")], name, pad=True),
            Piece(f" {len(run.ranks):>5} {rank.step:>9,} "),
            Piece(f"{line:{curve}}{'' if loss is None else f'{loss:.4g}':>9}", "loss"),
            Piece(f" {'' if latency is None else _figure(latency):>7}"),
            _state(rank),
        ]

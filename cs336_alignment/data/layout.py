"""Which format the rows of a source have, and which column plays which role in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice

from cs336_alignment.config import SourceConfig
from cs336_alignment.data.choices import lettered_columns
from cs336_alignment.data.row import Row
from cs336_alignment.errors import MAX_SHOWN, Place, UserError, UserErrors

# For each format its roles, and for each role the columns that can play it. The first format of
# which every required role is there is the one, unless another is there too.
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",)},
    "sharegpt": {"conversations": ("conversations", "conversation")},
    "prompt_response": {
        "prompt": ("prompt",),
        "response": ("response", "completion", "output", "answer"),
    },
    "question_answer": {"question": ("question",), "response": ("answer", "response", "output")},
    "alpaca": {"instruction": ("instruction",), "response": ("output", "response", "answer")},
    "math": {"problem": ("problem",), "solution": ("solution",)},
    "multiple_choice": {
        "question": ("question",),
        "choices": ("choices", "options"),  # or a column for each, `lettered_columns`
        "answer": ("answer",),
    },
    "tokens": {"input_ids": ("input_ids",), "labels": ("labels", "response_mask")},
    "text": {"text": ("text",)},
}
OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"tools": ("tools",)},
    "sharegpt": {"tools": ("tools",), "system": ("system",)},
    "prompt_response": {"tools": ("tools",)},
    "alpaca": {"input": ("input", "context")},
    "math": {"ground_truth": ("ground_truth", "answer")},
}
ASKING = ("question_answer", "alpaca", "math", "multiple_choice")  # they fill a template
ANYWHERE = {"weight": ("weight",), "ground_truth": ("ground_truth",)}
ROWS_TO_DETECT = 100
MOST_UNREADABLE = 10_000  # rows before the first that can be read


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read.

    Attributes:
        format: its name.
        columns: role → column.
        reason: why, in words.
        ignored: columns that play no role.
        late: roles that the first row does not have and a later one may: its column is read there.
        lettered: the columns of single choices; `columns` names the first of them.
    """

    format: str
    columns: Mapping[str, str]
    reason: str
    ignored: tuple[str, ...]
    late: frozenset[str] = frozenset()
    lettered: tuple[str, ...] = ()

    def __str__(self) -> str:
        last = {"choices": f" to `{self.lettered[-1]}`"} if self.lettered else {}
        roles = ", ".join(
            role if role == column else f"{role} from `{column}`{last.get(role, '')}"
            for role, column in self.columns.items()
            if role not in self.late
        )
        ignored = f"; ignored: {', '.join(self.ignored)}" if self.ignored else ""
        return f"{self.format} ({roles}), {self.reason}{ignored}"


def detect(
    present: Sequence[str], place: Place, *, wanted: str, columns: Mapping[str, str]
) -> Layout:
    """Choose the format of rows with these columns.

    Text alone is a format of last resort: many data sets repeat the whole example in a `text`
    column.

    Args:
        present: columns of the first row.
        place: of that row.
        wanted: a format, or `auto`.
        columns: role → column, as the user maps them; "": no column plays this role.

    Raises:
        UserError: none fits, several do, or several columns can play one role (65); a mapped column
            is not there (78).
    """
    for role, column in columns.items():
        if column and column not in present:
            raise UserError(
                "C120",
                f"data.columns maps {role} to `{column}`, and there is no such column",
                place=place,
                got=f"columns {', '.join(present) or 'none'}",
            )
    names: Iterable[str] = FORMATS if wanted == "auto" else (wanted,)
    fitting = [n for n in names if len(_choices(FORMATS[n], present, columns)) == len(FORMATS[n])]
    if len(fitting) > 1 and "text" in fitting:
        fitting.remove("text")
    if "multiple_choice" in fitting and "question_answer" in fitting:
        fitting.remove("question_answer")  # whose columns are among those of the other
    if not fitting:
        raise _none_fits(present, place, wanted)
    if len(fitting) > 1:
        raise UserError(
            "D209",
            f"the rows fit several formats: {', '.join(fitting)}",
            place=place,
            got=f"columns {', '.join(present)}",
            hint=f"choose: data.format={fitting[0]}, or map a column: data.columns.response=…",
        )
    name = fitting[0]
    roles = FORMATS[name] | _optional(name)
    chosen = {}
    for role, choices in _choices(roles, present, columns).items():
        if len(choices) > 1:
            raise UserError(
                "D210",
                f"several columns can be the {role}: {', '.join(choices)}",
                place=place,
                hint=f"choose: data.columns.{role}={choices[0]}",
            )
        chosen[role] = choices[0]
    reason = "as data.format says" if wanted != "auto" else "seen from the columns of the first row"
    lettered: tuple[str, ...] = ()
    if "choices" in chosen and chosen["choices"] in (own := lettered_columns(present)):
        lettered = own
    ignored = tuple(c for c in present if c not in (*chosen.values(), *lettered))
    late = {
        role: aliases[0]
        for role, aliases in _optional(name).items()
        if role not in (*chosen, *columns)
        and aliases[0] not in (*columns.values(), *chosen.values())
    }
    return Layout(name, {**chosen, **late}, reason, ignored, frozenset(late), lettered)


def _optional(name: str) -> dict[str, tuple[str, ...]]:
    """Give the roles that rows of a format may have and need not."""
    return {**ANYWHERE, **OPTIONAL.get(name, {})}


def _choices(
    roles: Mapping[str, tuple[str, ...]], present: Sequence[str], columns: Mapping[str, str]
) -> dict[str, list[str]]:
    """For each role that has some the columns that can play it."""
    found = {}
    for role, aliases in roles.items():
        given = [columns[role]] if columns.get(role) else []
        mapped = given if role in columns else [a for a in aliases if a in present]
        if role == "choices" and role not in columns and not mapped:
            mapped = list(lettered_columns(present)[:1])
        # A column that the user gave another role cannot play this one.
        free = [c for c in mapped if role in columns or c not in columns.values()]
        if free:
            found[role] = free
    return found


def _none_fits(present: Sequence[str], place: Place, wanted: str) -> UserError:
    table = FORMATS if wanted == "auto" else {wanted: FORMATS[wanted]}
    expected = "; ".join(
        f"{name}: " + " + ".join("|".join(aliases) for aliases in roles.values())
        for name, roles in table.items()
    )
    return UserError(
        "D202",
        "a field is missing" if wanted != "auto" else "the columns fit no format",
        place=place,
        expected=expected,
        got=f"columns {', '.join(present) or 'none'}",
        hint="map your columns: data.columns.prompt=COLUMN data.columns.response=COLUMN",
    )


def detect_layout(
    rows: Iterable[Row | UserError], source: SourceConfig, path: str
) -> tuple[Layout, Iterator[Row | UserError]]:
    """Find the layout of the first row that has one; the rows come back whole."""
    rows = iter(rows)
    head = list(islice(rows, ROWS_TO_DETECT))
    is_read = any(isinstance(row, Row) for row in head)
    while not is_read and 0 < len(head) < MOST_UNREADABLE and (row := next(rows, None)):
        head.append(row)
        is_read = isinstance(row, Row)
    columns = {role: name for role, name in asdict(source.columns).items() if name is not None}
    first: UserError | None = None
    for row in head:
        if isinstance(row, UserError):
            continue
        try:
            layout = detect(list(row.fields), row.place, wanted=source.format, columns=columns)
        except UserError as error:
            if error.code in ("D209", "D210"):  # several readings: the next row does not settle it
                raise
            first = first or error
        else:
            return layout, chain(head, rows)
    if not is_read and head:
        errors = [row for row in head if isinstance(row, UserError)]
        if next(rows, None) is not None:
            raise UserErrors(errors[:MAX_SHOWN], len(errors))
        layout = Layout("text", {}, "no row could be read", ())  # the errors are what is told
        return layout, iter(head)
    raise first or UserError("D301", f"there is no row in {path}")

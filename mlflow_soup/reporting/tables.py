"""Write a table as Markdown for a page, as text for a terminal, or as CSV for a program.

People get four decimals, and the best numbers of a column are marked. Numbers that look equal in
four decimals count as equal. Programs get every digit.
"""

import io
import math
import re
from csv import writer

from mlflow_soup.records import Cell, Table


def best(table: Table) -> set[tuple[int, int]]:
    """The (row, column) of every best number of its group, compared to four decimals."""
    key = table.columns.index(table.group) if table.group else None
    groups: dict[Cell, list[int]] = {}
    for number, row in enumerate(table.rows):
        groups.setdefault(None if key is None else row[key], []).append(number)
    found = set()
    for name, larger in table.best.items():
        column = table.columns.index(name)
        for members in groups.values():
            cells = {number: table.rows[number][column] for number in members}
            values = {
                number: round(cell, 4)
                for number, cell in cells.items()
                if isinstance(cell, int | float) and not math.isnan(cell)
            }
            if values:
                top = max(values.values()) if larger else min(values.values())
                found |= {(number, column) for number, value in values.items() if value == top}
    return found


def markdown(table: Table) -> str:
    """The table in Markdown, with the best numbers in bold and numbers aligned to the right."""
    head, body = _shown(table)
    bold = best(table)
    rows = [
        [f"**{cell}**" if (i, j) in bold else _escaped(cell) for j, cell in enumerate(row)]
        for i, row in enumerate(body)
    ]
    rule = ["---:" if numeric else "---" for numeric in _numeric(table)]
    lines = [[_escaped(name) for name in head], rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(table: Table) -> str:
    """The table in aligned columns, with a `*` after the best and numbers aligned to the right."""
    head, body = _shown(table)
    stars = best(table)
    columns = []
    for j, (name, numeric) in enumerate(zip(head, _numeric(table), strict=True)):
        cells = [name, *(row[j] for row in body)]
        if table.columns[j] in table.best:  # -1: the head counts as row -1, which has no star
            cells = [cell + " *"[(i, j) in stars] for i, cell in enumerate(cells, -1)]
        width = max(len(cell) for cell in cells)
        columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def csv(table: Table) -> str:
    """The table as CSV: `float` of a cell gives the exact number, an empty cell is None."""
    out = io.StringIO()
    lines = writer(out, lineterminator="\n")
    lines.writerow(table.columns)
    lines.writerows(table.rows)
    return out.getvalue()


def _shown(table: Table) -> tuple[list[str], list[list[str]]]:
    """The column names and rows as people read them, each cell on one line."""
    signs = ["+" if name.startswith(("Δ", "gain")) else "" for name in table.columns]
    rows = [[_words(*pair) for pair in zip(row, signs, strict=True)] for row in table.rows]
    return [_words(name, "") for name in table.columns], rows


def _words(cell: Cell, sign: str) -> str:
    if isinstance(cell, float):
        return format(cell, f"{sign}z.4f")  # z: a number that rounds to zero gets no minus sign
    if isinstance(cell, int):
        return format(cell, f"{sign}d")
    return " ".join((cell or "").split())


def _escaped(words: str) -> str:
    return re.sub(r"([\\|*<`])", r"\\\1", words)


def _numeric(table: Table) -> list[bool]:
    """For each column, True if it holds numbers and no text."""
    columns = [[row[j] for row in table.rows] for j in range(len(table.columns))]
    return [
        any(c is not None for c in cells) and not any(isinstance(c, str) for c in cells)
        for cells in columns
    ]

"""What a search answers: plain values, which print as a table and show as one in a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

INDEXED, FAILED = "indexed", "failed"
COLUMNS = ("video", "from", "to", "score", "level")


@dataclass(frozen=True)
class Video:
    """One file that an index knows.

    Attributes:
        id: opaque, safe in a URL; the same for a file of the same content, wherever it is.
        path: absolute.
        name: its path below the folder that was indexed.
        size: bytes.
        mtime: when it was last changed, in seconds since 1970.
        duration: seconds; 0 if it failed.
        status: "indexed", or "failed" for the `reason`.
    """

    id: str
    path: str
    name: str
    size: int
    mtime: float
    duration: float
    status: str = INDEXED
    reason: str = ""


@dataclass(frozen=True)
class Moment:
    """One event of a video: seconds from its start, its cosine with the query, and its level in the
    pyramid, 0 for the shortest events."""

    start: float
    end: float
    score: float
    level: int


@dataclass(frozen=True)
class Hit:
    """A video with its best moments, best first; by moments each hit has one."""

    video: Video
    score: float
    moments: list[Moment]


@dataclass(frozen=True)
class Results:
    """The hits of a query, best first.

    Attributes:
        seconds: that the search took.
        version: of the index that was searched.
    """

    query: str
    seconds: float
    version: int
    hits: list[Hit] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self):
        return iter(self.hits)

    def __getitem__(self, place):
        return self.hits[place]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Of every hit its moments: name, from, to, score, level."""
        moments = ((hit.video.name, moment) for hit in self.hits for moment in hit.moments)
        return [
            (printable(name), clock(m.start), clock(m.end), f"{m.score:.3f}", str(m.level))
            for name, m in moments
        ]

    def __repr__(self) -> str:
        rows = [COLUMNS, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        return "\n".join([self._title(), *(lines if self.hits else ["nothing found"])])

    def _repr_html_(self) -> str:
        head, *body = (
            "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            for tag, row in [("th", COLUMNS), *(("td", row) for row in self.rows())]
        )
        rows = "".join(f"<tr>{row}</tr>" for row in [head, *body])
        return f"<p>{escape(self._title())}</p><table>{rows}</table>"

    def _title(self) -> str:
        return f"{self.query!r}: {len(self.hits)} in {self.seconds * 1000:.0f} ms"


def clock(seconds: float) -> str:
    """0:07.5, 1:02:03.0."""
    tenths = round(seconds * 10)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    tail = f"{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def printable(name: str) -> str:
    """A file's name on one line: what no terminal should interpret is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)

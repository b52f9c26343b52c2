"""A report in full: a line for every key of the checkpoint and for every array that is drawn."""

from collections.abc import Iterable

from .report import Report

HEADINGS = ("checkpoint key", "becomes", "by", "shape", "dtype", "bytes")
Row = tuple[str, ...]


def listing(report: Report) -> str:
    """Each key -> tree path -> operation -> shape, dtype and bytes, in the file's order; then the memory it takes."""
    place = {key: i for i, key in enumerate(report.tensors)}
    known = sorted([*_read(report), *_others(report)], key=lambda row: place.get(row[0], len(place)))
    rows = [HEADINGS, *known, *_new(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    line = lambda row: "  ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])]).rstrip()
    return "\n".join([*map(line, rows), _memory(report)])


def _read(report: Report) -> Iterable[Row]:
    for link in report.links:
        by = "as it is" if link.op.name == "same" else link.op.name
        for number, keys in enumerate(link.theirs):
            paths = ", ".join(f"{path}[{number}]" if link.sizes else path for path in link.ours)
            yield from (_row(report, report.spelled.get(key, key), paths, by) for key in keys)


def _others(report: Report) -> Iterable[Row]:
    for key, owner in report.tied.items():
        yield _row(report, key, f"= {owner}", "tied")
    for kind in ("ignored", "dropped"):
        yield from (_row(report, key, f"nothing: {why}", kind) for key, why in getattr(report, kind).items())
    for key, near in report.unexpected.items():
        yield _row(report, key, f"nothing{near}", "UNEXPECTED")


def _new(report: Report) -> Iterable[Row]:
    for path, shape in report.new.items():
        yield "", path, "drawn", str(list(shape)), "", ""


def _row(report: Report, key: str, becomes: str, by: str) -> Row:
    if key not in report.tensors:
        return key, becomes, "MISSING", "", "", ""
    dtype, shape, size = report.tensors[key]
    return key, becomes, "MISMATCHED" if key in report.mismatched else by, str(list(shape)), dtype, f"{size:,}"


def _memory(report: Report) -> str:
    held, more = (f"{size / 1e6:,.1f} MB" for size in report.memory)
    return (
        f"{report.num_read / 1e6:,.1f} MB are read. The model takes {held}; while it is read, at most {more} more,"
        " where tensors are cast, transposed or sent to another device."
    )

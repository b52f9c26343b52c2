"""Single lines of Python: whether one could stand in a program, and what kind of line it is."""

import importlib
import re
import warnings
from collections.abc import Callable

from ._options import WrongUsage

# Where a line may stand: at the top, in a loop of a function, and after what some statements continue.
FRAMES = (
    "{0}",
    "async def f():\n while 1:\n  {0}",
    "if 1: pass\n{0}",
    "try: pass\n{0}",
    "try: pass\nexcept A: pass\n{0}",
    "match x:\n {0}",
)
# What it may need behind it: nothing, the body of a header, or what a decorator is put on.
TAILS = ("", "\n{0} pass", "\n{0}def f(): pass")
INDENTS = {frame: " " * (len(head := frame.partition("{0}")[0]) - len(head.rstrip(" "))) for frame in FRAMES}
PLACES = [(frame, tail.format(INDENTS[frame])) for frame in FRAMES for tail in TAILS]
KINDS = (
    ("comment", r"#"),
    ("import", r"(import|from)\b"),
    ("def, class", r"(async\s+def|def|class)\b|@"),
    ("return, raise", r"(return|yield|raise)\b"),
    ("if, for, with", r"(if|elif|else|for|while|with|try|except|finally|async|match|case)\b"),
    ("assignment", r"[\w.\[\]'\", *]+?\s*([-+*/|&^%]|//|\*\*|<<|>>)?=(?!=)"),
    ("call", r"(await\s+)?[\w.]+\(.*\)$"),
)


def checker(spelled: str) -> Callable[[str], bool]:
    """What `--check` names: "python" is `could_stand`, MODULE:FUNCTION a function of a text that says if it is valid.

    Raises a `WrongUsage` where there is no such function.
    """
    if spelled == "python":
        return could_stand
    module, _, name = spelled.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise WrongUsage(
            f"--check {spelled} is neither 'python' nor MODULE:FUNCTION that can be imported: {error}."
        ) from error
    if not callable(found):
        raise WrongUsage(f"--check {spelled} names a {type(found).__name__}, which is no function of a text.")
    return lambda text: bool(found(text))


def could_stand(line: str) -> bool:
    """Whether `compile` takes a line, without its indent, somewhere: in a function, a loop, after an `if` or a `try`.

    What a header or a decorator needs is put behind it. Lines of statements that go over several are not valid.
    Nothing is run.
    """
    line = line.strip()
    return bool(line) and any(_compiles(frame.format(line + tail)) for frame, tail in PLACES)


def kind_of(line: str) -> str:
    """One of a few kinds, told by how the line begins; "other" for what continues one before it."""
    return next((kind for kind, pattern in KINDS if re.match(pattern, line)), "other")


def _compiles(source: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes and comparisons, which are valid
        try:
            compile(source, "<line>", "exec")
        except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
            return False
    return True

"""A reader of pickles that cannot do anything: a stack machine which imports nothing and calls only what it is given.

`pickletools.genops` splits a pickle into opcodes without running them. The machine here keeps the stack and the memo,
builds plain containers itself, and looks every other name up in a table of its caller. Python's own unpickler would
import the module that a file names and call what it finds there; here a name that is not in the table is an error.
Pickle's format: `pickletools.dis` and the comments in CPython's Lib/pickletools.py.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from .errors import ConversionError, MalformedCheckpoint, UnsafeCheckpoint

# A pickle of arrays takes some 50 opcodes and a few hundred bytes an array. A hostile one could take all memory: each
# opcode adds at most one object, so the first bound also bounds the stack, the memo and the length of every container.
# What a handler makes must be small, or bounded by the handler: its arguments may come from the memo, again and again.
MAX_OPCODES = 2_000_000
MAX_ARGUMENT = 1 << 20  # bytes of one string or number
MAX_BYTES = 1 << 26  # bytes of the opcodes and their arguments, without what a handler reads in between
MAX_NAME = 1000  # characters of a global's name, where the pickle composes it
NEWEST_PROTOCOL = 5

# What pickletools and a handler raise when a file makes no sense. A Warning: pytest and `-W error` raise those, and
# a string of protocol 0 with a wrong escape is one. OSError: the stream.
FAULTS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    OSError,
    MemoryError,
    RecursionError,
    Warning,
)


@dataclass(frozen=True)
class Name:
    """What a pickle calls a global, as text: nothing was imported."""

    path: str

    def __str__(self) -> str:
        return _short(self.path)


def read(
    stream: io.BufferedIOBase,
    build: Mapping[str, Callable[..., Any]],
    built: Callable[[Any, Any], Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    advice: str = "",
    steps: "Mapping[str, Callable[[_Machine, Any], object]] | None" = None,
) -> Any:
    """The value of the pickle that starts where `stream` stands; the stream is left after its STOP.

    - `build["module.attribute"](*arguments)` makes the value where the pickle calls that global (REDUCE, NEWOBJ).
      An uncalled global stays a `Name`.
    - `built(value, state)` gives what takes `value`'s place on the stack where the pickle sets a state (BUILD). The
      memo keeps `value` itself, so a value that the pickle uses again must be changed in place. `built` may read
      from `stream`, which then stands right after the opcode.
    - `persistent(id)` gives the value of a persistent id (PERSID, BINPERSID).
    - `advice` ends the message of a refusal: what is read, and what to do.
    - `steps` is what each opcode does, `STEPS` if not given; an opcode that is not in it is refused.

    Keys of dictionaries are strings, each once; sets, buffers and extension codes are refused.

    Raises `UnsafeCheckpoint` for a global or an opcode that is not allowed, `MalformedCheckpoint` for anything that is
    not a whole pickle or goes beyond the bounds above. No other exception leaves, unless a handler raises one that is
    not in `FAULTS`.
    """
    machine = _Machine(build, built, persistent, advice, STEPS if steps is None else steps)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], _Bounded(stream)))):
            if count == MAX_OPCODES:
                raise MalformedCheckpoint(f"The pickle has more than {MAX_OPCODES} opcodes: too many for a checkpoint.")
            machine.step(opcode.name, argument)
        return machine.result()
    except ConversionError:
        raise
    except FAULTS as error:
        raise _malformed(str(error).removeprefix("at position <unknown>, ") or type(error).__name__) from error


class _Bounded:
    """The stream as pickletools reads it: neither one argument nor the sum of them beyond the bounds."""

    def __init__(self, stream: io.BufferedIOBase):
        self._stream, self._left = stream, MAX_BYTES

    def read(self, size: int) -> bytes:
        self._take(size)
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(MAX_ARGUMENT + 1)
        self._take(len(line))
        return line

    def _take(self, size: int) -> None:
        self._left -= size
        if size > MAX_ARGUMENT or self._left < 0:
            what = f"an item of {size} bytes" if size > MAX_ARGUMENT else f"more than {MAX_BYTES} bytes beside arrays"
            raise MalformedCheckpoint(f"The pickle holds {what}: too much for a checkpoint, or the file is damaged.")


class _Machine:
    """The stack, the memo and the heights at which marks lie."""

    def __init__(
        self,
        build: Mapping[str, Callable[..., Any]],
        built: Callable[[Any, Any], Any] | None,
        persistent: Callable[[Any], Any] | None,
        advice: str,
        steps: "Mapping[str, Callable[[_Machine, Any], object]]",
    ):
        self.build, self.built, self.persistent, self.advice = build, built, persistent, advice
        self.steps = steps
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in self.steps:
            self.steps[opcode](self, argument)
        else:
            what = f"{opcode} of {_short(argument)}" if isinstance(argument, str) else opcode
            raise self.refusal(f"uses the opcode {what}")

    def result(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise _malformed(f"it ends with {len(self.stack)} values instead of one")
        return self.stack[0]

    def refusal(self, does: str) -> UnsafeCheckpoint:
        text = f"The pickle {does}, which was refused; nothing that the file names was imported or run."
        return UnsafeCheckpoint(f"{text} {self.advice}".rstrip())

    def floor(self) -> int:
        return self.marks[-1] if self.marks else 0

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= self.floor():
            raise _malformed("an opcode takes a value from an empty stack")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise _malformed("an opcode takes values since a mark, but there is none")
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def take(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def replace(self, count: int, make: Callable[..., Any]) -> None:
        self.stack.append(make(*self.take(count)))

    def call(self, what: Any, arguments: Any) -> Any:
        if not isinstance(what, Name) or not isinstance(arguments, tuple):
            raise _malformed(f"it calls {_kind(what)} with {_kind(arguments)}")
        if what.path in NEW and len(arguments) == 3 and isinstance(arguments[0], Name) and arguments[2] is None:
            what, arguments = arguments[0], ()
        if what.path not in self.build:
            raise self.refusal(f"would call {what}")
        return self.build[what.path](*arguments)

    def set_state(self, value: Any, state: Any) -> Any:
        if isinstance(value, Name) or self.built is None:
            raise self.refusal(f"would change {value if isinstance(value, Name) else _kind(value)}")
        return self.built(value, state)

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise _malformed(f"it uses the value of memo {_short(str(index))} before there is one")
        self.stack.append(self.memo[index])

    def pop_one(self) -> None:
        if self.marks and len(self.stack) == self.marks[-1]:
            self.marks.pop()
        else:
            self.pop()

    def resolve(self, key: Any) -> Any:
        if self.persistent is None:
            raise self.refusal("refers to an object outside it (a persistent id)")
        return self.persistent(key)


def _start(machine: _Machine, protocol: int) -> None:
    if protocol > NEWEST_PROTOCOL:
        raise _malformed(f"its protocol is {protocol}; {NEWEST_PROTOCOL} is the newest that is read")


def _put(memo: dict[int, Any], index: int, value: Any) -> None:
    if index < 0:
        raise _malformed("it writes to a negative place of the memo")
    memo[index] = value


def _extend(values: list[Any], target: Any) -> None:
    if type(target) is not list:
        raise _malformed(f"it appends to {_kind(target)}")
    target.extend(values)


def _update(values: list[Any], target: Any) -> dict[str, Any]:
    """`values` are key, value, key, value."""
    if not isinstance(target, dict) or len(values) % 2:
        raise _malformed(f"it sets items of {_kind(target)} from {len(values)} values")
    for key, value in zip(values[::2], values[1::2], strict=True):
        # The hash of a deeply nested tuple overflows C's stack, and integers can be chosen to collide.
        if not isinstance(key, str):
            raise MalformedCheckpoint(f"A dictionary of the pickle has {_kind(key)} as a key; keys must be strings.")
        if key in target:
            raise _malformed(f"a dictionary has the key {_short(key)} twice")
        target[key] = value
    return target


def _named(module: Any, attribute: Any) -> Name:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise _malformed(f"it names a global by {_kind(module)} and {_kind(attribute)}")
    # Two long strings of the memo could make a longer one with each opcode.
    if len(module) + len(attribute) > MAX_NAME:
        raise _malformed(f"it names a global by more than {MAX_NAME} characters")
    return Name(f"{module}.{attribute}")


def _malformed(why: str) -> MalformedCheckpoint:
    why = why if len(why) < 200 else why[:200] + "…"
    return MalformedCheckpoint(f"It is no pickle, or damaged or cut off: {why}. Fetch it, or save it, again.")


def _kind(value: Any) -> str:
    return f"the global {value}" if isinstance(value, Name) else f"a value of type {type(value).__name__}"


def _short(text: str) -> str:
    """For messages: a hostile name may be long, or hold line breaks."""
    return text if len(text) < 100 and text.isprintable() else repr(text[:80])


# Protocols 0 and 1 spell NEWOBJ as this call with (class, object, None).
NEW = {"copy_reg._reconstructor", "copyreg._reconstructor"}

# The value is the argument, as pickletools decodes it.
PUSHED = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
PUSHED |= {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
PUSHED |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}

STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(PUSHED, lambda m, value: m.stack.append(value)),
    "PROTO": _start,
    "FRAME": lambda m, size: None,  # read on as if frames were not there: pickletools takes single bytes
    "STOP": lambda m, _: None,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop_one(),
    "POP_MARK": lambda m, _: m.pop_to_mark().clear(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    "LIST": lambda m, _: m.stack.append(m.pop_to_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_to_mark())),
    "DICT": lambda m, _: m.stack.append(_update(m.pop_to_mark(), {})),
    "TUPLE1": lambda m, _: m.replace(1, lambda *values: values),
    "TUPLE2": lambda m, _: m.replace(2, lambda *values: values),
    "TUPLE3": lambda m, _: m.replace(3, lambda *values: values),
    "APPEND": lambda m, _: _extend([m.pop()], m.top()),
    "APPENDS": lambda m, _: _extend(m.pop_to_mark(), m.top()),
    "SETITEM": lambda m, _: _update(m.take(2), m.top()),
    "SETITEMS": lambda m, _: _update(m.pop_to_mark(), m.top()),
    "GET": lambda m, index: m.recall(index),
    "BINGET": lambda m, index: m.recall(index),
    "LONG_BINGET": lambda m, index: m.recall(index),
    "PUT": lambda m, index: _put(m.memo, index, m.top()),
    "BINPUT": lambda m, index: _put(m.memo, index, m.top()),
    "LONG_BINPUT": lambda m, index: _put(m.memo, index, m.top()),
    "MEMOIZE": lambda m, _: _put(m.memo, len(m.memo), m.top()),
    "GLOBAL": lambda m, name: m.stack.append(Name(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda m, _: m.replace(2, _named),
    "REDUCE": lambda m, _: m.replace(2, m.call),
    "NEWOBJ": lambda m, _: m.replace(2, m.call),
    "BUILD": lambda m, _: m.replace(2, m.set_state),
    "PERSID": lambda m, key: m.stack.append(m.resolve(key)),
    "BINPERSID": lambda m, _: m.replace(1, m.resolve),
}

"""What the pickle of a `pytorch_model.bin` may build, and nothing else: of each tensor, where it lies.

Each tensor is a call (storage, offset, size, stride, …), and each storage a persistent id that names its dtype, its
length and its member of the archive, `data/KEY`. What torch.load(weights_only=True) refuses is refused here too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from eqx_transformers.tensor_file import Spec

from . import pickle_reader
from .errors import MalformedCheckpoint
from .pickle_reader import Name
from .torch_archive import AGAIN, Archive

MAX_DIMENSIONS, MAX_ATTRIBUTES = 8, 64
MAX_NUMBER = 1 << 60  # of sizes, strides and offsets
# Tensors may share their bytes, and a stride of 0 repeats them: a small file could declare more than memory holds.
MAX_RATIO, MAX_EXTRA = 16, 64 << 20

# torch's dtypes, as safetensors spells them (or would, for complex ones), and the bytes of an element.
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
    "complex32": ("C32", 4),
    "complex64": ("C64", 8),
    "complex128": ("C128", 16),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1),
}
STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}
CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
UNREAD = {
    "torch._utils._rebuild_qtensor": "a quantized tensor. Save it dequantized: tensor.dequantize()",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor. Save it dense: tensor.to_dense()",
    "torch._utils._rebuild_nested_tensor": "a nested tensor. Save its parts",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor of the device 'meta', which has no data. Save a model"
    " that has its weights",
}
# What a tensor of torch defines itself: setting one would change the tensor, or fail.
FIELDS = "H T data device dtype grad grad_dtype grad_fn imag is_cpu is_cuda is_ipu is_leaf is_maia is_meta is_mkldnn"
FIELDS += " is_mps is_mtia is_nested is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu itemsize layout mH mT"
FIELDS += (
    " name names nbytes ndim output_nr real requires_grad retains_grad shape volatile _backward_hooks _base _cdata"
)
FIELDS += " _grad _grad_fn _has_symbolic_sizes_strides _post_accumulate_grad_hooks _python_dispatch _version"
TAKEN = frozenset(FIELDS.split())
# The opcodes that torch's own restricted unpickler knows and a Python 3 writes. Protocol 2 has no others for tensors.
OPCODES = "PROTO STOP NONE NEWTRUE NEWFALSE EMPTY_LIST EMPTY_TUPLE EMPTY_DICT MARK TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND"
OPCODES += " APPENDS SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT REDUCE BUILD BINPERSID BININT BININT1"
OPCODES += " BININT2 LONG1 BINFLOAT BINUNICODE"


@dataclass(frozen=True)
class _Storage:
    """One storage as the pickle names it, and the bytes of its member."""

    dtype: str
    count: int
    start: int
    end: int


class _Ordered(dict):
    """An OrderedDict, the one kind of dictionary that may have a state."""

    def __init__(self):
        super().__init__()


class Tensors:
    """Makes a `Spec` of each tensor that the pickle builds."""

    def __init__(self, archive: Archive, size: int):
        self.archive, self.left, self.size = archive, MAX_RATIO * size + MAX_EXTRA, size
        self.storages: dict[str, _Storage] = {}
        self.rebuild: dict[str, Callable[..., Spec]] = {
            "torch._utils._rebuild_tensor": self.v1,
            "torch._utils._rebuild_tensor_v2": self.v2,
            "torch._utils._rebuild_tensor_v3": self.v3,
        }
        self.build: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": _ordered,
            "torch.Size": _size,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
            "torch._tensor._rebuild_from_type_v2": self.from_type,
            **self.rebuild,
        }

    def storage(self, key: Any) -> _Storage:
        """Of the persistent id ('storage', class, key, device, number of elements)."""
        if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage" or not isinstance(key[1], Name):
            raise damaged("it refers to something that is no storage")
        _, kind, name, device, count = key
        if not isinstance(name, str) or not (name.isascii() and name.isdigit()) or not isinstance(device, str):
            raise damaged("a storage's key is not a number, or its device not a text")
        if kind.path not in STORAGES or not _is_number(count):
            raise damaged(f"storage {name} has the class {kind} and {said(count)} elements")
        found = _Storage(STORAGES[kind.path], count, *self.archive.range(f"data/{name}"))
        _expect_whole(name, found)
        if self.storages.setdefault(name, found) != found:
            raise damaged(f"storage {name} is used with two dtypes or lengths")
        return found

    def v1(self, *of: Any) -> Spec:
        storage, *where = _arguments("a tensor", of, 4)
        return self.view(storage, None, *where)

    def v2(self, *of: Any) -> Spec:
        storage, offset, size, stride, grad, hooks, *metadata = _arguments("a tensor", of, 6, 7)
        return _flagged(self.view(storage, None, offset, size, stride), grad, hooks, *metadata)

    def v3(self, *of: Any) -> Spec:
        storage, offset, size, stride, grad, hooks, dtype, *metadata = _arguments("a tensor", of, 7, 8)
        if grad is not False:
            raise MalformedCheckpoint(
                f"A tensor of {said(dtype)} has requires_grad {said(grad)}: torch does not read that, even"
                " where it wrote it. Save it detached: tensor.detach()."
            )
        return _flagged(self.view(storage, _dtype(dtype), offset, size, stride), False, hooks, *metadata)

    def from_type(self, *of: Any) -> Spec:
        """A tensor with attributes."""
        make, kind, arguments, state = _arguments("a tensor with attributes", of, 4)
        if not isinstance(make, Name) or make.path not in self.rebuild or not isinstance(arguments, tuple):
            raise damaged(f"a tensor with attributes is made by {said(make)} of {said(arguments)}")
        if not isinstance(kind, Name) or kind.path not in CLASSES:
            raise damaged(f"a tensor has the class {said(kind)}")
        _expect_attributes(state)
        return self.rebuild[make.path](*arguments)

    def view(self, storage: Any, dtype: str | None, offset: Any, size: Any, stride: Any) -> Spec:
        if not isinstance(storage, _Storage):
            raise damaged(f"a tensor is made of {said(storage)}")
        name, width = DTYPES[dtype or storage.dtype]
        shape, strides = _numbers("size", size), _numbers("stride", stride)
        if not _is_number(offset) or len(shape) != len(strides):
            raise damaged(f"a tensor of size {shape} has the stride {strides} and the offset {said(offset)}")
        # Also of an empty tensor, whose other sizes NumPy multiplies.
        if prod(max(n, 1) for n in shape) * width > MAX_NUMBER:
            raise damaged(f"a tensor has the size {shape}")
        self.take(prod(shape) * width, shape)
        return _placed(storage, name, width, offset, shape, strides)

    def take(self, size: int, shape: tuple[int, ...]) -> None:
        self.left -= size
        if self.left < 0:
            raise MalformedCheckpoint(
                f"Its tensors, up to one of size {shape}, take over {MAX_RATIO} times the file's {self.size} bytes:"
                " it repeats its numbers, so that a small file would fill the memory. Save them with .contiguous()."
            )


def _expect_whole(name: str, storage: _Storage) -> None:
    expected, found = storage.count * DTYPES[storage.dtype][1], storage.end - storage.start
    if found != expected:
        raise damaged(f"storage {name} is declared with {expected} bytes, but its member has {found}")


def _placed(
    storage: _Storage, dtype: str, width: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Spec:
    """The bytes from the view's first element to its last, which must lie in the storage."""
    if 0 in shape:
        return Spec(shape, dtype, storage.start, storage.start)
    length = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    start = storage.start + offset * width
    if start + length * width > storage.end:
        raise damaged(
            f"a tensor of size {shape}, stride {strides} and offset {offset} reaches beyond the"
            f" {(storage.end - storage.start) // width} elements of its storage"
        )
    spec = Spec(shape, dtype, start, start + length * width)
    # The stride of an axis of one element says nothing, and may be any number.
    steps = tuple(step if n > 1 else 1 for n, step in zip(shape, strides, strict=True))
    return spec if _in_order(shape, steps) else replace(spec, strides=steps)


def _in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    axes = [(n, step) for n, step in zip(shape, strides, strict=True) if n > 1]
    return all(step == prod(n for n, _ in axes[i + 1 :]) for i, (_, step) in enumerate(axes))


def _parameter(*of: Any) -> Spec:
    tensor, grad, hooks = _arguments("a parameter", of, 3)
    if not isinstance(tensor, Spec):
        raise damaged(f"a parameter is made of {said(tensor)}")
    return _flagged(tensor, grad, hooks)


def _parameter_with_state(*of: Any) -> Spec:
    *parameter, state = _arguments("a parameter with attributes", of, 4)
    _expect_attributes(state)
    return _parameter(*parameter)


def _flagged(tensor: Spec, grad: Any, hooks: Any, metadata: Any = None) -> Spec:
    """The tensor, if what else is said of it changes nothing."""
    if type(grad) is not bool or (grad and not tensor.dtype.startswith(("F", "BF", "C"))):
        raise damaged(f"requires_grad of a tensor of {tensor.dtype} is {said(grad)}")
    if hooks is not None and (not isinstance(hooks, dict) or hooks):
        raise damaged("a tensor has hooks, which torch does not save")
    if metadata is not None and metadata != {}:
        raise MalformedCheckpoint(
            "A tensor is stored conjugated or negated (a lazy view), which is not read. Save it as it is seen:"
            " tensor.resolve_conj().resolve_neg()."
        )
    return tensor


def _expect_attributes(state: Any) -> None:
    """Of a tensor or parameter; they are not kept, but none may be what torch would act on."""
    if isinstance(state, tuple) and len(state) == 2 and state[1] in (None, {}):
        state = state[0]
    if state is not None and (not isinstance(state, dict) or len(state) > MAX_ATTRIBUTES):
        raise damaged(f"a tensor's attributes are {said(state)}, or more than {MAX_ATTRIBUTES}")
    for name in state or ():
        if name in TAKEN or name.startswith("__") or not name.isidentifier():
            raise damaged(f"a tensor's attribute {name[:80]!r} would be set")


def _arguments(what: str, of: tuple, *counts: int) -> tuple:
    if len(of) not in counts:
        raise damaged(f"{what} is made of {len(of)} values; torch writes {counts[-1]}")
    return of


def _ordered(*of: Any) -> _Ordered:
    _arguments("an OrderedDict", of, 0)
    return _Ordered()


def _size(*of: Any) -> tuple[int, ...]:
    return _numbers("size", *_arguments("a size", of, 1))


def _numbers(what: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS or not all(map(_is_number, value)):
        raise damaged(f"a tensor's {what} is not a tuple of at most {MAX_DIMENSIONS} whole numbers from 0 on")
    return value


def _is_number(n: Any) -> bool:
    return type(n) is int and 0 <= n < MAX_NUMBER


def _dtype(value: Any) -> str:
    name = value.path.removeprefix("torch.") if isinstance(value, Name) else ""
    if name not in DTYPES:
        raise damaged(f"a tensor's dtype is {said(value)}")
    return name


def built(value: Any, state: Any) -> Any:
    """The state of a state dict, the versions of its modules, is left out."""
    if not isinstance(value, _Ordered) or not isinstance(state, dict):
        raise damaged(f"a state is set on {said(value)}")
    return value


def _global(machine: Any, name: str) -> None:
    """torch refuses a name even where the pickle never calls it."""
    value = Name(name.replace(" ", ".", 1))
    if value.path in UNREAD:
        raise MalformedCheckpoint(f"It holds {UNREAD[value.path]}.")
    if value.path not in machine.build and value.path not in VALUES:
        raise machine.refusal(f"names {value}")
    machine.stack.append(value)


VALUES = {*STORAGES, *CLASSES, *(f"torch.{name}" for name in DTYPES)}
STEPS = {opcode: pickle_reader.STEPS[opcode] for opcode in OPCODES.split()} | {"GLOBAL": _global}


def said(value: Any) -> str:
    if isinstance(value, Name):
        return f"the global {value}"
    if isinstance(value, int | float | None):
        return repr(value)[:40]
    kinds = {_Ordered: "a dictionary", dict: "a dictionary", Spec: "a tensor", _Storage: "a bare storage"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def damaged(why: str) -> MalformedCheckpoint:
    return MalformedCheckpoint(f"Its data.pkl contradicts itself or the archive: {why[:300]}. {AGAIN}")

"""A `pytorch_model.bin` with something changed gives what torch reads, bit for bit, or one of our errors.

torch's restricted unpickler is the oracle, and is asked only where ours succeeded: `get_storage_from_record` of torch
trusts the length that the pickle states.
"""

import io
import pickletools
import warnings
from collections import OrderedDict
from itertools import pairwise
from zipfile import ZipFile

import pytest
import torch
from hypothesis import given, strategies as st

from converters.errors import ConversionError
from converters.torch_reader import read_header

from .mutation import many, mutated
from .test_torch_reader import assert_same

# As users run it, and some ten times faster: a step of the pickle is a call.
pytestmark = pytest.mark.usefixtures("unchecked")


def saved(value) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


def parts(whole: bytes) -> dict[str, bytes]:
    with ZipFile(io.BytesIO(whole)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: dict[str, bytes]) -> bytes:
    """By Python: other flags than torch's, no padding, and no 64-bit end record."""
    with ZipFile(file := io.BytesIO(), "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def steps(code: bytes) -> list[bytes]:
    """A pickle's opcodes, each with its argument."""
    starts = [at for _, _, at in pickletools.genops(code)] + [len(code)]
    return [code[start:end] for start, end in pairwise(starts)]


# Opcodes that torch's unpickler knows, and arguments at which it could differ from ours.
OTHERS = [
    b"(",
    b"N",
    b"}",
    b"]",
    b")",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"u",
    b"s",
    b"e",
    b"a",
    b"b",
    b"R",
    b"\x81",
    b"Q",
]
OTHERS += [b"\x8f", b"h\0", b"h\1", b"q\0", b"q\1", b"j\2\0\0\0", b"r\2\0\0\0", b"\x80\2", b"\x80\4", b"0", b"2", b"."]
OTHERS += [
    b"J\xff\xff\xff\xff",
    b"J\xff\xff\xff\x7f",
    b"K\0",
    b"K\2",
    b"M\0\1",
    b"\x8a\0",
    b"\x8a\x09" + b"\xff" * 8 + b"\0",
]
OTHERS += [b"G" + bytes(8), b"U\1a", b"U\1\xff", b"X\0\0\0\0", b"X\2\0\0\0\xc3\xa9", b"\x88", b"\x89"]
OTHERS += [f"c{name}\n".encode() for name in (
    "torch\nSize", "torch\nTensor", "torch.nn.parameter\nParameter", "torch\nuint8", "torch\nint32", "torch\nfloat64",
    "torch\nbool", "torch\ncomplex64", "torch\nfloat8_e4m3fn", "torch\nqint8", "torch\nbits8", "torch\ndevice",
    "torch\nDoubleStorage", "torch\nByteStorage", "torch\nBoolStorage", "torch\nQInt8Storage",
    "torch.cuda\nFloatStorage",
    "torch.storage\nUntypedStorage", "torch.storage\nTypedStorage", "torch._utils\n_rebuild_tensor",
    "torch._utils\n_rebuild_tensor_v3", "torch._utils\n_rebuild_parameter", "torch._utils\n_rebuild_qtensor",
    "torch._utils\n_rebuild_parameter_with_state", "torch._tensor\n_rebuild_from_type_v2", "collections\nOrderedDict",
    "collections\nCounter", "_codecs\nencode", "builtins\nset", "__builtin__\nset", "os\nsystem",
    "torch\nFloatStorage\r",
    "torch _utils\n_rebuild_tensor",
)]  # fmt: skip


def regions(whole: bytes) -> tuple[tuple[int, int], ...]:
    """The pickle twice, since it says most, then each member with its header, the directory, the end records."""
    with ZipFile(io.BytesIO(whole)) as archive:
        infos, directory = archive.infolist(), archive.start_dir
    starts = [info.header_offset for info in infos] + [directory]
    members = list(pairwise(starts))
    return members[0], members[0], *members, (directory, len(whole)), (len(whole) - 98, len(whole))


def parameter() -> torch.nn.Parameter:
    x = torch.nn.Parameter(torch.ones(2))
    x.tag = {"a": [1, 2.5, None]}
    return x


def attributed() -> torch.Tensor:
    x = torch.arange(3)
    x.tag = True
    return x


BASE = torch.arange(24.0).reshape(4, 6)
STATE = OrderedDict(w=BASE[1:, 2:].T, b=BASE[0], h=torch.ones(3).half(), n=torch.tensor(7), e=torch.ones(0, 3))
STATE._metadata = OrderedDict({"": {"version": 1}})
FILES = {
    "views": saved(STATE),
    "parameters": saved({"p": parameter(), "t": attributed(), "l": torch.nn.Linear(3, 2).weight}),
    "new dtypes": saved({"u": torch.ones(3, dtype=torch.uint16), "f": torch.ones(2).to(torch.float8_e5m2)}),
}
FILES["zipped by Python"] = zipped(parts(FILES["views"]))
REGIONS = {name: regions(whole) for name, whole in FILES.items()}
PARTS = {name: parts(whole) for name, whole in FILES.items()}
CODES = {name: members["archive/data.pkl"] for name, members in PARTS.items()}
STEPS = {name: steps(code) for name, code in CODES.items()}
# Any of them may take another's place.
EVERY = sorted({step for one in STEPS.values() for step in one}) + OTHERS


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("mutations") / "pytorch_model.bin"


def check(path, whole: bytes) -> bool:
    """Whether the file was read; then it must be as torch reads it."""
    path.write_bytes(whole)
    try:
        found, _ = read_header(path)
    except ConversionError:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another protocol, which torch reads all the same
        assert_same(path, found, torch.load(io.BytesIO(whole), weights_only=True, map_location="cpu"))
    return True


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_read(path, name):
    assert check(path, FILES[name])


@many
@given(st.data())
def test_a_mutated_file_is_read_as_torch_reads_it_or_refused(path, data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    check(path, data.draw(mutated(FILES[name], REGIONS[name])))


@many
@given(st.data())
def test_a_mutated_member_in_a_whole_archive(path, data):
    """Else most changes are seen by the archive, and few by what reads the pickle."""
    name = data.draw(st.sampled_from(sorted(PARTS)))
    member = data.draw(st.sampled_from(["archive/data.pkl"] * 9 + sorted(PARTS[name])))
    check(path, zipped(PARTS[name] | {member: data.draw(mutated(PARTS[name][member]))}))


@many
@given(st.data())
def test_a_pickle_of_other_opcodes(path, data):
    """One to three opcodes are replaced, put in, left out or exchanged: each file is a whole pickle of its form."""
    name = data.draw(st.sampled_from(sorted(STEPS)))
    code = list(STEPS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at, to = (data.draw(st.integers(0, len(code) - 1)) for _ in range(2))
        new = data.draw(st.sampled_from([code[to], code[to], None]))
        new = data.draw(st.sampled_from(EVERY)) if new is None else new
        cut = data.draw(st.sampled_from([1, 1, 1, 0, 2]))
        code[at : at + cut] = [new] if data.draw(st.integers(0, 4)) else []
    check(path, zipped(PARTS[name] | {"archive/data.pkl": b"".join(code)}))

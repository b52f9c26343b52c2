"""The zip archive that `torch.save` writes: one folder with a pickle, the tensors' bytes, and a few small members."""

from dataclasses import dataclass
from typing import BinaryIO

from . import zip_reader
from .errors import MalformedCheckpoint

FORMATS = range(1, 11)  # of the archive, as torch counts them


AGAIN = "Fetch it, or save it, again."
SCRIPT = (
    "It is a TorchScript archive: a program with its tensors. Save the tensors alone with torch:"
    " torch.save(torch.jit.load(path).state_dict(), path)."
)


def open_archive(file: BinaryIO) -> "Archive":
    """The members of a file that is a zip archive. Raises `MalformedCheckpoint` for one that torch does not read."""
    archive = Archive(file, _members(zip_reader.entries(file)))
    _expect_format(archive)
    return archive


def _members(ranges: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Without the name of the one folder, and in lower case, as torch looks them up."""
    names = list(ranges)
    folder = names[0].split("/")[0] + "/" if names else ""
    if not any(name.endswith("/data.pkl") for name in names):
        raise MalformedCheckpoint(_zip_kind(names))
    if stray := [name for name in names if not name.startswith(folder)]:
        raise MalformedCheckpoint(f"Its members are in more than one folder: {folder} and {stray[0]}. {AGAIN}")
    members = {name.removeprefix(folder).lower(): span for name, span in ranges.items()}
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        raise MalformedCheckpoint(SCRIPT)
    return members


def _zip_kind(names: list[str]) -> str:
    if any(name.endswith(".npy") for name in names):
        return "It is an .npz file of NumPy under this name. Save the tensors with torch, or as safetensors."
    if any(name.endswith(".h5") for name in names):
        return "It is a .keras file under this name. Get the weights of torch, or safetensors."
    what = f"holds {', '.join(names[:3])}" if names else "is empty"
    return (
        f"It is a zip archive, but not one of torch: it has no FOLDER/data.pkl; it {what}. Was it zipped for sending?"
    )


@dataclass(frozen=True)
class Archive:
    """The file, and where its members lie."""

    file: BinaryIO
    members: dict[str, tuple[int, int]]

    def record(self, name: str, limit: int = 100) -> bytes:
        """The bytes of a small member. Raises `MalformedCheckpoint` if there is none, or it is not small."""
        start, end = self.range(name)
        if end - start > limit:
            raise MalformedCheckpoint(f"Its member {name} has {end - start} bytes; {limit} is the most. {AGAIN}")
        self.file.seek(start)
        return self.file.read(end - start)

    def range(self, name: str) -> tuple[int, int]:
        if name not in self.members:
            raise MalformedCheckpoint(f"Its member {name} is missing. {AGAIN}")
        return self.members[name]


def _expect_format(archive: Archive) -> None:
    """The small members, with the values that torch accepts."""
    version = archive.record(".data/version" if ".data/version" in archive.members else "version")
    if not version.strip().isdigit() or int(version) not in FORMATS:
        raise MalformedCheckpoint(f"Its format is {version!r}; read are {FORMATS[0]} to {FORMATS[-1]}. {AGAIN}")
    if "byteorder" in archive.members and (order := archive.record("byteorder")) != b"little":
        big = "It was written on a machine of the other byte order (big endian): save it again on a usual one."
        raise MalformedCheckpoint(big if order == b"big" else f"Its byteorder is {order!r}. {AGAIN}")
    for name, usual in ((".storage_alignment", bytes.isdigit), (".data/serialization_id", bytes.isascii)):
        if name in archive.members and not usual(found := archive.record(name)):
            raise MalformedCheckpoint(f"Its member {name} is {found[:40]!r}. {AGAIN}")

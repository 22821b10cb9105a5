"""What kind of file something is, and whether it is whole as far as its format tells, without reading the weights."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NoReturn

from safetensors import safe_open

from mto_analysis.errors import CheckpointError

ARCHIVE = b"PK\x03\x04"
LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# Headers and settings of real files are some 100 kB.
MOST_HEADER_BYTES = 16 * 2**20


def check_container(path: Path) -> None:
    """Check that a file is whole as far as its format tells, without reading the weights."""
    start = first_bytes(path)
    if start.startswith(ARCHIVE):
        pickle_of_archive(path)
    elif holds_safetensors(path, start):
        check_safetensors_header(path)
    elif start[: len(LEGACY_TORCH_MAGIC)] != LEGACY_TORCH_MAGIC:
        refuse_other_content(path, start)


def first_bytes(path: Path) -> bytes:
    """Enough to tell what a file is."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def refuse_other_content(path: Path, start: bytes) -> NoReturn:
    """Name what people often have instead of weights."""
    text = start.lstrip()
    if not text:
        raise CheckpointError(f"{path} is empty; download it again")
    if text[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not weights: the download failed; fetch the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not weights; run `git lfs pull`")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text):
        raise CheckpointError(f"{path} is a text file, not weights")
    raise CheckpointError(
        f"{path} is not a torch or safetensors file (it starts with {start[:8]!r}), or is damaged; "
        "a checkpoint ends in .pth, .pt, .bin or .safetensors"
    )


def holds_safetensors(path: Path, start: bytes) -> bool:
    """Whether a file is, or by its name should be, safetensors."""
    # A text's first letters as the length of a header would be a number beyond any file.
    plausible = len(start) > 8 and start[8:9] == b"{"
    return plausible or (path.suffix == ".safetensors" and start[4:8] == bytes(4))


def check_safetensors_header(path: Path) -> None:
    """Refuse a header that is damaged, or one so long that parsing it fills the memory."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(MOST_HEADER_BYTES, path.stat().st_size):
        raise CheckpointError(f"{path} is damaged or truncated: its header declares {length} bytes; download it again")
    try:
        with safe_open(path, framework="pt"):
            pass
    except Exception as error:  # the library raises its own type, and plain ones for odd dtypes
        raise CheckpointError(f"{path} is damaged or truncated ({first_line(error)}); download it again") from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough for one line of ours."""
    text = str(error).strip().splitlines()
    return ascii(text[0] if text else type(error).__name__)[1:-1][:200]


def pickle_of_archive(path: Path) -> bytes:
    """The pickle inside an archive of torch, once all that is stored there proved to be intact."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickled = _pickle_among(entries, path)
            intact = [_is_intact(archive, entry) for entry in entries if entry.file_size]
            # torch can be told to write no checksums; then none of them fits.
            if any(intact) and not all(intact):
                raise zipfile.BadZipFile("a checksum does not fit")
            with archive.open(pickled) as file:
                file._expected_crc = None  # type: ignore[attr-defined]
                return file.read()
    except CheckpointError:
        raise
    except Exception as error:  # of many types, from a directory of random bytes
        raise CheckpointError(f"{path} is truncated or damaged ({first_line(error)}); download it again") from error


def _pickle_among(entries: list[zipfile.ZipInfo], path: Path) -> zipfile.ZipInfo:
    # torch stores its entries uncompressed, so together they cannot be larger than the file.
    if any(entry.compress_type for entry in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} declares more data than it holds; it was not written by torch.save")
    names = [entry.filename for entry in entries]
    pickled = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(set(names)) < len(names) or len(pickled) != 1:
        raise CheckpointError(f"{path} is an archive, but not written by torch.save; unpack it first")
    return pickled[0]


def _is_intact(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """Whether the checksum of an entry fits its content."""
    try:
        with archive.open(entry) as file:
            while file.read(1 << 20):
                pass
    except zipfile.BadZipFile as error:
        if "CRC-32" in str(error):
            return False
        raise
    return True

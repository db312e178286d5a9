"""The header of a GGUF file: key-value pairs and tensor shapes, no weights (github.com/ggml-org/ggml, docs/gguf.md).

The gguf package's reader takes three seconds for a vocabulary of 49k; a preflight has to answer at once.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from infra.errors import SourceInvalid

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """Scalar metadata by key (arrays, such as the vocabulary, are left out) and the number of weights."""

    values: dict[str, str | int | float]
    num_parameters: int

    def number(self, name: str) -> int:
        """An integer under `<architecture>.<name>`, such as block_count; KeyError if the file has none."""
        return int(self.values[f"{self.values['general.architecture']}.{name}"])

    def number_or_none(self, name: str) -> int | None:
        """The same, or None: the file has none, or one for each layer."""
        try:
            return self.number(name)
        except KeyError:
            return None


def read_gguf_header(file: Path) -> GgufHeader:
    """Read it. Raises SourceInvalid for a file that is no GGUF of version 2 or 3 or ends within its header."""
    try:
        with file.open("rb") as stream:
            return _read(stream)
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise SourceInvalid(
            f"{file} is no GGUF file that can be read (version 2 or 3 is needed, or it is cut off); fetch it again"
        ) from error


def _read(stream: BinaryIO) -> GgufHeader:
    magic, version, num_tensors, num_values = struct.unpack("<4sIQQ", stream.read(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise KeyError(version)
    values: dict[str, str | int | float] = {}
    for _ in range(num_values):
        key = _string(stream).decode()
        value = _value(stream, _number(stream, "I"))
        if value is not None:
            values[key] = value
    return GgufHeader(values, sum(_tensor_size(stream) for _ in range(num_tensors)))


def _number(stream: BinaryIO, code: str) -> int:
    return int(struct.unpack(f"<{code}", stream.read(struct.calcsize(f"<{code}")))[0])


def _string(stream: BinaryIO) -> bytes:
    return stream.read(_number(stream, "Q"))


def _value(stream: BinaryIO, kind: int) -> str | int | float | None:
    if kind == _STRING:
        return _string(stream).decode()
    if kind == _ARRAY:
        _skip_array(stream)
        return None
    code = f"<{_NUMBERS[kind]}"
    value: int | float = struct.unpack(code, stream.read(struct.calcsize(code)))[0]
    return value


def _skip_array(stream: BinaryIO) -> None:
    kind, length = struct.unpack("<IQ", stream.read(12))
    if kind in _NUMBERS:
        stream.seek(length * struct.calcsize(f"<{_NUMBERS[kind]}"), 1)
        return
    for _ in range(length):
        _value(stream, kind)


def _tensor_size(stream: BinaryIO) -> int:
    _string(stream)
    num_dimensions = _number(stream, "I")
    shape = struct.unpack(f"<{num_dimensions}Q", stream.read(8 * num_dimensions))
    stream.read(12)  # quantisation type and offset
    return math.prod(shape)

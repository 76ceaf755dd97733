"""The ternary tensor types: one class each, and every table of types in Python comes from here.

A class says what ggml, GGUF and the build have to know of a type (id, sizes, file type, version of
its layout) and packs and unpacks it in NumPy. The bytes are described in
``third_party/llama.cpp/FORMAT.md``, and ``ggml-tq.c`` is the same in C; tests hold the three
together. A new type is a new class here, its kernels, and nothing else: the edits of llama.cpp that
name types are written once for all of them (``for: types`` in ``edits.yaml``).

Notation: a block is 128 elements of a row; element ``e`` sits in ``lane = e % 32`` of
``plane = e // 32``; a code is ``c = t + 1`` in {0, 1, 2}, and with four levels 3; the weight is
``alpha * (c - 1) + mu``.

NumPy is imported where it is used: commands that only want the tables start without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    U8 = NDArray[np.uint8]
    F16 = NDArray[np.float16]
    F32 = NDArray[np.float32]

BLOCK = 128
LANES = 32
PLANES = BLOCK // LANES


class BlockType:
    """A ggml type of ours: ``block`` elements of a row in ``nbytes`` bytes.

    Subclasses set:

    Attributes:
        id: in ``enum ggml_type``; upstream's end far below.
        block: elements of a block.
        fields: the block's fields in their order, and the bytes of each.
        comment: beside the id in ``ggml.h``.

    and from these and the class's name are made:

    Attributes:
        name: as ggml's enum, gguf-py and tables have it, the class's own.
        ggml_name: ggml's ``type_name``, also in metadata keys and for ``--type``: in lower case.
        nbytes: of a block.
    """

    id: ClassVar[int]
    block: ClassVar[int] = BLOCK
    fields: ClassVar[dict[str, int]]
    comment: ClassVar[str]

    name: ClassVar[str]
    ggml_name: ClassVar[str]
    nbytes: ClassVar[int]

    def __init_subclass__(cls) -> None:
        if "id" not in cls.__dict__:
            return  # what several types share
        cls.name, cls.ggml_name = cls.__name__, cls.__name__.lower()
        cls.nbytes = sum(cls.fields.values())
        taken = [t for t in ALL if cls.id == t.id or cls.name == t.name]
        if taken:
            raise ValueError(f"{cls.name} ({cls.id}) is {taken[0].name} ({taken[0].id}) already")
        ALL.append(cls)
        if issubclass(cls, TernaryType):
            TYPES[cls.ggml_name] = cls

    @classmethod
    def bpw(cls) -> float:
        """Bits per weight of the bare blocks."""
        return 8 * cls.nbytes / cls.block


class TernaryType(BlockType):
    """A type of weights in files: codes, and one alpha and mu per block.

    Subclasses set, besides what :class:`BlockType` says:

    Attributes:
        file_type: ``general.file_type`` of a file that is mostly of this type.
        layout: version of the bytes under this id, in the metadata key :meth:`layout_key`.
            llama.cpp sizes a tensor by its id, so another size of a block needs another id.
        levels: how many codes there is room for, 0 to ``levels - 1``. Code 3 only counts in files
            whose metadata key :meth:`levels_key` is 4.
    """

    file_type: ClassVar[int]
    layout: ClassVar[int] = 1
    levels: ClassVar[int] = 3

    @classmethod
    def layout_key(cls) -> str:
        """The metadata key that states :attr:`layout` in every file with tensors of this type."""
        return f"pt2.{cls.ggml_name}.layout"

    @classmethod
    def levels_key(cls) -> str:
        """The metadata key that states how many levels are used; 3 where it is missing."""
        return f"pt2.{cls.ggml_name}.levels"

    @classmethod
    def pack(cls, codes: U8, alpha: F16, mu: F16) -> U8:
        """Encode a matrix.

        Args:
            codes: uint8 ``[rows, cols]``, each below :attr:`levels`; ``cols`` whole blocks.
            alpha: float16 ``[rows, blocks]``.
            mu: float16 ``[rows, blocks]``.

        Returns:
            uint8 ``[rows, blocks * nbytes]``.

        Raises:
            ValueError: shapes that do not fit, or a code that is too large.
        """
        rows, cols = codes.shape
        if cols % cls.block or alpha.shape != (rows, cols // cls.block) or mu.shape != alpha.shape:
            raise ValueError(f"{cls.name}: codes {codes.shape}, alpha {alpha.shape}, mu {mu.shape}")
        if codes.size and int(codes.max()) >= cls.levels:
            *first, last = map(str, range(cls.levels))
            known = f"{', '.join(first)} and {last}"
            raise ValueError(f"{cls.name}: a code is {int(codes.max())}; codes are {known}")
        planes = codes.reshape(-1, PLANES, LANES)
        return cls._join(planes, alpha.reshape(-1), mu.reshape(-1)).reshape(rows, -1)

    @classmethod
    def unpack(cls, data: U8) -> tuple[U8, F16, F16]:
        """The inverse of :meth:`pack`.

        Args:
            data: uint8 ``[rows, bytes]``.

        Returns:
            ``(codes, alpha, mu)`` of the shapes that :meth:`pack` takes.

        Raises:
            ValueError: a row is not whole blocks.
        """
        import numpy as np

        rows, row_bytes = data.shape
        if row_bytes % cls.nbytes:
            raise ValueError(f"{cls.name}: a row of {row_bytes} bytes is not whole blocks")
        planes, alpha, mu = cls._split(np.ascontiguousarray(data).reshape(-1, cls.nbytes))
        return planes.reshape(rows, -1), alpha.reshape(rows, -1), mu.reshape(rows, -1)

    @classmethod
    def dequantize(cls, data: U8) -> F32:
        """uint8 ``[rows, bytes]`` to float32 weights ``[rows, cols]``."""
        return weights(*cls.unpack(data))

    @classmethod
    def check(cls, data: U8, first_row: int = 0) -> None:
        """Refuse blocks that no encoder writes.

        They have defined values (FORMAT.md), but are a sign of a damaged file.

        Args:
            data: uint8 ``[rows, bytes]``, rows of whole blocks.
            first_row: number of the first of these rows, for the message.

        Raises:
            ValueError: a NaN or infinite scale, or bytes that are no codes; the row and block of
                the first are named.
        """
        import numpy as np

        blocks = np.ascontiguousarray(data).reshape(-1, cls.nbytes)
        _, alpha, mu = cls._split(blocks)
        for bad, what in (
            (~(np.isfinite(alpha) & np.isfinite(mu)), "a NaN or infinite scale"),
            (cls._impossible(blocks), "bytes that are no codes"),
        ):
            if bad.any():
                row, block = divmod(int(bad.argmax()), data.shape[1] // cls.nbytes)
                raise ValueError(f"{cls.name}: row {first_row + row}, block {block} has {what}")

    @classmethod
    def random_blocks(cls, count: int, rng: np.random.Generator, scale: float) -> U8:
        """Ternary blocks, uint8 ``[count, nbytes]``: any codes, each alpha about ``scale``.

        The offset mu is a tenth of another such number, and of either sign.
        """
        import numpy as np

        codes = rng.integers(0, 3, (count, cls.block), dtype=np.uint8)
        sizes = scale * rng.uniform(0.5, 1.5, (2, count, 1))
        mu = sizes[1] * rng.choice([-0.1, 0.1], (count, 1))
        return cls.pack(codes, sizes[0].astype(np.float16), mu.astype(np.float16))

    @classmethod
    def _join(cls, planes: U8, alpha: F16, mu: F16) -> U8:
        """``[blocks, 4, 32]``, ``[blocks]``, ``[blocks]`` to bytes ``[blocks, nbytes]``."""
        raise NotImplementedError

    @classmethod
    def _split(cls, blocks: U8) -> tuple[U8, F16, F16]:
        """The inverse of :meth:`_join`."""
        raise NotImplementedError

    @classmethod
    def _impossible(cls, blocks: U8) -> NDArray[np.bool_]:
        """Which blocks have bytes that are no codes, bool ``[blocks]``; here every byte is some."""
        import numpy as np

        return np.zeros(len(blocks), bool)


class _TwoHalves(TernaryType):
    """Types whose blocks begin with alpha and mu as halves."""

    @classmethod
    def _join(cls, planes: U8, alpha: F16, mu: F16) -> U8:
        import numpy as np

        out = np.empty((len(planes), cls.nbytes), dtype=np.uint8)
        out[:, 0:2] = alpha.astype("<f2")[:, None].view(np.uint8)
        out[:, 2:4] = mu.astype("<f2")[:, None].view(np.uint8)
        out[:, 4:] = cls._encode(planes)
        return out

    @classmethod
    def _split(cls, blocks: U8) -> tuple[U8, F16, F16]:
        import numpy as np

        halves = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float16)
        return cls._decode(blocks[:, 4:]), halves[:, 0], halves[:, 1]

    @classmethod
    def _encode(cls, planes: U8) -> U8:
        """Codes ``[blocks, 4, 32]`` to the bytes ``qs`` of each block."""
        raise NotImplementedError

    @classmethod
    def _decode(cls, qs: U8) -> U8:
        """The inverse of :meth:`_encode`."""
        raise NotImplementedError


ALL: list[type[BlockType]] = []
"""Every type of ours, also the one that is never in a file, in the order of their definition."""

TYPES: dict[str, type[TernaryType]] = {}
"""``ggml_name`` -> type, of the types of weights; the first one is the default."""


class TQ2_1(_TwoHalves):
    """Two bits a code: byte ``lane`` holds the codes of planes 0..3, lowest bits first."""

    id = file_type = 120
    levels = 4
    fields: ClassVar = {"alpha": 2, "mu": 2, "qs": LANES}
    comment = "asymmetric ternary, 2-bit codes (ids far from upstream's next)"

    @classmethod
    def _encode(cls, planes: U8) -> U8:
        import numpy as np

        return np.bitwise_or.reduce(planes << _shifts(), axis=1)

    @classmethod
    def _decode(cls, qs: U8) -> U8:
        import numpy as np

        return (qs[:, None, :] >> _shifts()) & np.uint8(3)


class TQ1_1(_TwoHalves):
    """26 base-3 bytes of up to five codes, lowest digit first.

    Digits 0..3 of byte ``i`` are the planes of lane ``i``; digit 4 of the first 24 bytes holds the
    six lanes 26..31, four planes each; digit 4 of the last two bytes is 0.
    """

    id = file_type = 121
    fields: ClassVar = {"alpha": 2, "mu": 2, "qs": 26}
    comment = "asymmetric ternary, base-3 codes"
    _full = fields["qs"]
    _tail = (LANES - _full) * PLANES

    @classmethod
    def _encode(cls, planes: U8) -> U8:
        import numpy as np

        digits = np.zeros((len(planes), 5, cls._full), dtype=np.uint8)
        digits[:, :PLANES] = planes[:, :, : cls._full]
        digits[:, 4, : cls._tail] = planes[:, :, cls._full :].swapaxes(1, 2).reshape(-1, cls._tail)
        return (digits * _powers()).sum(axis=1, dtype=np.uint8)

    @classmethod
    def _decode(cls, qs: U8) -> U8:
        import numpy as np

        digits = (qs[:, None, :] // _powers()) % 3
        # A byte above 242 is none that an encoder writes: it counts as the one 81 below.
        digits[:, 4][qs >= 162] = 2
        tail = digits[:, 4, : cls._tail].reshape(-1, LANES - cls._full, PLANES).swapaxes(1, 2)
        return np.concatenate([digits[:, :PLANES], tail], axis=2)

    @classmethod
    def _impossible(cls, blocks: U8) -> NDArray[np.bool_]:
        import numpy as np

        qs = blocks[:, 4:]
        most = np.where(np.arange(cls._full) < cls._tail, 3**5 - 1, 3**4 - 1)
        return np.asarray((qs > most).any(axis=1))


class Q8_T(BlockType):
    """Activations of the CPU's dot products; never in a file."""

    id = 122
    fields: ClassVar = {"d": 4, "s": 4, "qs": BLOCK}
    comment = "activations for the two above"


def _shifts() -> U8:
    import numpy as np

    return np.arange(0, 2 * PLANES, 2, dtype=np.uint8)[:, None]


def _powers() -> U8:
    import numpy as np

    return np.array([1, 3, 9, 27, 81], dtype=np.uint8)[:, None]


DEFAULT: type[TernaryType] = next(iter(TYPES.values()))
SMALLEST: type[TernaryType] = min(TYPES.values(), key=lambda t: t.nbytes / t.block)
NAMES: tuple[str, ...] = tuple(t.name for t in TYPES.values())
BY_NAME: dict[str, type[TernaryType]] = {t.name: t for t in TYPES.values()}


def weights(codes: U8, alpha: F16, mu: F16) -> F32:
    """``alpha * (code - 1) + mu`` in float32; NaN where alpha or mu is NaN or infinite.

    Every implementation gives these very bits: the product is exact, so only the sum rounds.

    Args:
        codes: uint8 ``[rows, cols]`` in 0..3.
        alpha: float16 ``[rows, blocks]``, with ``cols`` a multiple of ``blocks``.
        mu: float16 ``[rows, blocks]``.
    """
    import numpy as np

    rows, blocks = alpha.shape
    t = codes.reshape(rows, blocks, -1).astype(np.float32) - np.float32(1)
    with np.errstate(invalid="ignore"):
        t *= alpha.astype(np.float32)[:, :, None]
        t += mu.astype(np.float32)[:, :, None]
    t[~(np.isfinite(alpha) & np.isfinite(mu))] = np.nan
    return t.reshape(rows, -1)

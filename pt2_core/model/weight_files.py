"""Which safetensors files of a model's folder are the model.

One complete set counts: the shards that the index names, or ``model.safetensors``, or files named
``STEM-00001-of-0000N.safetensors``, or the only file left. Other sets beside it (an older copy,
Mistral's ``consolidated.safetensors``) are left out and named. Free of torch and numpy.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pt2_core.errors import PT2Error
from pt2_core.files import read_json
from pt2_core.model.leftovers import is_buffer
from pt2_core.safetensors_file import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
# What other programs keep beside a model: never the model where there is another file.
_SIDE = re.compile(r"(consolidated|adapter|optimizer|lora|value_head|training)", re.IGNORECASE)


def weight_files(path: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """The files that hold the model's weights.

    Returns:
        (file names, sorted; the index's tensor name -> file, empty where no index counts; what was
        left out, one line each)

    Raises:
        PT2Error: no weights, an incomplete set, or several sets of which none is the model's.
    """
    present = sorted(p.name for p in path.glob("*.safetensors") if p.is_file())
    notes: list[str] = []
    index = _index(path)
    shards = sorted(set(index.values()))
    if index and SINGLE in present and shards != [SINGLE]:
        if all((path / s).is_file() for s in shards):
            raise PT2Error(
                f"{path} holds two models, {SINGLE} and the files that {INDEX} names, and programs "
                "differ in which one they load: remove the one that is not meant"
            )
        notes.append(f"ignored {INDEX}: it names {shards[0]}, and {SINGLE} is the model")
        index = {}
    if index:
        missing = [s for s in shards if not (path / s).is_file()]
        if missing:
            raise PT2Error(f"{path} lacks {missing[0]}, which {INDEX} names; download it again")
    else:
        shards = [SINGLE] if SINGLE in present else _consistent_set(path, present)
    others = [name for name in present if name not in shards]
    if others:
        counted = shards[0] if len(shards) == 1 else f"{shards[0]} to {shards[-1]}"
        notes.append(f"ignored {', '.join(others)}: the model is in {counted}")
    return shards, index, notes


def weight_tensors(
    path: Path, shards: list[str], index: dict[str, str]
) -> tuple[dict[str, TensorInfo], dict[str, str], list[str]]:
    """The tensors of these files, from their headers.

    Returns:
        (tensor name -> header's entry, tensor name -> file, notes). What a shard holds counts,
        named by the index or not.

    Raises:
        PT2Error: a broken file, a tensor in two files, or one that the index names and no file has.
    """
    tensors: dict[str, TensorInfo] = {}
    home: dict[str, str] = {}
    for shard in shards:
        for name, info in read_header(path / shard).items():
            if name in home:
                raise PT2Error(
                    f"{path} holds tensor {name} twice, in {home[name]} and in {shard}: remove the "
                    "file that does not belong to the model"
                )
            tensors[name], home[name] = info, shard
    if not tensors:
        raise PT2Error(f"{path / shards[0]} holds no tensors: it is not a model")
    notes: list[str] = []
    absent = sorted(set(index) - set(home))
    # Buffers are computed, and whether a head must be there is for the tie to say.
    spare = [n for n in absent if is_buffer(n) or n == "lm_head.weight"]
    if spare:
        notes.append(f"ignored {_some(spare)} of {INDEX}: no file holds it, and none must")
    if absent := [n for n in absent if n not in spare]:
        raise PT2Error(
            f"{path / INDEX} names {absent[0]} in {index[absent[0]]}, which does not hold it: the "
            "index and the files are of different models; download the model again"
        )
    unnamed = sorted(set(home) - set(index)) if index else []
    if unnamed:
        notes.append(
            f"counted {_some(unnamed)}: {home[unnamed[0]]} holds it, {INDEX} does not name it"
        )
    return tensors, home, notes


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> file as the index has it; empty where there is no index."""
    file = path / INDEX
    if not file.is_file():
        return {}
    index: Any = read_json(file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise PT2Error(f"{file} has no weight_map; download the model again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise PT2Error(f"{file} puts {name} into {shard!r}, which is no file of this folder")
    return weight_map


def _consistent_set(path: Path, present: list[str]) -> list[str]:
    """The one set of files that is the model where neither index nor ``model.safetensors`` is."""
    if (path / ADAPTER_CONFIG).is_file() and all(_SIDE.match(n) for n in present):
        raise PT2Error(
            f"{path} is an adapter, not a model: merge it into its base model first "
            "(peft: merge_and_unload, then save_pretrained)"
        )
    main = [n for n in present if not _SIDE.match(n)] or present
    if not main:
        others = any(path.glob("*.bin")) or any(path.glob("*.gguf")) or any(path.glob("*.pth"))
        hint = "; only safetensors are read, convert it with save_pretrained" if others else ""
        raise PT2Error(f"{path} has no {SINGLE}{hint}")
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in main:
        if match := _SHARD.fullmatch(name):
            sets.setdefault((match[1], int(match[3])), {})[int(match[2])] = name
    whole = {k: s for k, s in sets.items() if set(s) == set(range(1, k[1] + 1))}
    usual = [k for k in whole if k[0] == "model"]
    if len(usual) == 1 or len(whole) == 1:
        return sorted(whole[usual[0] if len(usual) == 1 else next(iter(whole))].values())
    if len(main) == 1 and not sets:
        return main
    if sets and not whole:
        (stem, count), found = next(iter(sets.items()))
        first = next(i for i in range(1, count + 2) if i not in found)
        raise PT2Error(
            f"{path} lacks file {first} of {count} of {stem}-*-of-*.safetensors; download it again"
        )
    raise PT2Error(
        f"{path} holds several sets of weights ({', '.join(main[:3])}{', ...' * (len(main) > 3)}) "
        f"and no {INDEX} that says which is the model: remove those that are not"
    )


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")

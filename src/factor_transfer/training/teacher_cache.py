"""The frozen teacher behind the factor cache: what its outputs depend on, and the proof that kept ones are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from factor_transfer.config import plain
from factor_transfer.data.dataset import Dataset
from factor_transfer.data.digests import decoders
from factor_transfer.method.factor_transfer import Paraphraser, Straight
from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.networks.pair import Pair
from factor_transfer.training.cache import (
    HALF_ROWS,
    ROWS,
    CachedTeacher,
    FactorCache,
    foreign_row,
    say_what_changed,
)
from factor_transfer.training.engine import Engine
from factor_transfer.training.objective import Objective
from factor_transfer.util.console import warn
from factor_transfer.util.errors import RunError
from factor_transfer.util.files import cache_folder, state_fingerprint
from factor_transfer.util.identity import code_fingerprint


def behind_cache(
    live: FrozenTeacher, identity: Mapping[str, Any], objective: Objective, data: Dataset, engine: Engine, views: int
) -> FrozenTeacher | CachedTeacher:
    """The live teacher behind the factor cache; alone where a term's output, or the cache's folder, cannot take it.

    Args:
        live: the teacher.
        identity: all that its outputs depend on.
        objective: which outputs are read, and their shapes.
        data: the images.
        engine: a cache is used in all processes, or in none.
        views: of each image.

    Raises:
        RunError: the cache holds other outputs than the teacher gives now.
    """
    shapes = {name: shape for name, shape in objective.outputs.items() if shape is not None}
    if shapes.keys() != objective.outputs.keys():
        large = ", ".join(objective.outputs.keys() - shapes.keys())
        warn(f"no factor cache: {large} is too large; the teacher stays live")
        return live
    cache, problem = None, None
    folder, count = cache_folder(objective.config.cache_dir), len(data.train)
    with engine.unhurried():  # some file systems write out all that is reserved
        try:
            cache = FactorCache(folder, identity, shapes, count, views)
        except OSError as error:
            problem = f"{error.strerror}: {error.filename}"
    problems = [each for each in engine.all_of(problem) if each is not None]
    if cache is None or problems:  # in one process: then in none
        if cache is not None:
            cache.close()
        warn(f"no factor cache ({problems[0]}); the teacher stays live")
        return live
    say_what_changed(cache)
    _check_rows(cache, live, data, engine)
    return CachedTeacher(live, cache)


def identity_of(
    pair: Pair,
    paraphrasers: Sequence[Paraphraser | Straight],
    objective: Objective,
    data: Dataset,
    engine: Engine,
    code: str,
) -> dict[str, Any]:
    """All that the teacher's outputs depend on; `code` is that of the teacher, as `code_fingerprint` gives it."""
    network, readers = pair.teacher.network, objective.readers(paraphrasers)
    identity: dict[str, Any] = {
        "architecture": [network.name, type(network.module).__name__, plain(network.model_args)],
        "teacher's code": code,
        "teacher": state_fingerprint(network.module.state_dict()),
        "teacher layer": pair.teacher.layer,
        "teacher normalisation": [network.mean, network.std, network.size],
        "paraphraser": _weights_and_code(paraphrasers[0]) if paraphrasers else None,
        "images": data.fingerprint,
        "transform's code": data.transform_code(),
        "decoders": decoders(),
        "precision": engine.describe()["precision"],
    }
    if objective.config.torchcompile:
        identity["compiled"] = True
    if readers:
        identity["other layers"] = {
            name: [reader.layer, *_weights_and_code(reader)] for name, reader in readers.items()
        }
    return identity


def _check_rows(cache: FactorCache, live: FrozenTeacher, data: Dataset, engine: Engine) -> None:
    """Compare rows of the cache, drawn at random each time, with what the teacher gives for them now.

    Raises:
        RunError: they differ, in any process.
    """

    def fresh(index: np.ndarray, view: int) -> Mapping[str, Tensor]:
        (batch,) = data.train.batches([index], view=view)
        with engine.autocast():
            outputs: Mapping[str, Tensor] = live(batch.image.to(engine.device), batch.index, view)
        return outputs

    problem = foreign_row(cache, fresh, HALF_ROWS if engine.bf16 else ROWS)
    problems = [each for each in engine.all_of(problem) if each is not None]
    if problems:
        cache.close()
        raise RunError(
            f"--cache-dir: the factor cache {cache.folder}",
            found=problems[0],
            valid="the outputs that --teacher gives now for the same images",
            hint="something changed that no fingerprint covers: delete that folder, or give another --cache-dir; if "
            "nothing changed, the teacher gives other outputs at each call: give --views 0",
        )


def _weights_and_code(module: nn.Module) -> list[str]:
    return [state_fingerprint(module.state_dict()), code_fingerprint(module)]

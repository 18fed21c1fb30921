"""What a run leaves: the exported student and `summary.json`, which says all that was found."""

from __future__ import annotations

from typing import Any

from factor_transfer.config import plain
from factor_transfer.export.formats import EXPORT_IMAGES, export_pt2, latency_ms, metadata_of
from factor_transfer.networks.load import Network, count_parameters
from factor_transfer.networks.pair import Pair, Side
from factor_transfer.training.stages import Job
from factor_transfer.util.arguments import brief
from factor_transfer.util.console import warn
from factor_transfer.util.errors import first_line
from factor_transfer.util.files import state_fingerprint, write_json


def finish(job: Job, pair: Pair, student: Side, baseline: Side | None) -> None:
    """Export the student, measure, and write the summary."""
    if not job.run.writes:
        return
    sides: dict[str, Side | None] = {"teacher": pair.teacher, "baseline": baseline, "student": student}
    there = {role: side for role, side in sides.items() if side is not None}
    taken = [side.network for role, side in there.items() if role != "baseline"]  # that one is another student
    times = latency_ms([network.module for network in taken], [network.size for network in taken])
    summary: dict[str, Any] = {
        role: _described(job, role, side) | {"latency_ms": times[0 if role == "teacher" else -1]}
        for role, side in there.items()
    }
    summary |= {
        "method": job.objective.method,
        **job.objective.layers(),
        "paraphraser": job.run.recorded("paraphraser"),
        "seconds": {stage: found["seconds"] for stage, found in job.run.all_recorded().items()},
        "data": {
            "name": job.data.name,
            "train": len(job.data.train),
            "validation": len(job.data.validation),
            "img_size": job.data.img_size,
            "classes": list(job.data.classes),
        },
        "fingerprints": job.run.pins(),
        "settings": job.config.to_dict(),
        "environment": job.run.environment(),
    }
    summary["student"] |= _export(job, student.network)
    write_json(job.run.path("summary.json"), summary)


def _export(job: Job, network: Network) -> dict[str, Any]:
    """How far student.pt2 is from the student; or why there is none: hours of training are not lost to that."""
    try:
        images, about = job.sample(EXPORT_IMAGES), metadata_of(network, job.data)
        path = job.run.path("student.pt2")
        return {"pt2_difference": export_pt2(network.module, network.norm(images), path, about)}
    except Exception as error:  # torch.export raises whatever it meets in foreign code
        reason = first_line(error)
        warn(f"student.pt2 was not written ({reason}); student.safetensors is whole")
        return {"pt2_error": reason}


def _described(job: Job, role: str, side: Side) -> dict[str, Any]:
    network = side.network
    found = {name: value for name, value in (job.run.recorded(role) or {}).items() if name != "seconds"}
    tensors = network.module.state_dict().values()
    return {
        "name": network.name,
        **({"weights": network.origin} if network.origin else {}),
        **found,
        "parameters": count_parameters(network.module),
        "size_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "layer": side.layer,
        "img_size": brief(network.size),
        "mean": list(network.mean),
        "std": list(network.std),
        "model_args": plain(network.model_args),
        "output": network.output,
        "is_module": side.role in job.modules,
        "fingerprint": state_fingerprint(network.module.state_dict()),
    }

"""What a quickstart found, as a report."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gearshift.inspect import active_parameters, describe_settings
from gearshift.model.schema import schema
from gearshift.quickstart_job import Job
from gearshift.report import (
    Candidate,
    CostSpan,
    DominatedMixer,
    Environment,
    ExportCheck,
    Generation,
    LayerErrors,
    MixerInfo,
    ModelInfo,
    Preset,
    PureQuality,
    Quality,
    Report,
    Search,
    Stage,
    write,
)
from gearshift.report import Step as ReportStep
from gearshift.report.history import stage_of
from gearshift.tiny import TINY


def write_report(job: Job) -> Path:
    """Write `report.html` and `report.json` of a job whose steps are done; returns the page's path."""
    spec = job.model.spec
    source = job.results["convert"]["source"]
    name = "tiny random Llama" if job.source == TINY else Path(str(source.get("name", job.source))).name
    report = Report(
        title=f"{name}: one checkpoint, {len(job.settings.presets) + 1} speeds",
        model=ModelInfo(
            name=name,
            format=str(source.get("format", "gearshift")),
            parameters_total=sum(info.elements for info in schema(spec, job.dtype).values()),
            parameters_active=active_parameters(spec, spec.main),
            layers=len(spec.choices),
            dtype=job.dtype,
        ),
        mixers=tuple(
            MixerInfo(name=name, description=describe_settings(mixer))
            for block in spec.decoder.blocks.values()
            for name, mixer in block.mixers.items()
        ),
        main=spec.main[0],
        environment=Environment(
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers")},
            },
            device=_processor(),
            threads=torch.get_num_threads(),
        ),
        steps=tuple(ReportStep(name=step.name, seconds=step.seconds, result=step.result) for step in job.steps.done),
        quality=_quality(job),
        training=_stages(job.records),
        layer_errors=LayerErrors(before=_rows(job.results["before"]), after=_rows(job.results["after"])),
        search=_search(job),
        export=ExportCheck(
            **{key: job.results["export"][key] for key in ("placement", "path", "max_abs_difference", "exact")}
        ),
        generations=tuple(Generation.model_validate(item) for item in job.results["generate"]),
        settings={**job.arguments, "surgery": job.surgery.model_dump(mode="json", exclude_none=True), **_settings(job)},
    )
    return write(report, job.out)


def _settings(job: Job) -> dict[str, Any]:
    return job.settings.model_dump(mode="json")


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"CPU, {names[0]}" if names else f"CPU, {platform.machine()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _quality(job: Job) -> Quality:
    before, after = job.results["before"], job.results["after"]
    return Quality(
        tokens=after["positions"],
        sequence_length=job.settings.sequence_length,
        teacher_perplexity=after["teacher_perplexity"],
        before=_pure(before),
        after=_pure(after),
    )


def _pure(measured: dict[str, Any]) -> tuple[PureQuality, ...]:
    return tuple(PureQuality(mixer=name, **score) for name, score in measured["scores"].items())


def _rows(measured: dict[str, Any]) -> dict[str, tuple[float | None, ...]]:
    return {name: tuple(errors) for name, errors in measured["layer_errors"].items()}


def _stages(records: list[dict[str, Any]]) -> tuple[Stage, ...]:
    steps = [record for record in records if record["event"] == "step"]
    stages: dict[int, list[dict[str, Any]]] = {}
    for record in steps:
        stages.setdefault(record["stage"], []).append(record)
    return tuple(stage_of(stage[0]["type"], stage) for stage in stages.values())


def _search(job: Job) -> Search:
    found = job.results["search"]
    return Search(
        cost_unit=found["cost"]["unit"],
        context=job.settings.search.context,
        span=CostSpan(cheapest=found["cost"]["cheapest"], main=found["cost"]["main"]),
        candidates=tuple(_candidate(candidate) for candidate in found["candidates"]),
        front=tuple(_candidate(candidate) for candidate in found["front"]),
        presets=tuple(
            Preset(
                name=name,
                placement=chosen["placement"],
                counts=chosen["counts"],
                budget_share=job.settings.presets[name],
                budget_cost=chosen["limit"],
                cost=chosen["cost"],
                divergence=chosen["numbers"]["divergence"],
                state_bytes=found["state_bytes"][name],
            )
            for name, chosen in found["chosen"].items()
        ),
        dominated=tuple(
            DominatedMixer(mixer=item["mixer"], in_no_preset=item["in_no_preset"], reason=item["reason"])
            for item in found["dominated"]
        ),
        main_state_bytes=found["main_state_bytes"],
        layer_evaluations=found["layer_evaluations"],
        layer_evaluations_saved=found["layer_evaluations_saved"],
    )


def _candidate(found: dict[str, Any]) -> Candidate:
    return Candidate(
        placement=found["placement"],
        kind=found["kind"],
        cost=found["cost"],
        divergence=found["numbers"]["divergence"],
        predicted=found["predicted"],
    )

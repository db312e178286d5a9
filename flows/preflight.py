"""What can be known to fail before any work: asked in seconds, so that nothing fails after hours."""

from __future__ import annotations

from collections.abc import Sequence

from flows.errors import SpecError
from flows.spec import RunSpec
from flows.story import Story
from infra.errors import SettingsInvalid
from infra.models import ModelCard, describe
from infra.settings import Settings
from infra.sources import Sources
from pruning.errors import PruningError
from pruning.families import FAMILIES
from tasks.devices import device_names
from tasks.disk_needs import Forecast, Need, check_room
from tasks.leasing import check_lease
from tasks.requests import CalibrateRequest, Request
from tasks.sharing import sharing_of
from tasks.stage import Workplace


def check(story: Story, workplace: Workplace) -> None:
    """Raise the error of the first thing that cannot work: an unwritable store, a missing device, an unsupported
    model, windows longer than the model's context, calibration data without the columns, too little disk."""
    store, settings = workplace.store, workplace.settings
    store.preflight()
    sharing = sharing_of(settings)
    missing = [stage for stage in story.stages if not store.has(stage.ref)]
    if not missing:
        return
    sharing.check()
    check_lease(settings)
    card = _card(story.spec, workplace.sources)
    _check_family(card, story.spec)
    _check_context(card, story.spec)
    _check_device(settings)
    for request in (stage.request for stage in missing):
        if isinstance(request, CalibrateRequest):
            workplace.sources.check_columns(request.data, request.data.columns)
    _check_disk([stage.request for stage in missing], workplace)


def _check_disk(requests: Sequence[Request], workplace: Workplace) -> None:
    """All that the run will keep, and the largest scratch folder on top of it, must have room."""
    forecast = Forecast(workplace.store, workplace.sources)
    needs = [forecast.need(request) for request in requests]
    need = Need(sum(need.artifact for need in needs), max(need.scratch for need in needs))
    what = f"the run ({len(needs)} stages that are still to be made)"
    check_room(what, need, workplace.store, workplace.settings, requests=requests)


def _card(spec: RunSpec, sources: Sources) -> ModelCard:
    return describe(sources.find(spec.model.id, "model", revision=spec.model.revision))


def _check_family(card: ModelCard, spec: RunSpec) -> None:
    known = sorted({model_type for family in FAMILIES for model_type in family.model_types})
    if card.model_type not in known:
        raise PruningError(
            f"model {spec.model.id} has the unsupported architecture {card.model_type!r}; supported: {', '.join(known)}"
        )


def _check_context(card: ModelCard, spec: RunSpec) -> None:
    longest = card.max_position_embeddings
    asked = {made.variant: spec.calibration_of(made) for made in spec.derivations if made.changes.calibration}
    for variant, calibration in ({"": spec.calibration} | asked).items():
        if longest is not None and calibration is not None and calibration.seq_len > longest:
            of_variant = f" of variant {variant}" if variant else ""
            raise SpecError(
                f"calibration.seq_len {calibration.seq_len}{of_variant} is longer than the context of {spec.model.id}; "
                f"lower it to at most {longest}"
            )


def _check_device(settings: Settings) -> None:
    if settings.device in ("auto", "cpu") and settings.walk_processes == 1:
        return  # nothing to ask, and torch takes seconds to import
    names = device_names(settings.device)
    if names[0].startswith("cuda") and settings.walk_processes > len(names):
        raise SettingsInvalid(
            f"SLIMLINE_WALK_PROCESSES={settings.walk_processes}: each process needs a CUDA device of its own and there "
            f"are {len(names)}; set it to at most that"
        )

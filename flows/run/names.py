"""What Prefect's pages call a run and its stages: names that tell method and sparsity."""

from __future__ import annotations

from prefect.runtime import flow_run

from flows.run.graph import Stage
from flows.spec.run import RunSpec
from flows.spec.steps import PruneStep
from pruning.methods import asked_number
from tasks.requests import PruneRequest, RecoverRequest

#: characters of a name
_LONGEST = 160


def run_title(spec: RunSpec) -> str:
    """E.g. "demo: slimgpt 20 and 50 %, lora"."""
    steps = [_pruning(step) if isinstance(step, PruneStep) else step.recovery for step in spec.steps]
    return _cut(f"{spec.name}: {', '.join(steps) or 'dense'}")


def title_of_running() -> str:
    """That of the flow run which begins now, by its parameter `spec`."""
    spec = flow_run.parameters["spec"]
    return run_title(spec if isinstance(spec, RunSpec) else RunSpec.model_validate(spec))


def stage_title(stage: Stage) -> str:
    """Its name, with method and sparsity where that does not say them: "prune:small (slimgpt 20 %)"."""
    request = stage.request
    if not isinstance(request, PruneRequest | RecoverRequest):
        return stage.name
    sparsity, number = request.config.get("sparsity"), asked_number(request.config)
    amount = f"{100 * sparsity:g}" if isinstance(sparsity, int | float) else (number or "").replace(" ", "-")
    if request.plugin in stage.name and amount in stage.name:
        return stage.name
    return _cut(f"{stage.name} ({request.plugin}{f' {_of(amount)}' if amount else ''})")


def _pruning(step: PruneStep) -> str:
    amounts = [_of(amount) for amount in dict.fromkeys(choice.step.amount for choice in step.choices)]
    shared = [amount.removesuffix(" %") for amount in amounts[:-1]]
    words = " and ".join(filter(None, [", ".join(shared), amounts[-1]]))
    return f"{step.method} {words}"


def _of(amount: str) -> str:
    return f"{amount} %" if amount.replace(".", "").isdigit() else amount


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."

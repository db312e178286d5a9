"""The automation of the Prefect server that marks a flow run as crashed when its process was killed."""

from __future__ import annotations

import logging
from datetime import timedelta

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.events import ResourceSpecification

log = logging.getLogger("slimline")

ZOMBIES = "slimline: mark dead flow runs as crashed"
#: ten heartbeats of a flow run: on a busy machine some come late or not at all
SECONDS_WITHOUT_HEARTBEAT = 300


def ensure_zombie_automation(after_seconds: float = SECONDS_WITHOUT_HEARTBEAT) -> bool:
    """Make sure that the server has the automation, once and with these seconds; returns whether anything was changed.

    A flow run that sent a heartbeat (PREFECT_FLOWS_HEARTBEAT_FREQUENCY) and then neither another one nor any change of
    state for `after_seconds` becomes CRASHED. One that somebody switched off stays off. Needs a server that runs its
    services, not the temporary one of a single run.
    """
    wanted = _zombie_automation(after_seconds)
    with get_client(sync_client=True) as client:
        # an automation of somebody else's may have any name, ours too
        found = [each for each in client.read_automations_by_name(ZOMBIES) if each.description == wanted.description]
        for twin in found[1:]:  # two commands that started at once created one each
            client.delete_automation(twin.id)
        if not found:
            client.create_automation(wanted)
        elif (found[0].trigger, found[0].actions) != (wanted.trigger, wanted.actions):
            client.update_automation(found[0].id, wanted.model_copy(update={"enabled": found[0].enabled}))
        else:
            return len(found) > 1
    log.info("flow runs without a sign of life for %g s are marked crashed from now on", after_seconds)
    return True


def _zombie_automation(after_seconds: float) -> AutomationCore:
    return AutomationCore(
        name=ZOMBIES,
        description="A process that was killed cannot say so; its flow run would stay RUNNING.",
        enabled=True,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            # any event of the flow run: also one that is paused or waits for its retry is not dead
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=after_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"No sign of life for {after_seconds:g} s: its process was killed?"
            )
        ],
    )

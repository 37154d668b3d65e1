"""Health: alive is who answers; ready is who answers a golden request rightly, through the whole server, and does not drain."""

from __future__ import annotations

import asyncio

from grc.runtime.server.logs import request_id
from grc.runtime.server.models import Model, Models
from grc.runtime.server.refusal import Refused
from grc.runtime.server.service import Call, Service


class Health:
    def __init__(self, service: Service, models: Models, timeout: float):
        self.service, self.models, self.timeout = service, models, timeout
        self.draining = False

    def ready(self) -> bool:
        return not self.draining and all(model.healthy for model in self.models.all.values())

    def model_ready(self, name: str) -> bool:
        return not self.draining and self.models.all[name].healthy

    async def watch(self, seconds: float) -> None:
        """Send a canary to every model now and then, for ever."""
        while True:
            await asyncio.gather(*(self.probe(model) for model in list(self.models.all.values())))
            await asyncio.sleep(seconds)

    async def probe(self, model: Model) -> None:
        """One golden request, answered as any other would be, and the example through the artifact's own functions. A server
        that is too busy for it is busy, not ill."""
        version = model.version
        call = Call(f"canary-{request_id()}", "canary", self.timeout)
        reason = None
        try:
            async with asyncio.timeout(self.timeout):
                answer = await self.service.compute(call, version, version.canary.inputs)
                if not version.answers_rightly(answer):
                    reason = "it answers wrongly"
                elif version.example is not None:
                    await self.service.rehearse(call, version, version.example)
        except TimeoutError:
            reason = f"it did not answer within {self.timeout:g} s"
        except Refused as refused:
            if refused.status == 503:
                return
            reason = refused.message
        except Exception as error:  # whatever it is, it would have hit a user's request as well
            reason = str(error)
        if model.version is not version:  # replaced meanwhile: the next canary asks the new one
            return
        if model.healthy != (reason is None):
            level, event = ("info", "canary answered") if reason is None else ("error", "canary failed")
            self.service.log(level, event, id=call.id, model=model.name, version=version.number, message=reason)
        model.healthy = reason is None
        self.service.metrics.canary.labels(model.name).set(float(model.healthy))

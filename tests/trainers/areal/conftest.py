"""AReaL's own actor, loss, configuration and tracker, without the parts of its package that serve, schedule and launch.

Its `__init__` files import all of those, which need about sixty packages. The packages on the path are therefore
imported without running their `__init__`, and four modules that the loss does not use are empty.
"""

import importlib.util
import sys
import types
from pathlib import Path

_SPEC = importlib.util.find_spec("areal")
assert _SPEC is not None
_ROOT = Path(_SPEC.submodule_search_locations[0])


def _enter(name: str, *, package: bool = True, **names: object) -> None:
    module = types.ModuleType(name)
    if package:
        module.__path__ = [str(_ROOT.joinpath(*name.split(".")[1:]))]
    module.__dict__.update(names)
    sys.modules[name] = module


for _name in ("areal", "areal.trainer", "areal.trainer.ppo", "areal.infra.rpc"):
    _enter(_name)
_enter("areal.infra", TrainController=object)
_platform = types.SimpleNamespace(is_initialized=lambda: False)
_enter("areal.infra.platforms", package=False, current_platform=_platform, is_npu_available=False)
_enter("areal.infra.rpc.serialization", package=False, serialize_value=None)
_enter("areal.experimental.training_service.controller.controller", package=False, GatewayTrainController=object)
_enter("areal.utils.perf_tracer", package=False, trace_perf=lambda *_, **__: lambda function: function)

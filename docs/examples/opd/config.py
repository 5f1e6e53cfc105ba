"""The configuration: a dataclass a block, filled from YAML and `dotted.key=value`; wrong keys name the nearest one."""

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kdloss import schedules
from kdloss.config import KDRLConfig

MODES = {
    "sft": "cross-entropy on responses that the teacher writes (forward KL, off-policy)",
    "distill": "reverse KL to the teacher on the student's own responses (RL weight 0)",
    "grpo": "reinforcement learning alone (distillation weight 0)",
    "kdrl": "both: GRPO and reverse KL on the same responses",
    "kdrl-full": "GRPO, and the forward KL to the teacher's whole distribution in groups without a success",
    "kdrl-direct": "the joint loss read literally, logp - teacher_logp as a penalty: no teacher in its gradient",
}
ALIASES = {"student": "actor"}
DTYPES = ("float32", "bfloat16", "float16")
AT_LEAST_ONE = (
    "total_train_steps",
    "actor.ppo_n_minibatches",
    "actor.mb_spec.n_mbs",
    "gconfig.n_samples",
    "gconfig.max_new_tokens",
    "data.batch_size",
    "endpoint.attempts",
    "endpoint.concurrency",
    "evaluator.freq_steps",
    "evaluator.size",
    "evaluator.final_size",
    "evaluator.batch_size",
    "saver.freq_steps",
    "saver.keep",
)
POSITIVE = (
    "actor.optimizer.lr",
    "actor.optimizer.gradient_clipping",
    "actor.behave_imp_weight_cap",
    "gconfig.temperature",
    "gconfig.top_p",
    "endpoint.timeout",
)
NOT_NEGATIVE = ("actor.optimizer.weight_decay", "actor.optimizer.warmup_steps", "rollout.max_head_offpolicyness")
LOCAL_TEACHER = ("device_map",)  # keys of the `teacher:` block that are read here and not by the loss


class ConfigError(ValueError):
    """A mistake in the YAML file or on the command line, told in one line."""


@dataclass
class Optimizer:
    """AdamW with linear warm-up."""

    lr: float = 6e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_steps: int = 15
    gradient_clipping: float = 1.0


@dataclass
class MicroBatches:
    """Into how many parts a mini-batch is cut to fit in memory; the gradient does not depend on it."""

    n_mbs: int = 1


@dataclass
class Actor:
    """The student and its update."""

    path: str = "???"
    dtype: str = "float32"
    device_map: Any = None
    attn_impl: str | None = None
    gradient_checkpointing: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    mb_spec: MicroBatches = field(default_factory=MicroBatches)
    ppo_n_minibatches: int = 1
    behave_imp_weight_cap: float = 2.0
    scheduling_spec: Any = None


@dataclass
class Generation:
    """How responses are sampled; every log-prob is taken at this temperature."""

    n_samples: int = 8
    max_new_tokens: int = 24
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class Rollout:
    """How many updates old the policy that sampled a batch is (0: on-policy)."""

    max_head_offpolicyness: int = 0


@dataclass
class Data:
    """JSON lines in GSM8K's format; without a path, an endless source: a cipher, or word problems."""

    path: str | None = None
    task: str = "word-problems"
    eval_path: str | None = None
    batch_size: int = 16
    instruction: str = ""


@dataclass
class Endpoint:
    """A server that scores tokens, used in place of a local teacher when `url` is set."""

    url: str | None = None
    kind: str = "vllm"
    model: str | None = None
    api_key_variable: str = "TEACHER_API_KEY"
    timeout: float = 120.0
    attempts: int = 5
    concurrency: int = 16


@dataclass
class Evaluator:
    """Held-out accuracy at the training temperature, on more questions before the first and after the last update."""

    freq_steps: int = 10
    size: int = 400
    final_size: int = 2000
    batch_size: int = 500
    teacher: bool = False


@dataclass
class Saver:
    """Checkpoints, from which a killed run goes on."""

    freq_steps: int = 10
    keep: int = 2


@dataclass
class Config:
    """The whole run."""

    experiment_name: str = "???"
    trial_name: str = "${mode}"
    mode: str = "kdrl"
    fileroot: str = "outputs"
    seed: int = 1
    total_train_steps: int = 150
    actor: Actor = field(default_factory=Actor)
    teacher: dict[str, Any] = field(default_factory=dict)
    endpoint: Endpoint = field(default_factory=Endpoint)
    schedule: dict[str, Any] = field(default_factory=dict)
    gconfig: Generation = field(default_factory=Generation)
    rollout: Rollout = field(default_factory=Rollout)
    data: Data = field(default_factory=Data)
    evaluator: Evaluator = field(default_factory=Evaluator)
    saver: Saver = field(default_factory=Saver)
    scheduler: dict[str, Any] = field(default_factory=dict)  # of the launcher that the seed's command line speaks to

    @property
    def run_dir(self) -> Path:
        """Where this trial's metrics and checkpoints lie; its parent holds the trials that it is compared with."""
        return Path(self.fileroot) / self.experiment_name / self.trial_name


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads `path`, applies `dotted.key=value` overrides and checks everything that can be checked without a model."""
    path, overrides = Path(path), list(overrides)
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"expected dotted.key=value, got {item!r}")
    try:
        given = OmegaConf.merge(_renamed(_load(path)), _renamed(OmegaConf.from_dotlist(overrides)))
        _check_keys(OmegaConf.to_container(given), Config, "")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0] + (f" (in {error.full_key})" if error.full_key else "")) from error
    _check_choice("mode", config.mode, MODES)
    _check_choice("endpoint.kind", config.endpoint.kind, ("vllm", "sglang", "openai"))
    _check_choice("data.task", config.data.task, ("cipher", "word-problems"))
    _check_choice("actor.dtype", config.actor.dtype, DTYPES)
    _check_choice("teacher.dtype", config.teacher.get("dtype", config.actor.dtype), DTYPES)
    _check_ranges(config)
    for block, key in ((config.actor, "path"), (config.data, "path"), (config.data, "eval_path")):
        setattr(block, key, _beside(path, getattr(block, key)))
    if not isinstance(config.teacher.get("path"), str | None):
        raise ConfigError(f"teacher.path must be text, got {config.teacher['path']!r}")
    config.teacher["path"] = _beside(path, config.teacher.get("path"))
    _check_together(config)
    return config


def loss_config(config: Config) -> KDRLConfig:
    """The `teacher:` block as the loss's hyperparameters, with the weights that `mode` stands for."""
    block = {key: value for key, value in config.teacher.items() if key not in LOCAL_TEACHER}
    if config.mode in ("distill", "sft"):
        block["rl_loss_weight"] = 0.0
    if config.mode == "grpo":
        block["distill_loss_weight"] = 0.0
    if config.mode == "sft":  # its loss has no such term
        block.setdefault("distill_loss_weight", 0.0)
    if config.mode == "kdrl-direct":
        block["direct_penalty"] = True
    try:
        return KDRLConfig.from_mapping(block)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"teacher: {error}") from error


def weight_schedule(config: Config) -> Callable[[int], float]:
    """The distillation weight as a function of the update; `teacher.distill_loss_weight` when no schedule is named."""
    arguments = dict(config.schedule)
    name = arguments.pop("name", "constant")
    if config.mode == "grpo":
        return lambda step: 0.0
    _check_choice("schedule.name", name, ("constant", "linear_floor", "cosine", "switch"))
    if name == "constant":
        arguments.setdefault("value", loss_config(config).distill_loss_weight)
    function = getattr(schedules, name)
    known = [key for key in inspect.signature(function).parameters if key != "step"]
    for key in arguments:
        _check_choice("schedule", key, known)
    try:
        function(0, **arguments)
    except TypeError as error:
        raise ConfigError(f"schedule: {error}") from error
    return lambda step: float(function(step, **arguments))


def _load(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno)}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected `key: value` lines, got a list")
    return loaded


def _check_ranges(config: Config) -> None:
    bounds = [(AT_LEAST_ONE, "at least 1", lambda x: x >= 1), (POSITIVE, "above 0", lambda x: x > 0)]
    for names, told, holds in [*bounds, (NOT_NEGATIVE, "at least 0", lambda x: x >= 0)]:
        for name in names:
            value = attrgetter(name)(config)
            if not holds(value):
                raise ConfigError(f"{name} must be {told}, got {value}")
    if config.gconfig.top_p > 1:
        raise ConfigError(f"gconfig.top_p must be at most 1, got {config.gconfig.top_p}")


def _check_together(config: Config) -> None:
    if config.endpoint.url and not config.endpoint.url.startswith(("http://", "https://")):
        raise ConfigError(f"endpoint.url must begin with http:// or https://, got {config.endpoint.url!r}")
    if config.endpoint.url and config.gconfig.temperature != 1:
        raise ConfigError("endpoint.url needs gconfig.temperature=1: servers score prompts at temperature 1")
    local, remote = bool(config.teacher.get("path")), bool(config.endpoint.url)
    if config.mode == "sft" and (remote or not local):
        raise ConfigError("mode sft lets the teacher write: it needs teacher.path, and no endpoint.url")
    if config.mode == "kdrl-full" and (remote or not local or "WORLD_SIZE" in os.environ):
        raise ConfigError("mode kdrl-full reads the teacher's hidden states: it needs teacher.path and one process")
    if config.mode != "grpo" and not (local or remote):
        raise ConfigError(f"mode {config.mode} needs a teacher: set teacher.path or endpoint.url")
    if config.mode in ("kdrl-full", "sft") and loss_config(config).reduction != "token_mean":
        raise ConfigError(f"mode {config.mode} takes a mean over tokens: it needs teacher.reduction=token_mean")
    loss_config(config)
    weight_schedule(config)
    if config.data.path and not config.data.eval_path:
        raise ConfigError("data.path needs data.eval_path, the held-out questions")
    if "WORLD_SIZE" in os.environ and (config.actor.device_map or config.teacher.get("device_map")):
        raise ConfigError("device_map spreads one process over devices; it cannot be joined with torchrun")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if min(config.evaluator.size, config.evaluator.final_size) < processes:
        raise ConfigError(f"evaluator.size and final_size must be at least the number of processes, {processes}")
    if config.data.batch_size % processes:
        raise ConfigError(f"data.batch_size ({config.data.batch_size}) must be a multiple of the {processes} processes")
    rows = config.data.batch_size // processes * config.gconfig.n_samples
    parts = config.actor.ppo_n_minibatches * config.actor.mb_spec.n_mbs
    if rows < parts:
        raise ConfigError(f"actor.ppo_n_minibatches * actor.mb_spec.n_mbs ({parts}) exceeds the {rows} responses")


def _renamed(config: DictConfig) -> DictConfig:
    for alias, name in ALIASES.items():
        if alias in config and name in config:
            raise ConfigError(f"{alias} is another name of {name}: give one of them")
    return OmegaConf.create({ALIASES.get(key, key): value for key, value in config.items_ex(resolve=False)})


def _beside(config_path: Path, path: str | None) -> str | None:
    """Paths that begin with a dot are relative to the YAML file; others, `Qwen/Qwen3-0.6B` among them, stay.

    The result is absolute, so that a run is the same run however the command names the YAML file.
    """
    return str((config_path.parent / path).resolve()) if path and path.startswith(".") else path


def _check_keys(given: Mapping, schema: type, prefix: str) -> None:
    known = {f.name: f.type for f in fields(schema)}
    for key, value in given.items():
        _check_choice(prefix.rstrip(".") or "configuration", key, known)
        if is_dataclass(known[key]) and isinstance(value, Mapping):
            _check_keys(value, known[key], f"{prefix}{key}.")


def _check_choice(where: str, given: Any, known: Iterable[str]) -> None:
    known = list(known)
    if given not in known:
        near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"{where}: unknown {given!r}; {hint}")

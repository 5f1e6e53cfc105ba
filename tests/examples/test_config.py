"""Holds the configuration: the seed's block and command line, unchanged, and errors that name the nearest valid key."""

from pathlib import Path

import pytest
from opd.config import ConfigError, load_config, loss_config, weight_schedule

KDRL = Path(__file__).parents[2] / "docs" / "examples" / "kdrl.yaml"
GSM8K, CIPHER = KDRL.with_name("gsm8k.yaml"), KDRL.with_name("cipher.yaml")

SEED = """
experiment_name: gsm8k-grpo-distillation
trial_name: trial0
actor:
  path: Qwen/Qwen3-0.6B
  dtype: bfloat16
  scheduling_spec: [{gpu: 1}]
teacher:
  backend: fsdp:d1p1t4
  rl_loss_weight: 1.0
  distill_loss_weight: 0.005
  experiment_name: ${experiment_name}
  trial_name: ${trial_name}
  path: Qwen/Qwen3-32B
  init_from_scratch: false
  disable_dropout: true
  dtype: ${actor.dtype}
  mb_spec:
    max_tokens_per_mb: 10240
  optimizer: null
  scheduling_spec: ${actor.scheduling_spec}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_the_seeds_teacher_block_and_command_line(tmp_path):
    line = ["scheduler.type=local", "experiment_name=other", "trial_name=trial1"]
    config = load_config(write(tmp_path, SEED), line)
    assert config.run_dir == Path("outputs/other/trial1")
    assert config.teacher["path"] == "Qwen/Qwen3-32B"
    assert config.teacher["dtype"] == "bfloat16"
    assert config.teacher["trial_name"] == "trial1"
    loss = loss_config(config)
    assert (loss.rl_loss_weight, loss.distill_loss_weight) == (1.0, 0.005)
    assert loss.ignored["backend"] == "fsdp:d1p1t4"
    assert loss.ignored["mb_spec"] == {"max_tokens_per_mb": 10240}
    assert loss.ignored["scheduling_spec"] == [{"gpu": 1}]


@pytest.mark.parametrize("path", [KDRL, GSM8K, CIPHER])
def test_the_shipped_files_are_good(path):
    config = load_config(path)
    assert config.trial_name == config.mode == "kdrl"
    assert "${" not in str(config)


def test_dotted_paths_are_relative_to_the_file_and_others_are_left_alone(tmp_path):
    assert Path(load_config(KDRL).actor.path).samefile(KDRL.parent / "tiny" / "student")
    assert load_config(write(tmp_path, SEED)).actor.path == "Qwen/Qwen3-0.6B"


def test_a_configuration_is_the_same_however_its_file_is_named(monkeypatch):
    monkeypatch.chdir(CIPHER.parents[1])
    relative = Path(CIPHER.parent.name, CIPHER.name)
    data = ["data.path=./train.jsonl", "data.eval_path=./test.jsonl"]
    assert load_config(relative, data) == load_config(CIPHER, data)


def test_student_is_another_name_of_actor():
    config = load_config(KDRL, ["student.device_map=auto", "student.optimizer.lr=1e-3"])
    assert config.actor.device_map == "auto"
    assert config.actor.optimizer.lr == 1e-3
    assert config.actor.optimizer.warmup_steps == 15


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actr.path=x", "configuration: unknown 'actr'; did you mean 'actor'?"),
        ("actor.optimizer.learning_rate=1", "actor.optimizer: unknown 'learning_rate'; known: lr, "),
        ("actor.optimizer.warmup=1", "actor.optimizer: unknown 'warmup'; did you mean 'warmup_steps'?"),
        ("teacher.distil_loss_weight=1", "teacher: unknown key 'distil_loss_weight'; the nearest valid key is '"),
        ("teacher.kd_discount=2", "teacher: kd_discount must be in 0 .. 1, got 2"),
        ("data.task=cypher", "data.task: unknown 'cypher'; did you mean 'cipher'?"),
        ("mode=kdlr", "mode: unknown 'kdlr'; did you mean 'kdrl'?"),
        ("endpoint.kind=vlm", "endpoint.kind: unknown 'vlm'; did you mean 'vllm'?"),
        ("schedule.name=cosin", "schedule.name: unknown 'cosin'; did you mean 'cosine'?"),
        ("schedule.valu=1", "schedule: unknown 'valu'; did you mean 'value'?"),
        ("gconfig.n_samples=many", "could not be converted to Integer (in gconfig.n_samples)"),
        ("gconfig.n_samples", "expected dotted.key=value, got 'gconfig.n_samples'"),
        ("data.path=some.jsonl", "data.path needs data.eval_path"),
        ("actor.mb_spec.n_mbs=1000", "exceeds the 16 responses"),
        ("saver.keep=0", "saver.keep must be at least 1, got 0"),
        ("actor.optimizer.lr=-1", "actor.optimizer.lr must be above 0, got -1.0"),
        ("rollout.max_head_offpolicyness=-1", "rollout.max_head_offpolicyness must be at least 0, got -1"),
        ("gconfig.top_p=1.5", "gconfig.top_p must be at most 1, got 1.5"),
        ("actor.dtype=bfloat", "actor.dtype: unknown 'bfloat'; did you mean 'bfloat16'?"),
        ("teacher.dtype=half", "teacher.dtype: unknown 'half'; known: float32, bfloat16, float16"),
        ("teacher.path=3", "teacher.path must be text, got 3"),
        ("endpoint.url=127.0.0.1:8000", "endpoint.url must begin with http:// or https://, got '127.0.0.1:8000'"),
        ("experiment_name=${no.such}", "Interpolation key 'no.such' not found"),
    ],
)
def test_a_mistake_is_told_in_one_line(override, message):
    with pytest.raises(ConfigError) as raised:
        load_config(KDRL, [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,", r"not YAML: .*run\.yaml.*line \d"),
        ("- a", "expected `key: value` lines, got a list"),
        ("actor: {path: a}\nstudent: {path: b}", "student is another name of actor: give one of them"),
    ],
)
def test_a_file_that_is_no_configuration_is_told_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_what_cannot_go_together_says_so(monkeypatch):
    with pytest.raises(ConfigError, match="servers score prompts at temperature 1"):
        load_config(KDRL, ["endpoint.url=http://127.0.0.1:1", "gconfig.temperature=0.5"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"data.batch_size \(4\) must be a multiple of the 3 processes"):
        load_config(KDRL)
    with pytest.raises(ConfigError, match=r"device_map .* cannot be joined with torchrun"):
        load_config(KDRL, ["student.device_map=auto"])
    with pytest.raises(ConfigError, match="at least the number of processes, 3"):
        load_config(KDRL, ["evaluator.size=2", "data.batch_size=3"])


def test_a_missing_file_or_value_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="experiment_name"):
        load_config(write(tmp_path, "actor: {path: x}\nteacher: {path: y}"))


def test_modes_that_need_a_teacher_say_so(tmp_path):
    path = write(tmp_path, "experiment_name: x\nactor: {path: x}")
    assert load_config(path, ["mode=grpo"]).teacher["path"] is None
    with pytest.raises(ConfigError, match="mode distill needs a teacher"):
        load_config(path, ["mode=distill"])
    with pytest.raises(ConfigError, match="mode sft lets the teacher write"):
        load_config(path, ["mode=sft", "endpoint.url=http://127.0.0.1:1"])
    with pytest.raises(ConfigError, match="mode kdrl-full reads the teacher's hidden states"):
        load_config(KDRL, ["mode=kdrl-full", "endpoint.url=http://127.0.0.1:1"])
    for mode in ("kdrl-full", "sft"):
        with pytest.raises(ConfigError, match=rf"mode {mode} .* needs teacher\.reduction=token_mean"):
            load_config(KDRL, [f"mode={mode}", "teacher.reduction=sequence_mean"])


def test_modes_that_distil_need_a_weight_and_the_others_none(tmp_path):
    path = write(tmp_path, "experiment_name: x\nactor: {path: x}\nteacher: {path: y}")
    assert [loss_config(load_config(path, [f"mode={mode}"])).distill_loss_weight for mode in ("grpo", "sft")] == [0, 0]
    for mode in ("distill", "kdrl", "kdrl-direct"):
        with pytest.raises(ConfigError, match=r"teacher: block must hold distill_loss_weight: docs/weights\.md"):
            load_config(path, [f"mode={mode}"])
        config = load_config(path, [f"mode={mode}", "teacher.distill_loss_weight=1"])
        assert loss_config(config).distill_loss_weight == 1


def test_a_mode_sets_the_weights():
    weights = {}
    for mode in ("distill", "grpo", "kdrl", "kdrl-direct"):
        loss = loss_config(load_config(KDRL, [f"mode={mode}"]))
        weights[mode] = (loss.rl_loss_weight > 0, loss.distill_loss_weight > 0, loss.direct_penalty)
    assert weights == {
        "distill": (False, True, False),
        "grpo": (True, False, False),
        "kdrl": (True, True, False),
        "kdrl-direct": (True, True, True),
    }


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["teacher.distill_loss_weight=0.25"], [0.25] * 4),
        (["schedule={name: linear_floor, start: 1.0, slope: 0.4, floor: 0.1}"], [1, 0.6, 0.2, 0.1]),
        (["schedule={name: cosine, start: 1.0, end: 0.0, total_steps: 2}"], [1, 0.5, 0, 0]),
        (["schedule={name: switch, before: 1.0, after: 0.0, at: 2}"], [1, 1, 0, 0]),
        (["schedule={name: switch, before: 1.0, after: 0.0, at: 2}", "mode=grpo"], [0, 0, 0, 0]),
    ],
)
def test_weight_schedules(overrides, weights):
    weight_at = weight_schedule(load_config(KDRL, overrides))
    assert [weight_at(step) for step in range(4)] == pytest.approx(weights)


def test_a_schedule_without_its_arguments_says_which():
    with pytest.raises(ConfigError, match=r"schedule: .*missing.*'total_steps'"):
        load_config(KDRL, ["schedule.name=cosine", "schedule.start=1.0", "schedule.end=0.0"])

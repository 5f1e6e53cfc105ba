"""Holds the advice of errors ("pass X", "use X", "call X"): each has a test that does what the text says.

`FOLLOWED` names that test for every text of the package that gives advice, and the code that takes the way out. The
tests of this file follow the advice that many functions share.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kdloss
from bad_calls import BAD
from cases import TABLE
from contract import call, public_function

TESTS = Path(__file__).parents[1]
ADVICE = re.compile(
    r"(?:^|[;:,(.?] |\b(?:or|there|tokens) )(?:they are per token: |under \w+, )?"
    r"(?:pass|use|call|convert|set|unset|expand|flatten|write|load|pad|put|take|let|have|leave it|divide|train"
    r"|score|draw|ask|return a|bind|rename)\b",
    re.IGNORECASE,
)
HERE = "every_function/test_advice.py"
HEADS, MODELS = "_softmax/test_output_head.py", "_softmax/test_output_head_models.py"
SHARDED = "scale_out/cases_heads.py"
CALLS = "testing/test_calls.py"
BATCH = "_losses/test_check_batch.py"
DIFFERENTIATION, FUSED = "every_function/test_differentiation.py", "_logprobs/test_fused.py"
AREAL, NEMO, SLIME = (f"integrations/test_{name}.py" for name in ("areal", "nemo_rl", "slime"))
PRIME, OPENRLHF, TRL = (f"integrations/test_{name}.py" for name in ("prime_rl", "openrlhf", "trl"))
MODEL = "integrations/test_transformers.py"

# A part of the text: the file and the test that follow its advice, and code of that test that does.
FOLLOWED = {
    "use weight, bias, softcap, logit_scale": (HEADS, "head_logp", "bias=bias, softcap=softcap, logit_scale="),
    "; pass its .": (HERE, "test_a_model_output_is_told_to_pass_its_logits", "output.logits"),
    "convert it with rewards.float()": (HERE, "test_converted_as_the_error_says", "eval("),
    "; convert it with ": (HERE, "test_converted_as_the_error_says", "eval("),
    "pass {}.bfloat16() * scale": (HERE, "test_float8_is_refused_and_its_way_out_works", ".bfloat16() * scale"),
    "expand one value per sequence": (
        "every_function/test_errors.py",
        "test_advantages_of_padded_sequences_are_told_how_to_become_per_token",
        "advantages[:, None].expand_as(logp)",
    ),
    "flatten a padded (B, L) tensor": (HERE, "test_a_padded_tensor_is_flattened", "torch.arange(0, B * L + 1, L)"),
    "write 5.0e-3": (HERE, "test_a_number_that_yaml_reads_as_text_is_written_otherwise", "5.0e-3"),
    "as int32, got {}; use int64": (HERE, "test_lengths_past_int32_are_int64", ".long()"),
    "; use {}": (HERE, "test_the_end_of_a_mixture_is_the_function_that_is_named", "public_function(named)"),
    "pass the true vocab_size": (HERE, "test_heads_that_differ_in_padding_take_the_true_vocab_size", "vocab_size=7"),
    "pass what is sequence-level": (HERE, "test_a_coupled_loss_becomes_two_steps_or_an_input", "mean.detach()"),
    "leave it out to distill": (HERE, "test_a_direct_penalty_is_left_out", "kdloss.kdrl_loss(*inputs, **options)"),
    "under FSDP2, use kdloss.output_head": (SHARDED, "loss", "kdloss.output_head(head)"),
    "pad them, labels with -100": ("scale_out/cases_vocabulary.py", "case_dtensors_of_two_dimensions", ", -100)"),
    "pass loss_mask & {}, or response_mask(": (
        "_logprobs/test_numerics.py",
        "test_a_trained_row_without_a_label_is_refused_with_the_count_and_ways_out",
        "kdloss.response_mask(torch.tensor([2]), cu_seqlens=cu_seqlens)",
    ),
    "pass the number of tokens, such as": (
        "_packing/test_layout.py",
        "test_the_number_of_tokens_is_read_on_the_cpu_and_asked_for_elsewhere",
        "function(**elsewhere, total_tokens=7)",
    ),
    "Take kd_discount=0 until": (
        "_losses/test_check_batch.py",
        "test_the_ways_out_lead_to_a_sound_batch",
        "check(batch, kd_discount=0",
    ),
    "pass {}.full_tensor(), or {}.to_local()": (
        "scale_out/cases_models.py",
        "case_a_dtensor_among_plain_tensors_is_named",
        "(distributed.full_tensor(), distributed.to_local())",
    ),
    "pass None for no softcap": (HERE, "test_no_softcap_is_none", "softcap=None"),
    "convert them with labels.long()": (
        "every_function/test_errors.py",
        "test_one_rule_says_which_integers_an_argument_takes",
        "narrow[argument].long()",
    ),
    # one derivative, in reverse mode
    "Use reverse mode": (DIFFERENTIATION, "test_the_way_out_of_these_errors", "torch.autograd.grad(kdloss.token_logp"),
    "write this term with torch's operations": (
        DIFFERENTIATION,
        "test_the_way_out_of_these_errors",
        "logits.log_softmax(-1).gather(-1, labels[..., None])",
    ),
    # token losses
    "Draw random numbers before, and pass them": (FUSED, "test_the_ways_out_of_these_errors", "torch.rand(T)"),
    "return a new tensor": (FUSED, "test_the_ways_out_of_these_errors", "2 * logp"),
    # the auditor
    "(the standard deviation of a group), pass batch_size": (
        CALLS,
        "test_a_group_that_lacks_sequences_is_told_to_pass_batch_size",
        "batch_size=2",
    ),
    "return a scalar and pass batch_size": (
        CALLS,
        "test_the_scalar_form_of_a_coupled_loss_is_enumerated",
        "audit(centred, tree, batch_size=2)",
    ),
    "pass batch_size={}, or take": (CALLS, "test_each_way_out_of_too_many_batches_works", "batch_size=size"),
    "bind a number with": (
        CALLS,
        "test_a_parameter_that_no_batch_has_is_bound",
        " partial(kdloss.kdrl_loss, distill_loss_weight=1.0",
    ),
    "rename {} to {}": (CALLS, "test_a_parameter_with_another_name_for_a_field_is_renamed", "def wrapped("),
    "take an argument loss_mask and select": (CALLS, "SCALARS", "lambda x, loss_mask: torch.where(loss_mask, x, 0)"),
    "Take out what is random": (CALLS, "test_a_module_is_called_by_the_names_of_its_forward", "Dropout(0.5).eval()"),
    "write to a copy": (CALLS, "test_a_loss_that_writes_to_a_copy_is_taken", ".clone().masked_fill_("),
    # output_head
    "which flattens them: call the loss": ("scale_out/cases_models.py", "case_fsdp2", "sharded(x, mesh"),
    "pass the module that makes the logits": (HERE, "test_the_module_that_makes_the_logits_is_passed", "model[1]"),
    "load the head without quantization": (HEADS, "test_any_dtype_and_device_of_a_linear_layer", "dtype=dtype"),
    "split or freed: under FSDP1": (HERE, "test_the_module_that_makes_the_logits_is_passed", "token_logprobs(model("),
    "call unmerge_adapter()": (
        MODELS,
        "test_inactive_disabled_and_merged_adapters_are_as_the_forward_has_them",
        "model.unmerge_adapter()",
    ),
    "Under FSDP2, pass the whole model": (
        SHARDED,
        "case_head_in_the_group_of_the_root",
        "loss(ranks, sharded, sharded",
    ),
    "pass the module that makes its logits": (HERE, "test_the_module_that_makes_the_logits_is_passed", "model[1]"),
    "in training mode: call eval()": (
        MODELS,
        "test_lora_dropout_in_training_mode_is_refused_and_each_way_out_works",
        "lm_head.eval()",
    ),
    "pass its head, output_head(": (
        MODELS,
        "test_logits_that_are_not_scaled_and_capped_are_refused_with_the_way_out",
        "kdloss.output_head(model.get_output_embeddings())",
    ),
    "pass the module that does, or": (HERE, "test_the_module_that_makes_the_logits_is_passed", "model[1]"),
    "take log-probs from the model's own logits": (
        MODELS,
        "test_other_adapters_are_refused_with_the_way_out",
        "logits",
    ),
    # check_batch
    "Pass rewards= and group_size=": (
        BATCH,
        "test_a_group_of_equal_rewards_is_told_from_lost_advantages_by_its_rewards",
        "check(batch).wrong",
    ),
    "or pass loss_mask & (labels != -100)": (
        BATCH,
        "test_the_ways_out_lead_to_a_sound_batch",
        "loss_mask=late & (labels != -100)",
    ),
    "is not one per sequence, ({},); pass cu_seqlens": (BATCH, "check", "batch | changes"),
    "group_size and group_ids exclude each other; pass": (
        BATCH,
        "test_sound_batches_are_ok",
        "group_size=None, group_ids=",
    ),
    "; pass labels= to see": (BATCH, "rollout", '"labels": labels'),
    "leave them out of loss_mask, or score": (BATCH, "test_the_ways_out_lead_to_a_sound_batch", "~missing.isnan()"),
    "no value is below 0: these are": (BATCH, "test_the_ways_out_lead_to_a_sound_batch", "logp.exp().log()"),
    "Score logp and old_logp for the same tokens": (BATCH, "test_sound_batches_are_ok", "rollout(seed"),
    ", one per sequence: pass {}": (BATCH, "test_the_ways_out_lead_to_a_sound_batch", "advantages=spread"),
    "; pass group_size= or group_ids=": (BATCH, "rollout", '"group_size": 4'),
    # adapters of trainers and servers
    "use to_prediction_positions": (
        "_losses/test_alignment.py",
        "test_a_server_that_was_not_shifted",
        "kdloss.to_prediction_positions(own",
    ),
    "too few for a correlation of {}; take more": (
        "_losses/test_alignment.py",
        "test_a_moderate_relation_in_few_tokens_is_not_called_nothing",
        "torch.ones(500)",
    ),
    "or the teacher is nearly the student; take more": (
        BATCH,
        "test_a_teacher_that_is_nearly_the_student_is_not_taken_for_the_policy_that_sampled",
        "check(rollout()",
    ),
    "pass teacher_logp.maximum(logp - clip)": (
        BATCH,
        "test_the_ways_out_lead_to_a_sound_batch",
        "scored.maximum(logp - clip)",
    ),
    "pass loss_mask & kd_mask here": (BATCH, "test_the_ways_out_lead_to_a_sound_batch", "mask & kd_mask"),
    "take more tokens of varied text": (
        "_losses/test_alignment.py",
        "test_why_nothing_was_found_has_its_own_answer",
        "logp, logp",
    ),
    "trained tokens are too few; take": (
        "_losses/test_alignment.py",
        "test_seventy_tokens_are_enough_for_a_correlation_of_seven_tenths",
        "torch.ones(tokens)",
    ),
    "have the server send ids": (
        "integrations/test_servers.py",
        "test_openai_texts_need_their_ids",
        "token_id=token_id",
    ),
    "exclude each other; set one": (AREAL, "MODES", '"sapo": {"use_sapo_loss": True}'),
    "unset use_decoupled_loss and rejection_sampling": (AREAL, "MODES", '"sapo": {"use_sapo_loss": True}'),
    "or use use_cispo_loss=True, which takes both": (AREAL, "MODES", '"cispo": {"use_cispo_loss": True}'),
    "use importance_sampling_level='token'": (AREAL, "MODES", '"cispo": {"use_cispo_loss": True}'),
    "set c_clip to None": (AREAL, "CLIPS", '"c_clip": None'),
    "use importance_sampling_level=": (AREAL, "test_a_slice_of_a_sequence_gives_no_sequence_level", "run(part, piece)"),
    "let AReaL recompute it": (
        AREAL,
        "test_versions_are_read_at_the_token_that_they_belong_to",
        'prox_logp_method="loglinear"',
    ),
    "use teacher_alignment='token'": (
        AREAL,
        "test_a_teacher_behind_a_rollout_engine_is_shifted",
        'teacher_alignment="token"',
    ),
    "use teacher_alignment='prediction'": (
        AREAL,
        "test_scores_that_are_in_place_are_not_shifted_again",
        "run(batch, logp), reference",
    ),
    "use a teacher that is not behind": (AREAL, "test_padded_is_packed", "run("),
    "set it to 0, or use_kl_in_reward": (
        NEMO,
        "test_a_setting_that_it_does_not_have_is_refused",
        '"use_kl_in_reward": True',
    ),
    "put teacher_policy.get_logprobs": (NEMO, "test_data_without_a_teacher_is_refused", 'teacher_key="other"'),
    "loss_fn.force_on_policy_ratio is True: set it": (NEMO, "test_placeholders_are_no_log_probs", "torch.full_like"),
    "unset it, or use NeMo-RL's": (NEMO, "test_a_configuration_is_a_mapping_or_an_object", "from_config(given"),
    "use 'ratio', or is_correction_level='off'": (OPENRLHF, "test_settings_that_it_does_not_have", '"ratio"'),
    "let the algorithm score it": (
        PRIME,
        "test_a_sample_that_no_teacher_scored_is_refused",
        "distill_loss_weight=0.0",
    ),
    "score every sample of the batch": (PRIME, "test_zeros_are_no_teacher", "kdrl_loss(sure, "),
    "set --use-opd with --opd-type megatron": (
        SLIME,
        "test_a_batch_without_a_teacher_is_refused",
        "distill_loss_weight=0.0",
    ),
    "use --opd-type megatron": (
        SLIME,
        "test_a_server_scores_at_temperature_one_and_the_whole_vocabulary",
        'opd_type = "megatron"',
    ),
    "use grpo, or --loss-type policy_loss": (
        SLIME,
        "test_options_that_would_change_the_loss_unseen",
        '"advantage_estimator": "grpo"',
    ),
    "use --kl-coef, which puts": (SLIME, "test_options_that_would_change_the_loss_unseen", '"use_kl_loss": False'),
    "unset it, or use --loss-type policy_loss": (
        SLIME,
        "test_options_that_would_change_the_loss_unseen",
        '"use_opsm": False',
    ),
    "let the rollout return them": (SLIME, "test_what_reads_the_sampler_needs_it", "run("),
    "divide a sum as you need it": (TRL, "test_divergences_are_the_textbooks", '"reduction": "sum"'),
    "train on text with KDRLTrainer": (TRL, "test_what_is_logged", "_generate_and_score_completions(inputs)"),
    "pass a copy made before the trainer": (
        "trainers/trl/test_grpo.py",
        "test_a_teacher_that_shares_parameters_is_refused_and_each_way_out_works",
        "copy.deepcopy(teacher)",
    ),
    "pass a copy, or its path": (TRL, "test_what_is_logged", "KDRL("),
    "pass a model with random or trained weights": (
        MODEL,
        "test_a_head_of_zeros_hides_everything",
        "normal_(std=0.02)",
    ),
    "load it with another attn_implementation": (
        MODEL,
        "test_an_attention_without_masks_is_found_and_another_one_works",
        'set_attn_implementation("sdpa")',
    ),
    "run padded rows and use kdloss.pack": (
        MODEL,
        "test_models_that_do_not_separate_sequences_are_found_and_padded_rows_work",
        "kdloss.pack(",
    ),
    "pass each choice as the answer": (
        "integrations/test_answers.py",
        "test_each_of_several_choices_is_the_answer_of_a_sequence",
        "read([choice]",
    ),
    "Call install in the __init__ of an engine class": (
        "integrations/test_areal.py",
        "test_install_in_the_controller_logs_a_warning",
        "AREAL_SPMD_MODE",
    ),
    "ask with logprob_start_len={}": (
        "integrations/test_recorded_servers.py",
        "test_sglang_scores_a_response_alone",
        'body("sglang-start-0")',
    ),
    "pass the logprob_start_len that was sent as starts=": (
        "integrations/test_recorded_servers.py",
        "test_sglang_scores_a_response_alone",
        "starts=starts",
    ),
    "pass the whole response": (
        "integrations/test_answers.py",
        "test_where_a_list_will_do_and_where_not",
        "_topk([whole]",
    ),
}


def texts() -> Iterator[str]:
    """Every string of the package that is not a docstring and gives advice, with {} in place of what is put in."""
    package = Path(kdloss.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if "_oracles" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        inside |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(x.value if isinstance(x, ast.Constant) else "{}" for x in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                text = node.value
            else:
                continue
            if "\n" not in text and ADVICE.search(text) and " " in text:
                yield f"{path.relative_to(package)}: {text}"


def test_every_advice_of_an_error_has_a_test_that_follows_it():
    found = list(texts())
    assert [text for text in found if not any(part in text for part in FOLLOWED)] == []
    assert [part for part in FOLLOWED if not any(part in text for text in found)] == []


@functools.cache
def definitions(file: str) -> dict[str, str]:
    """The source of every function, case and table of a test file, by name."""
    text = TESTS.joinpath(file).read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        source = "\n".join(lines[first - 1 : node.end_lineno])
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [node.name] if hasattr(node, "name") else [x.id for x in targets if isinstance(x, ast.Name)]
        found |= dict.fromkeys(names, source)
    return found


@pytest.mark.parametrize("part", FOLLOWED)
def test_the_test_that_is_named_takes_the_way_out(part):
    file, name, code = FOLLOWED[part]
    assert code in definitions(file)[name]


CONVERTED = [
    pytest.param(name, bad, id=f"{name}-{bad.what}")
    for name, calls in BAD.items()
    for bad in calls
    if "convert it with" in bad.message
]


@pytest.mark.parametrize(("name", "bad"), CONVERTED)
def test_converted_as_the_error_says(name, bad):
    """The error names an expression of the argument; with its value in place of the argument, the call works."""
    arguments = TABLE[name].variants["base"] | bad.changes
    with pytest.raises(bad.error) as caught:
        call(public_function(name), arguments)
    expression = re.search(r"convert it with ((\w+)\.\w+\(\))", str(caught.value))
    argument = expression.group(2)
    call(public_function(name), arguments | {argument: eval(expression.group(1), {argument: arguments[argument]})})


def test_a_model_output_is_told_to_pass_its_logits():
    class Output:
        logits = torch.zeros(3, 5)

    labels, output = torch.zeros(3, dtype=torch.int64), Output()
    with pytest.raises(TypeError, match=r"logits must be a tensor, got Output; pass its \.logits"):
        kdloss.token_logprobs(output, labels)
    kdloss.token_logprobs(output.logits, labels)


FLOAT8 = [getattr(torch, name) for name in dir(torch) if name.startswith("float8_")]
# These move values and compute nothing.
MOVES = {"pack", "unpack", "to_prediction_positions", "to_token_positions", "broadcast_to_tokens", "align_responses"}
TAKES_FLOATS = [
    (name, key)
    for name, entry in TABLE.items()
    if name not in MOVES
    for key in {
        k: 0 for v in entry.variants.values() for k, x in v.items() if torch.is_tensor(x) and x.is_floating_point()
    }
    if key != "normalizer"
]


@pytest.mark.parametrize(("name", "key"), TAKES_FLOATS)
def test_float8_is_refused_and_its_way_out_works(name, key):
    """One-byte floats have a scale that the tensor does not hold; int8 is refused likewise."""
    arguments = next(v for v in TABLE[name].variants.values() if torch.is_tensor(v.get(key)))
    whole, scale = arguments[key], 2.0
    for dtype in FLOAT8:
        stored = whole.to(torch.float32).abs().to(dtype)
        with pytest.raises(
            TypeError, match=rf"{key} must have a floating-point dtype of two bytes or more, got {dtype}"
        ):
            call(public_function(name), arguments | {key: stored})
    stored = (whole.float() / scale).to(torch.float8_e5m2)
    call(public_function(name), arguments | {key: stored.bfloat16() * scale})


def test_a_padded_tensor_is_flattened():
    B, L = 2, 3
    x, mask = torch.ones(B, L), torch.ones(B, L, dtype=torch.bool)
    with pytest.raises(ValueError, match="flatten a padded"):
        kdloss.segment_sum(x, loss_mask=mask, cu_seqlens=torch.tensor([0, 3, 6]))
    cu_seqlens = torch.arange(0, B * L + 1, L)
    assert kdloss.segment_sum(x.flatten(), loss_mask=mask.flatten(), cu_seqlens=cu_seqlens).tolist() == [3.0, 3.0]


def test_a_number_that_yaml_reads_as_text_is_written_otherwise():
    with pytest.raises(TypeError, match=r"write 5\.0e-3"):
        kdloss.schedules.constant(0, value="5e-3")
    assert kdloss.schedules.constant(0, value=5.0e-3) == 0.005


def test_lengths_past_int32_are_int64():
    lengths = torch.tensor([2**30, 2**30], dtype=torch.int32)
    with pytest.raises(ValueError, match="use int64"):
        kdloss.cu_seqlens_from_lengths(lengths)
    assert kdloss.cu_seqlens_from_lengths(lengths.long())[-1] == 2**31


SHARES = [
    pytest.param(name, bad, id=f"{name}-{bad.what}")
    for name, calls in BAD.items()
    for bad in calls
    if "; use " in bad.message and " must be in 0 < " in bad.message
]


@pytest.mark.parametrize(("name", "bad"), SHARES)
def test_the_end_of_a_mixture_is_the_function_that_is_named(name, bad):
    arguments = TABLE[name].variants["base"] | bad.changes
    with pytest.raises(ValueError, match="; use ") as caught:
        call(public_function(name), arguments)
    named = str(caught.value).rpartition("; use ")[2]
    (share,) = bad.changes
    call(public_function(named), {key: x for key, x in arguments.items() if key != share})


def test_heads_that_differ_in_padding_take_the_true_vocab_size():
    logits, teacher_logits = torch.randn(3, 7), torch.randn(3, 8)
    with pytest.raises(ValueError, match="pass the true vocab_size"):
        kdloss.reverse_kl(logits, teacher_logits)
    found = kdloss.reverse_kl(logits, teacher_logits, vocab_size=7)
    torch.testing.assert_close(found, kdloss.reverse_kl(logits, teacher_logits[:, :7]))


def test_no_softcap_is_none():
    logits, labels = torch.randn(3, 7), torch.arange(3)
    with pytest.raises(ValueError, match="pass None for no softcap"):
        kdloss.token_logprobs(logits, labels, softcap=float("inf"))
    found = kdloss.token_logprobs(logits, labels, softcap=None)
    torch.testing.assert_close(found, logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1))


def test_a_coupled_loss_becomes_two_steps_or_an_input():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3), torch.arange(4)
    mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="linear_token_logprobs first, then the loss; or pass what is sequence-level"):
        kdloss.fused_linear_loss(hidden, weight, labels, lambda logp, _: logp * logp.mean(), loss_mask=mask)
    logp = kdloss.linear_token_logprobs(hidden, weight, labels)
    mean = logp.mean().expand(4)
    two_steps = kdloss.token_mean(logp * mean.detach(), loss_mask=mask)
    fused = kdloss.fused_linear_loss(
        hidden, weight, labels, lambda logp, _, mean: logp * mean, mean.detach(), loss_mask=mask
    )
    torch.testing.assert_close(fused.loss, two_steps)


def test_a_direct_penalty_is_left_out():
    logp, mask = torch.randn(4, requires_grad=True), torch.ones(4, dtype=torch.bool)
    inputs = logp, None, torch.randn(4), None
    options = {"loss_mask": mask, "rl_loss_weight": 0.0, "distill_loss_weight": 1.0}
    with pytest.warns(UserWarning, match="leave it out to distill"):
        kdloss.kdrl_loss(*inputs, direct_penalty=True, **options)
    kdloss.kdrl_loss(*inputs, **options).loss.backward()
    assert logp.grad.abs().sum() > 0


def test_the_module_that_makes_the_logits_is_passed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 6))
    with pytest.raises(
        ValueError, match=r"pass the module that makes the logits.*or take log-probs from the model's own"
    ):
        kdloss.output_head(model)
    hidden, labels = torch.randn(2, 3), torch.tensor([1, 2])
    weight, bias, *_ = kdloss.output_head(model[1])
    found = kdloss.linear_token_logprobs(model[0](hidden), weight, labels, bias=bias)
    torch.testing.assert_close(found, kdloss.token_logprobs(model(hidden), labels))

"""The training loop: sample, judge, score with the teacher, update; evaluate, log and checkpoint on the way.

`update` and `backward` are the part to copy into another trainer.
"""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import kdloss
from opd import ranks
from opd.checkpoint import Checkpoints, MetricsFile, claim
from opd.config import Config, loss_config, weight_schedule
from opd.models import Policy, layout, load_policy, load_tokenizer
from opd.rollout import Batch, sample, score
from opd.task import Cipher, JsonLines, WordProblems
from opd.teacher_client import TeacherEndpoint

EVALUATION_SEED = 12345  # the same questions and draws at every evaluation of every mode: differences are the student's


def update(
    student: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    loss_kwargs: dict[str, Any],
    max_weight: float,
    mini_batches: int = 1,
    micro_batches: int = 1,
    max_grad_norm: float = 1.0,
    sft: bool = False,
    teacher: Policy | None = None,
) -> dict[str, float]:
    """One pass over `batch`: `mini_batches` optimizer steps, each in `micro_batches` parts that add up exactly."""
    if mini_batches > 1:  # later mini-batches meet a student that has moved; the clip is against where it stood before
        batch = replace(batch, prox_logp=score(student, batch, parts=mini_batches * micro_batches))
    history = []
    for mini in batch.split(mini_batches):
        # Denominators of the whole optimizer step. Gradients are averaged over processes, hence the division.
        tokens = ranks.total((mini.lengths - mini.prompt_lengths).sum()) / ranks.world_size()
        normalizer = tokens if loss_kwargs["reduction"] == "token_mean" else float(len(mini))
        optimizer.zero_grad()
        parts = [
            backward(
                student,
                micro,
                tokens=tokens,
                normalizer=normalizer,
                max_weight=max_weight,
                sft=sft,
                teacher=teacher,
                **loss_kwargs,
            )
            for micro in mini.split(micro_batches)
        ]
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
        optimizer.step()
        history.append({name: sum(part[name] for part in parts) for name in parts[0]})
        history[-1]["grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    names = list(history[0])
    means = torch.stack([torch.stack([step[name].float() for name in names]) for step in history]).mean(0)
    return dict(zip(names, (ranks.total(means) / ranks.world_size()).tolist(), strict=True))


def backward(
    student: Policy,
    micro: Batch,
    *,
    tokens: Tensor,
    normalizer: float | Tensor,
    max_weight: float,
    sft: bool,
    teacher: Policy | None = None,
    **loss_kwargs: Any,
) -> dict[str, Tensor]:
    """Adds the gradient of one micro-batch; returns its share of the step's metrics, which sum over micro-batches.

    A `teacher` that is given is read whole: where no response to a question was right, the forward KL from it is
    descended in place of the sampled reverse KL.
    """
    where = layout(micro.input_ids, micro.lengths, micro.prompt_lengths)
    mask, stream = where.loss_mask, micro.map(where.pack)
    logp, entropy, forward_kl = student(
        micro.input_ids, micro.lengths, micro.prompt_lengths, teacher=teacher, taught=micro.failed
    )
    weight = loss_kwargs.get("distill_loss_weight", 0.0)
    if forward_kl is not None:
        loss_kwargs["distill_loss_weight"] = 0.0
    if sft:
        out = kdloss.sft_loss(logp, loss_mask=mask, normalizer=normalizer)
    else:
        prox_logp = logp.detach() if stream.prox_logp is None else stream.prox_logp
        weights = kdloss.truncated_importance_weights(prox_logp, stream.old_logp, loss_mask=mask, max_weight=max_weight)
        advantages = kdloss.broadcast_to_tokens(
            micro.advantages, cu_seqlens=where.cu_seqlens, total_tokens=where.total_tokens
        )
        out = kdloss.kdrl_loss(
            logp,
            stream.old_logp,
            stream.teacher_logp,
            advantages,
            loss_mask=mask,
            prox_logp=prox_logp,
            weights=weights,
            cu_seqlens=where.cu_seqlens,
            normalizer=normalizer,
            **loss_kwargs,
        )
    loss = out.loss
    if forward_kl is not None:
        loss = loss + weight * kdloss.token_mean(forward_kl, loss_mask=mask, normalizer=normalizer)
    loss.backward()

    def mean(x: Tensor) -> Tensor:
        return kdloss.token_mean(x.detach().float(), loss_mask=mask, normalizer=tokens)

    metrics = {"loss": loss.detach(), "entropy": mean(entropy), "clip_fraction": mean(out.clipped)}
    if not sft:
        metrics["behaviour_kl"] = mean(kdloss.kl_k3(stream.old_logp, logp.detach(), loss_mask=mask))
    if not sft and stream.teacher_logp is not None:
        metrics["reverse_kl"] = mean(kdloss.kl_k1(logp.detach(), stream.teacher_logp, loss_mask=mask))
    return metrics


class Run:
    """Everything that one run holds, and the loop over its updates."""

    def __init__(self, config: Config):
        self.config = config
        self.device = ranks.device()
        self.tokenizer = load_tokenizer(config.actor.path)
        self.train_problems, self.held_out = problems(config)
        shared = {"vocab_size": len(self.tokenizer), "temperature": config.gconfig.temperature}
        self.student = load_policy(
            config.actor.path,
            dtype=config.actor.dtype,
            trained=True,
            device_map=config.actor.device_map,
            attn_impl=config.actor.attn_impl,
            gradient_checkpointing=config.actor.gradient_checkpointing,
            **shared,
        )
        self.teacher: Policy | None = None
        if config.teacher.get("path") and not config.endpoint.url:
            self.teacher = load_policy(
                config.teacher["path"],
                dtype=config.teacher.get("dtype", config.actor.dtype),
                trained=False,
                device_map=config.teacher.get("device_map"),
                attn_impl=config.teacher.get("attn_impl"),
                **shared,
            )
        self.score_with_teacher = self._teacher_scorer()
        adamw = config.actor.optimizer
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=adamw.lr, betas=(adamw.beta1, adamw.beta2), weight_decay=adamw.weight_decay
        )
        self.loss_kwargs = loss_config(config).as_kwargs()
        self.weight_at = weight_schedule(config)
        self.position = 0  # in the stream of training problems
        self.waiting: list[Batch] = []  # sampled and not yet trained on, oldest first

    def train(self, *, progress: bool = True) -> None:
        """Runs the updates that are left, from the newest checkpoint if there is one."""
        with claim(self.config):
            self._train(progress=progress)

    def _train(self, *, progress: bool) -> None:
        config, folder = self.config, self.config.run_dir
        checkpoints = Checkpoints(folder / "checkpoints", keep=config.saver.keep)
        torch.manual_seed(1000 * config.seed + ranks.rank())
        state = checkpoints.load(model=self.student, optimizer=self.optimizer) or {"step": 0, "metrics_length": 0}
        with MetricsFile(folder / "metrics.jsonl", length=state["metrics_length"]) as metrics:
            if state["step"]:
                self.position = state["position"]
                self.waiting = [Batch(**tensors).map(self._to_device) for tensors in state["waiting"][ranks.rank()]]
            else:
                metrics.write({"step": 0, **self.evaluate(final=True), **self.baseline()})
            bar = tqdm(
                range(state["step"], config.total_train_steps),
                desc=config.trial_name,
                initial=state["step"],
                total=config.total_train_steps,
                disable=not progress or ranks.rank() != 0,
            )
            for done in bar:
                record = self.one_update(done)
                metrics.write(record)
                self._show(bar, record)
                if self._due(record["step"], config.saver.freq_steps):
                    checkpoints.save(
                        record["step"],
                        model=self.student,
                        optimizer=self.optimizer,
                        position=self.position,
                        waiting=ranks.gather([as_dict(batch.map(Tensor.cpu)) for batch in self.waiting]),
                        metrics_length=metrics.length(),
                    )
        self.student.save_pretrained(folder / "student", self.tokenizer)

    def one_update(self, done: int) -> dict[str, float]:
        """Update number `done` + 1, and what there is to say about it."""
        config, actor = self.config, self.config.actor
        for group in self.optimizer.param_groups:
            group["lr"] = actor.optimizer.lr * min(1.0, (done + 1) / max(1, actor.optimizer.warmup_steps))
        while len(self.waiting) <= config.rollout.max_head_offpolicyness:
            self.waiting.append(self.collect())
        batch = self.waiting.pop(0)
        weight = self.weight_at(done)
        metrics = update(
            self.student,
            self.optimizer,
            batch,
            loss_kwargs=self.loss_kwargs | {"distill_loss_weight": weight},
            max_weight=actor.behave_imp_weight_cap,
            mini_batches=actor.ppo_n_minibatches,
            micro_batches=actor.mb_spec.n_mbs,
            max_grad_norm=actor.optimizer.gradient_clipping,
            sft=config.mode == "sft",
            teacher=self.teacher if config.mode == "kdrl-full" else None,
        )
        rewards = ranks.total(torch.stack([batch.rewards.sum(), batch.rewards.new_tensor(len(batch))]))
        record = {
            "step": done + 1,
            "reward": (rewards[0] / rewards[1]).item(),
            "distill_loss_weight": weight,
            "response_tokens": (batch.lengths - batch.prompt_lengths).float().mean().item(),
            **metrics,
        }
        if self._due(done + 1, config.evaluator.freq_steps):
            record |= self.evaluate(final=done + 1 == config.total_train_steps)
        return record

    def collect(self) -> Batch:
        """The next batch: responses (the teacher's in mode `sft`), rewards, advantages, teacher scores."""
        config, share = self.config, self.config.data.batch_size // ranks.world_size()
        first = self.position + ranks.rank() * share
        self.position += config.data.batch_size
        batch = self._sample(
            self.teacher if config.mode == "sft" else self.student,
            [self.train_problems[i] for i in range(first, first + share)],
            n_samples=config.gconfig.n_samples,
        )
        n_samples = config.gconfig.n_samples
        advantages = kdloss.group_relative_advantages(batch.rewards, group_size=n_samples)
        teacher_logp = self.score_with_teacher(batch) if self.score_with_teacher else None
        failed = (batch.rewards.view(-1, n_samples).amax(1) <= 0).repeat_interleave(n_samples)
        return replace(batch, advantages=advantages, teacher_logp=teacher_logp, failed=failed)

    def evaluate(self, *, policy: Policy | None = None, final: bool = False) -> dict[str, float]:
        """Held-out accuracy of one sampled response a question, and its standard error; leaves no trace in the run."""
        size = self.config.evaluator.final_size if final else self.config.evaluator.size
        mine = range(ranks.rank(), size, ranks.world_size())
        rewards = []
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(EVALUATION_SEED + ranks.rank())
            for begin in range(0, len(mine), self.config.evaluator.batch_size):
                chunk = [self.held_out[i] for i in mine[begin : begin + self.config.evaluator.batch_size]]
                rewards.append(self._sample(policy or self.student, chunk, n_samples=1).rewards)
        accuracy = ranks.total(torch.cat(rewards).sum()).item() / size
        return {"accuracy": accuracy, "accuracy_se": (accuracy * (1 - accuracy) / size) ** 0.5}

    def baseline(self) -> dict[str, float]:
        """The teacher's own accuracy, where asked for and there is a local teacher."""
        if self.teacher is None or not self.config.evaluator.teacher:
            return {}
        return {f"teacher_{name}": value for name, value in self.evaluate(policy=self.teacher, final=True).items()}

    def _sample(self, policy: Policy, chosen: list, *, n_samples: int) -> Batch:
        generation = self.config.gconfig
        return sample(
            policy,
            self.tokenizer,
            chosen,
            n_samples=n_samples,
            max_new_tokens=generation.max_new_tokens,
            top_p=generation.top_p,
            instruction=self.config.data.instruction,
            device=self.device,
        )

    def _teacher_scorer(self) -> Callable[[Batch], Tensor] | None:
        config, endpoint = self.config, self.config.endpoint
        if endpoint.url:
            return TeacherEndpoint(
                endpoint.url,
                kind=endpoint.kind,
                model=endpoint.model,
                api_key=os.environ.get(endpoint.api_key_variable),
                temperature=config.gconfig.temperature,
                timeout=endpoint.timeout,
                attempts=endpoint.attempts,
                concurrency=endpoint.concurrency,
            )
        if self.teacher is None:
            return None
        return lambda batch: score(self.teacher, batch, parts=config.actor.mb_spec.n_mbs)

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.total_train_steps

    @staticmethod
    def _show(bar: tqdm, record: dict[str, float]) -> None:
        shown = ("reward", "reverse_kl", "clip_fraction", "entropy")
        bar.set_postfix({name: f"{record[name]:.3f}" for name in shown if name in record})
        if "accuracy" in record and not bar.disable:
            accuracy, error = record["accuracy"], record["accuracy_se"]
            bar.write(f"update {record['step']:4d}  held-out accuracy {accuracy:.3f} ± {error:.3f}")

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device)


def problems(config: Config) -> tuple[Any, Any]:
    """Training and held-out problems."""
    if config.data.path is None:
        source = Cipher if config.data.task == "cipher" else WordProblems
        return source(seed=config.seed, held_out=False), source(seed=EVALUATION_SEED, held_out=True)
    held_out = JsonLines(config.data.eval_path, seed=config.seed, shuffle=False)
    return JsonLines(config.data.path, seed=config.seed), held_out


def as_dict(batch: Batch) -> dict[str, Tensor]:
    """The batch's tensors by name."""
    return {f.name: getattr(batch, f.name) for f in fields(batch)}

